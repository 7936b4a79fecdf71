"""Weights that lie in safetensors files as pieces, and how any part of one is read: by a run of any layout, by a tool.

Tensors are mapped, so that what is not used is not read. The pages of a mapped file count as this process's memory as
long as the file is open; who streams through many files keeps one open at a time (`keep_open`).
"""

from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_engine.checkpoint.pieces import Box, Piece, overlap, volume, within
from moe_engine.checkpoint.shard import TORCH_OF, open_shard
from moe_engine.errors import DataError

Shape = tuple[int, ...]


class Stored(NamedTuple):
    """A piece of a weight, the file that it lies in, and the end of its key there ("master/" comes before it)."""

    file: Path
    key: str
    piece: Piece


class Source:
    """The weights of one folder. shapes: name -> whole shape. stored: name -> the pieces that make it up."""

    def __init__(
        self,
        folder: Path,
        shapes: Mapping[str, Shape],
        stored: Mapping[str, list[Stored]],
        keep_open: int = 0,
    ):
        self.folder, self.shapes, self.stored, self.keep_open = folder, shapes, stored, keep_open
        self._open: dict[Path, Any] = {}

    def __str__(self) -> str:
        return str(self.folder)

    def key(self, kind: str, stored: Stored) -> str:
        """The key of a piece in its file."""
        return f"{kind}/{stored.key}"

    def file(self, path: Path) -> Any:
        """An opened file; of others only the `keep_open` used last stay open (0: all do)."""
        opened = self._open.pop(path, None) or open_shard(path)
        self._open[path] = opened
        while self.keep_open and len(self._open) > self.keep_open:
            self._open.pop(next(iter(self._open)))
        return opened

    def fill(self, kind: str, wanted: Piece, out: Tensor) -> None:
        """Copy the elements of a piece of one kind ("master", "exp_avg", ...) into the flat `out`, cast to its dtype.

        DataError if any is missing.
        """
        missing = wanted.length
        targets = list(wanted.boxes())
        for stored in self.stored.get(wanted.name, []):
            piece = stored.piece
            if not _meet(piece, [target for target, _ in targets]):
                continue  # and its file stays closed
            run: Tensor = self.file(stored.file).get_tensor(self.key(kind, stored)).flatten()
            for source, source_place in piece.boxes():
                for target, target_place in targets:
                    if both := overlap(source, target):
                        part = within(run, source, source_place, both)
                        within(out, target, target_place, both).copy_(part)
                        missing -= part.numel()
        if missing:
            raise DataError(
                f"{self.folder}: {missing} of {wanted.length} elements of {wanted.name} are not there; resume with the "
                "model that wrote it"
            )

    def part(self, name: str, box: Box, dtype: torch.dtype | None = None, kind: str = "master") -> Tensor:
        """The elements of a box of one weight, in the dtype that they are stored in unless one is given."""
        if name not in self.shapes:
            raise DataError(f"{self.folder}: no weight {name}")
        out = torch.empty(volume(box), dtype=dtype or self.dtype(name, box, kind))
        self.fill(kind, Piece(name, box, 0, out.numel()), out)
        return out.view([stop - start for start, stop in box])

    def whole(self, name: str, kind: str = "master", dtype: torch.dtype | None = torch.float32) -> Tensor:
        """The whole tensor of one kind of one weight; None: in the dtype that it is stored in."""
        return self.part(name, tuple((0, side) for side in self.shapes.get(name, ())), dtype, kind)

    def elements_by_dtype(self, kind: str = "master") -> dict[str, int]:
        """Elements by the dtype that they are stored in, torch's name of it, the most frequent first."""
        count: dict[str, int] = {}
        for stored in (stored for pieces in self.stored.values() for stored in pieces):
            found = self.file(stored.file).get_slice(self.key(kind, stored)).get_dtype()
            name = str(TORCH_OF[found]).removeprefix("torch.")
            count[name] = count.get(name, 0) + stored.piece.length
        return dict(sorted(count.items(), key=lambda item: -item[1]))

    def dtype(self, name: str, box: Box, kind: str = "master") -> torch.dtype:
        """The dtype in which a box of a weight is stored; the wider one where pieces differ."""
        pieces = [stored for stored in self.stored.get(name, []) if _meet(stored.piece, [box])]
        if not pieces:
            raise DataError(f"{self.folder}: no weight {name}")
        found = (self.file(stored.file).get_slice(self.key(kind, stored)).get_dtype() for stored in pieces)
        return reduce(torch.promote_types, (TORCH_OF[name] for name in found))


def _meet(piece: Piece, boxes: list[Box]) -> bool:
    """Whether a stored run holds elements of any of the boxes."""
    if not boxes or len(piece.box) != len(boxes[0]):
        return False
    return any(overlap(source, box) is not None for source, _ in piece.boxes() for box in boxes)
