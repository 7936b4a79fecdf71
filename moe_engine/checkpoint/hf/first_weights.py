"""The weights that a new run starts with: of a Hugging Face folder, or of a checkpoint."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from moe_engine.checkpoint.finite import nonfinite, refusal
from moe_engine.checkpoint.hf.folder import HfFolder
from moe_engine.checkpoint.manifest import NAME
from moe_engine.checkpoint.open import Checkpoint
from moe_engine.checkpoint.source import Source
from moe_engine.config import Model
from moe_engine.config.hf import differences
from moe_engine.errors import ConfigError
from moe_engine.labels import beside_the_model
from moe_engine.parallel.agree import act_together
from moe_engine.parallel.collectives import gather_bytes
from moe_engine.parallel.mesh import Axis

REMEDY = "use a whole copy, or start with what tools/convert_hf.py import --allow-nonfinite makes of a folder"


def open_weights(path: Path) -> HfFolder | Checkpoint:
    """The weights at `path`, of either kind; no tensor is read yet."""
    return Checkpoint(path) if (path / NAME).is_file() else HfFolder(path)


def changes_of(source: HfFolder | Checkpoint, model: Model) -> list[str]:
    """One line for each setting that makes the run's model another function of the same weights."""
    theirs = source.model
    changes = differences(model, theirs).items()
    lines = [f"model.{key} was {was} and is {now} in this run" for key, (now, was) in changes]
    if isinstance(source, HfFolder) and model.max_position_embeddings > source.model.max_position_embeddings:
        lines += [line for line in source.notes if "sliding_window" in line]  # past it, the weights know no attention
    return lines


def check_shapes(source: Source, ours: Mapping[str, tuple[int, ...]]) -> None:
    """ConfigError, with the first of them, when weights of the run have other names or shapes than those at hand."""
    theirs = {name: tuple(shape) for name, shape in source.shapes.items()}
    ours, theirs = ({name: s for name, s in found.items() if not beside_the_model(name)} for found in (ours, theirs))
    names = [name for name in sorted(ours.keys() | theirs.keys()) if ours.get(name) != theirs.get(name)]
    if names:
        first = names[0]
        raise ConfigError(
            f"{source.folder}: {len(names)} weights are not those of the model, {first} for one is {theirs.get(first)} "
            f"there and {ours.get(first)} in the run; leave --model out to take the model of that folder"
        )


def check_finite(source: HfFolder | Checkpoint, found: list[str], world: Axis) -> None:
    """DataError on all ranks when any of them `found` weights with NaN or infinities, unless they were let in when the
    checkpoint was made. Collective; the good case reads nothing again."""
    names = {name for part in gather_bytes(json.dumps(found).encode(), world) for name in json.loads(part)}

    def refuse() -> None:
        """Raise the error that says, for each tensor, what is not finite; rank 0 reads them again for it."""
        raise refusal(source, count_in(source, sorted(names)), REMEDY)

    if names and not let_in(source):
        act_together(refuse, world, everywhere=False)


def let_in(source: HfFolder | Checkpoint) -> dict[str, str]:
    """The tensors of a checkpoint that hold NaN or infinities, as who made it wished."""
    return source.manifest.get("nonfinite", {}) if isinstance(source, Checkpoint) else {}


def count_in(source: Source, weights: list[str]) -> dict[str, str]:
    """`nonfinite` of these weights in fp32; of a Hugging Face folder by the names of its tensors."""
    found: dict[str, str] = {}
    for name in weights:
        boxes = {name: tuple((0, side) for side in source.shapes[name])}
        if isinstance(source, HfFolder):
            boxes = {stored.key: stored.piece.box for stored in source.stored[name]}
        for label, box in boxes.items():
            if said := nonfinite(source.part(name, box, torch.float32)):
                found[label] = said
    return found
