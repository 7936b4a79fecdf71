"""Reading a checkpoint onto any layout: each rank copies its own elements, whatever pieces they were written in.

A folder is trusted only after all of its files were compared with its manifest; the ranks share that work and agree on
the outcome before any of them reads a tensor. `--resume auto` takes the newest that holds, and says so when that is not
the newest.
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from moe_engine.checkpoint.folders import folder_of, set_aside, steps_in
from moe_engine.checkpoint.manifest import file_in, problems_of, read_manifest
from moe_engine.checkpoint.pieces import Box, Piece, overlap, within
from moe_engine.checkpoint.shard import open_shard
from moe_engine.errors import ConfigError, DataError, StorageError
from moe_engine.parallel.collectives import gather_bytes
from moe_engine.parallel.mesh import Axis


def choose(resume: str, root: Path, world: Axis, warn: Callable[[str], None]) -> Path | None:
    """The verified folder that `resume` means, a path or "auto"; None when auto finds nothing. Collective.

    auto sets damaged checkpoints aside. DataError when none is whole, or the one at the path is not.
    """
    if resume != "auto":
        folder = Path(resume)
        if not (folder / "manifest.json").is_file():
            raise ConfigError(
                f"--resume {resume}: no manifest.json there; give a folder step-N written by this engine, or auto"
            )
        if problems := verify(folder, world):
            raise DataError("; ".join(problems) + "; resume from another checkpoint")
        return folder
    seen = gather_bytes(json.dumps(steps_in(root)).encode(), world)  # rank 0's word counts
    steps: list[int] = json.loads(seen[0])
    if any(other != seen[0] for other in seen):
        raise DataError(f"{root}: ranks find different checkpoints; --out must be shared by all nodes")
    damaged = []
    for step in reversed(steps):
        folder = folder_of(root, step)
        if not (problems := verify(folder, world)):
            if damaged:
                warn(f"DAMAGED CHECKPOINT: {'; '.join(damaged)}. Falling back to step {step}, the newest that is whole")
            return folder
        damaged += problems
        if world.rank == 0:
            _try_set_aside(folder)
    if damaged:
        raise DataError(
            f"no checkpoint under {root} is whole: {'; '.join(damaged)}. They were renamed to step-N.aside; start "
            "afresh with another --out, or bring back a copy"
        )
    return None


def _try_set_aside(folder: Path) -> None:
    try:
        set_aside(folder)
    except StorageError:
        return  # a folder that cannot be renamed is passed over again next time


def verify(folder: Path, world: Axis) -> list[str]:
    """What is wrong with a checkpoint, one line each and the same on all ranks; they share the reading. Collective."""
    try:
        mine = problems_of(folder, read_manifest(folder), world.rank, world.size)
    except DataError as error:
        mine = [str(error)]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        mine = [f"{folder}: a manifest without what belongs there ({type(error).__name__}: {error})"]
    found = [problem for part in gather_bytes(json.dumps(mine).encode(), world) for problem in json.loads(part)]
    return list(dict.fromkeys(found))


class Reader:
    """A verified checkpoint, opened; tensors are read when they are asked for."""

    def __init__(self, folder: Path):
        self.folder, self.manifest = folder, read_manifest(folder)
        self.files = {name: open_shard(file_in(folder, name)) for name in self.manifest["files"]}
        self.pieces: dict[str, list[tuple[str, int, Piece]]] = {}
        for file, opened in self.files.items():
            for i, (name, box, start, length) in enumerate(json.loads(opened.metadata()["pieces"])):
                self.pieces.setdefault(name, []).append((file, i, Piece(name, tuple(map(tuple, box)), start, length)))

    def fill(self, kind: str, wanted: Piece, out: Tensor) -> None:
        """Copy the elements of a piece of one kind ("master", "exp_avg", ...) into the flat `out`; DataError if any
        is missing. At most one stored piece is in host memory at a time."""
        missing = wanted.length
        targets = list(wanted.boxes())
        for file, i, stored in self.pieces.get(wanted.name, []):
            if len(stored.box) != len(wanted.box) or overlap(stored.box, wanted.box) is None:
                continue
            run: Tensor = self.files[file].get_tensor(
                key_of(kind, i, wanted.name)
            )  # mapped: what is unused is not read
            for source, source_place in stored.boxes():
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

    def whole(self, name: str, kind: str = "master") -> Tensor:
        """The whole tensor of one kind of one weight, fp32."""
        if name not in self.manifest["weights"]:
            raise DataError(f"{self.folder}: no weight {name}")
        shape = self.manifest["weights"][name]
        box: Box = tuple((0, side) for side in shape)
        out = torch.empty(torch.Size(shape).numel())
        self.fill(kind, Piece(name, box, 0, out.numel()), out)
        return out.view(shape)

    def extra(self, rank: int) -> dict[str, Tensor]:
        """The small tensors that rank `rank` of the writing run stored."""
        opened = self.files[rank_file(rank)]
        names = [key for key in opened.keys() if key.startswith("extra/")]  # noqa: SIM118 (not a dict)
        return {name.removeprefix("extra/"): opened.get_tensor(name) for name in names}


def rank_file(rank: int) -> str:
    """The file of one rank."""
    return f"rank-{rank:05d}.safetensors"


def key_of(kind: str, number: int, name: str) -> str:
    """The key of a tensor: its kind, the number of its piece in the file, the weight's name."""
    return f"{kind}/{number}/{name}"
