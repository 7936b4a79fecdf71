"""Names under `checkpoints/` of a run, and what may happen to them.

step-00000100/            complete: it has a manifest, and a name that only a complete folder is given
step-00000100.tmp/        being written or removed, or left by a run that died
step-00000100.old/        the one that a new folder of the same name replaces, while it does
step-00000100.aside/      damaged, or of a past that the run has left: kept, never read, never counted;
                          then .aside-2 and so on
latest                    the name of the newest, for people and scripts; the engine looks for itself
"""

import re
from pathlib import Path

from moe_engine.host import disk

NAME = re.compile(r"step-(\d{8,})")


def folder_of(root: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies."""
    return root / f"step-{step:08d}"


def steps_in(root: Path) -> list[int]:
    """Steps of the complete checkpoints, ascending."""
    if not root.is_dir():
        return []
    found = [NAME.fullmatch(path.name) for path in root.iterdir() if path.is_dir()]
    return sorted(int(match[1]) for match in found if match)


def publish_step(temporary: Path, final: Path) -> None:
    """Give a complete folder its name, then name it in `latest`; one that has the name goes when that is safe."""
    root, old = final.parent, final.with_suffix(".old")
    disk.sync_folder(temporary)
    disk.remove(old)
    if final.is_dir():
        disk.rename(final, old)
    disk.rename(temporary, final)
    disk.sync_folder(root)
    disk.write_file(root / "latest.tmp", [final.name.encode()])
    disk.rename(root / "latest.tmp", root / "latest")
    disk.sync_folder(root)
    disk.remove(old)


def tidy(root: Path) -> None:
    """Before a run's first save: finish or undo what a run that died left half done. One run at a time may."""
    if not root.is_dir():
        return
    for path in sorted(root.iterdir()):
        if path.suffix == ".old" and not path.with_suffix("").is_dir():
            disk.rename(path, path.with_suffix(""))
        elif path.suffix in (".tmp", ".old") and path.is_dir():
            disk.remove(path)


def set_aside(folder: Path) -> Path:
    """Rename a checkpoint so that nothing reads it; returns its new place."""
    names = (folder.with_suffix(f".aside{more}") for more in ("", *(f"-{i}" for i in range(2, 1000))))
    aside = next(name for name in names if not name.exists())
    disk.rename(folder, aside)
    disk.sync_folder(folder.parent)
    return aside


def prune(root: Path, keep_last: int, keep_every: int) -> list[Path]:
    """Remove all but the newest `keep_last` (0: all are kept) and every step that `keep_every` divides.

    The newest was published a moment ago and stays in any case. Returns what is gone.
    """
    if not keep_last:
        return []
    steps = steps_in(root)
    old = [step for step in steps[:-keep_last] if not (keep_every and step % keep_every == 0)]
    old = [step for step in old if not folder_of(root, step).is_symlink()]  # somebody keeps it elsewhere
    for step in old:
        folder = folder_of(root, step)
        disk.rename(folder, folder.with_suffix(".tmp"))  # half of it would look complete
        disk.remove(folder.with_suffix(".tmp"))
    return [folder_of(root, step) for step in old]
