"""Every change that a checkpoint makes on disk. A fault test breaks in here, and nowhere else.

A file is complete when it was synced, a name when its folder was. Whatever the system refuses becomes a StorageError
that says where and what to do; what was there before stays.
"""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from moe_engine.errors import StorageError

REMEDY = {
    errno.ENOSPC: "free some space, keep fewer checkpoints (train.keep_last), or choose another --out",
    errno.EDQUOT: "your quota is used up: free some space or choose another --out",
    errno.EROFS: "choose an --out that is not read-only",
    errno.EACCES: "choose an --out that you may write to",
    errno.EPERM: "choose an --out that you may write to",
    errno.ENAMETOOLONG: "choose an --out with a shorter name",
}


@contextlib.contextmanager
def storage(path: Path) -> Iterator[None]:
    """Turn an OSError into a StorageError that names `path` and the remedy."""
    try:
        yield
    except OSError as error:
        remedy = REMEDY.get(error.errno or 0, "check the disk, or choose another --out")
        raise StorageError(f"{path}: {error.strerror or error}; {remedy}") from error


def require_space(folder: Path, needed: int) -> None:
    """StorageError unless `needed` bytes are free on the file system of an existing `folder`."""
    with storage(folder):
        free = shutil.disk_usage(folder).free
    if free < needed:
        raise StorageError(
            f"the checkpoint needs {needed / 1e9:.3f} GB, has {free / 1e9:.3f} GB at {folder}; {REMEDY[errno.ENOSPC]}"
        )


def make_folder(folder: Path) -> None:
    """Make a folder and the missing ones above it, and sync the name of the folder."""
    with storage(folder):
        folder.mkdir(parents=True, exist_ok=True)
    sync_folder(folder.parent)


def write_file(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Write a new file part by part and sync it."""
    with storage(path), path.open("wb") as file:
        for part in parts:
            file.write(part)
        file.flush()
        sync(file.fileno())


def sync(descriptor: int) -> None:
    """Wait until an open file, or folder, is on the disk."""
    os.fsync(descriptor)


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    with storage(folder):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            sync(descriptor)
        finally:
            os.close(descriptor)


def rename(old: Path, new: Path) -> None:
    """Give a file or folder another name; a file that has that name is replaced, in one step."""
    with storage(new):
        os.replace(old, new)


def publish(folder: Path, final: Path) -> None:
    """Give a complete folder its name, and wait until that is on the disk; StorageError when the name is taken."""
    sync_folder(folder)
    rename(folder, final)
    sync_folder(final.parent)


def remove(path: Path) -> None:
    """Remove a folder, a file, or a link but not what it leads to; nothing happens when there is none.

    Of a folder the manifest goes first: half of it is no checkpoint.
    """
    if not os.path.lexists(path):
        return
    with storage(path):
        if path.is_symlink() or not path.is_dir():
            path.unlink()
            return
        for file in sorted(path.iterdir(), key=lambda file: file.name != "manifest.json"):
            remove(file)
        path.rmdir()
