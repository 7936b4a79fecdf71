"""Which files may be read when a manifest names them: its neighbours, and nothing that only has a file's name. Where
files can be written, and how many may be open."""

import errno
import os
import resource
import stat
from pathlib import Path

from moe_engine.errors import ConfigError, StorageError


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
    no folder or lets nothing be written, or its own name, if that is too long. None if nothing is."""
    try:
        os.lstat(folder)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return folder
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
    return None if there.is_dir() and os.access(there, os.W_OK | os.X_OK) else there


def make_writable(out: Path) -> None:
    """Make a run's folder; ConfigError or, of a full disk, StorageError when nothing can be written there."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".writable"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        kind = StorageError if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO) else ConfigError
        raise kind(f"--out {out}: {error.strerror}; choose a folder that you can write to") from error


def allow_open_files(needed: int, why: str) -> None:
    """Let this process have `needed` files open, sockets included; ConfigError where the system allows fewer."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft >= needed or soft == resource.RLIM_INFINITY:
        return
    if hard < needed and hard != resource.RLIM_INFINITY:
        raise ConfigError(f"open files: found a limit of {hard}, expected {needed} or more ({why}); raise ulimit -n")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
