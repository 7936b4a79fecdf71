"""Which files may be read when a manifest names them: its neighbours, and nothing that only has a file's name. And
where files can be written."""

import os
import stat
from pathlib import Path


def size_in(folder: Path, path: Path) -> int | None:
    """Bytes of a regular file that lies in `folder` itself. None for what is missing, elsewhere, a link, a pipe or a
    device."""
    try:
        status = path.lstat() if path.parent == folder else None
    except (OSError, ValueError):  # of a name that is too long, or holds NUL
        return None
    return status.st_size if status and stat.S_ISREG(status.st_mode) else None


def size_below(folder: Path, name: str) -> int | None:
    """size_in of "file" or "sub/file": of a regular file in `folder` or below, with no link or hidden folder on the
    way."""
    parts = Path(name).parts
    if not parts or Path(name).is_absolute() or any(part.startswith(".") for part in parts[:-1]):
        return None
    try:
        if any(folder.joinpath(*parts[:count]).is_symlink() for count in range(1, len(parts))):
            return None
    except (OSError, ValueError):
        return None
    return size_in((folder / name).parent, folder / name)


def obstacle(folder: Path) -> Path | None:
    """What is in the way of writing to a folder, be it there or not: the nearest path above it that exists, if that is
    no folder or lets nothing be written. None if nothing is."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.exists(path))
    return None if there.is_dir() and os.access(there, os.W_OK | os.X_OK) else there
