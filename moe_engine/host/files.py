"""Which files may be read when a manifest names them: its neighbours, and nothing that only has a file's name."""

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
