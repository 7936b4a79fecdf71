"""Where each tensor of a Hugging Face folder lies in the engine's weights: a family's rows for a model's shapes."""

import re
from collections.abc import Mapping
from typing import NamedTuple

import torch

from moe_engine.checkpoint.pieces import Box, volume
from moe_engine.config.hf.families.family import Row

Shape = tuple[int, ...]
TARGET = re.compile(r"(?P<weight>[^\[]+)(\[(?P<indices>[^\]]+)\])?")


class Place(NamedTuple):
    """Where a tensor on disk lies in the engine: a box of a weight, and the tensor's shape on disk."""

    weight: str
    box: Box
    shape: Shape


def places(rows: tuple[Row, ...], shapes: Mapping[str, Shape]) -> dict[str, Place]:
    """The place of each tensor on disk, in the order of the layers; asserts that the rows make up every weight."""
    layers = 1 + max((int(name.split(".")[1]) for name in shapes if name.startswith("layers.")), default=-1)
    out: dict[str, Place] = {}
    per_layer = [row for row in rows if "{i}" in row.theirs]
    before = rows.index(per_layer[0])
    rest = [row for row in rows if "{i}" not in row.theirs]
    for row in rest[:before]:
        out |= _expand(row, 0, shapes)
    for layer in range(layers):
        for row in per_layer:
            out |= _expand(row, layer, shapes)
    for row in rest[before:]:
        out |= _expand(row, 0, shapes)
    covered = dict.fromkeys(shapes, 0)
    for place in out.values():
        covered[place.weight] += volume(place.box)
    whole = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    assert covered == whole, f"the table does not make up {[name for name in whole if covered[name] != whole[name]]}"
    return out


def _expand(row: Row, layer: int, shapes: Mapping[str, Shape]) -> dict[str, Place]:
    match = TARGET.fullmatch(row.ours)
    assert match, row.ours
    weight = match["weight"].format(i=layer)
    if weight not in shapes:
        return {}
    shape, out = shapes[weight], {}
    for expert in range(shape[0]) if "{e}" in row.theirs else (0,):
        indices = [int(text.format(e=expert)) for text in (match["indices"] or "").split(",") if text]
        box = (*((index, index + 1) for index in indices), *((0, side) for side in shape[len(indices) :]))
        sides = list(shape[len(indices) :])
        if row.merged is not None:
            sides[row.merged : row.merged + 2] = [sides[row.merged] * sides[row.merged + 1]]
        out[row.theirs.format(i=layer, e=expert)] = Place(weight, box, tuple(sides))
    return out
