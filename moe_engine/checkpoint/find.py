"""The checkpoint that `--resume` means.

A folder is trusted only after all of its files were compared with its manifest; the ranks share that work and agree on
the outcome before any of them reads a tensor. `--resume auto` takes the newest that holds, and says so when that is not
the newest.
"""

import json
from collections.abc import Callable
from pathlib import Path

from moe_engine.checkpoint.folders import folder_of, steps_in
from moe_engine.checkpoint.manifest import problems_of, read_manifest
from moe_engine.checkpoint.resume_checks import check_present
from moe_engine.errors import DataError
from moe_engine.parallel.agree import act_together
from moe_engine.parallel.collectives import gather_bytes
from moe_engine.parallel.mesh import Axis


def find_checkpoint(
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
