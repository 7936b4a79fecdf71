"""Reading a checkpoint onto any layout: each rank copies its own elements, whatever pieces they were written in.

A folder is trusted only after all of its files were compared with its manifest; the ranks share that work and agree on
the outcome before any of them reads a tensor. `--resume auto` takes the newest that holds, and says so when that is not
the newest.
"""

import json
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from moe_engine.checkpoint.folders import folder_of, steps_in
from moe_engine.checkpoint.manifest import NAME, file_in, problems_of, read_manifest
from moe_engine.checkpoint.pieces import Piece
from moe_engine.checkpoint.shard import SUFFIX
from moe_engine.checkpoint.source import Source, Stored
from moe_engine.config import Run
from moe_engine.errors import ConfigError, DataError
from moe_engine.parallel.agree import act_together
from moe_engine.parallel.collectives import gather_bytes
from moe_engine.parallel.mesh import Axis


def choose(
    resume: str, root: Path, world: Axis, warn: Callable[[str], None], heartbeat: Callable[[], None] = lambda: None
) -> Path | None:
    """The verified folder that `resume` means, a path or "auto"; None when auto finds nothing. Collective.

    DataError when none is whole, or the one at the path is not; nothing is renamed or removed. heartbeat: called as
    reading goes on.
    """
    if resume != "auto":
        folder = Path(resume)
        act_together(lambda: check_present(folder), world)
        if problems := verify(folder, world, heartbeat):
            raise DataError("; ".join(problems) + "; resume from another checkpoint")
        return folder
    damaged: list[str] = []
    for step in reversed(agreed_steps(root, world)):
        folder = folder_of(root, step)
        if not (problems := verify(folder, world, heartbeat)):
            if damaged:
                warn(f"DAMAGED CHECKPOINT: {'; '.join(damaged)}. Falling back to step {step}, the newest that is whole")
            return folder
        damaged += problems
    if damaged:
        raise DataError(
            f"no checkpoint under {root} is whole: {'; '.join(damaged)}; bring back a copy, or start afresh with "
            "another --out"
        )
    return None


def check_resume(run: Run, there: list[int]) -> None:
    """ConfigError when what the run asks for does not go with the steps that lie in its --out."""
    out, resume = run.train.out, run.train.resume
    if there and not resume:
        raise ConfigError(
            f"--out {out} holds checkpoints of an earlier run: continue it with --resume auto, or give another --out"
        )
    if there and resume and resume != "auto" and Path(resume).resolve().parent != Path(out, "checkpoints").resolve():
        raise ConfigError(
            f"--resume {resume} is of another run, and --out {out} holds checkpoints of its own: give another --out"
        )


def check_present(folder: Path) -> None:
    """ConfigError when a folder that --resume names is no checkpoint."""
    if not (folder / NAME).is_file():
        raise ConfigError(
            f"--resume {folder}: no manifest.json there; give a folder step-N written by this engine, or auto"
        )


def agreed_steps(root: Path, world: Axis) -> list[int]:
    """Steps of the checkpoints under `root`; DataError when the ranks do not see the same. Collective."""
    seen: list[list[int]] = []
    act_together(lambda: seen.append(steps_in(root)), world)
    if len(set(gather_bytes(json.dumps(seen[0]).encode(), world))) > 1:
        raise DataError(f"{root}: the ranks find different checkpoints; --out must be shared by all nodes")
    return seen[0]


def verify(folder: Path, world: Axis, heartbeat: Callable[[], None] = lambda: None) -> list[str]:
    """What is damaged in a checkpoint, one line each and the same on all ranks; they share the reading. Collective.

    StorageError when a rank cannot read, ConfigError for another format: neither says that the checkpoint is bad.
    """
    mine: list[str] = []

    def look() -> None:
        """This rank's share of the problems goes to `mine`; a manifest that cannot be understood is one of them."""
        try:
            mine.extend(problems_of(folder, read_manifest(folder), world.rank, world.size, heartbeat))
        except DataError as error:
            mine.append(str(error))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            mine.append(f"{folder}: a manifest without what belongs there ({type(error).__name__}: {error})")

    act_together(look, world)
    found = [problem for part in gather_bytes(json.dumps(mine).encode(), world) for problem in json.loads(part)]
    return list(dict.fromkeys(found))


class Reader(Source):
    """A verified checkpoint, opened; tensors are read when they are asked for."""

    def __init__(self, folder: Path, keep_open: int = 0):
        self.manifest = read_manifest(folder)
        super().__init__(folder, {name: tuple(s) for name, s in self.manifest["weights"].items()}, {}, keep_open)
        stored: dict[str, list[Stored]] = {}
        files = [file_in(folder, name) for name in self.manifest["files"]]
        for path in (path for path in files if path.suffix == SUFFIX):
            for i, (name, box, start, length) in enumerate(json.loads(self.file(path).metadata()["pieces"])):
                piece = Piece(name, tuple(map(tuple, box)), start, length)
                stored.setdefault(name, []).append(Stored(path, f"{i}/{name}", piece))
        self.stored = stored

    def extra(self, rank: int) -> dict[str, Tensor]:
        """The small tensors that rank `rank` of the writing run stored."""
        opened = self.file(file_in(self.folder, rank_file(rank)))
        names = [key for key in opened.keys() if key.startswith("extra/")]  # noqa: SIM118 (not a dict)
        return {name.removeprefix("extra/"): opened.get_tensor(name) for name in names}


def rank_file(rank: int) -> str:
    """The file of one rank."""
    return f"rank-{rank:05d}{SUFFIX}"
