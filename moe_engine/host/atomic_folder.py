"""A folder that is whole or not there: it is written as OUT.partial and renamed when the block ends well."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from moe_engine.errors import ConfigError, StorageError
from moe_engine.host import disk


@contextlib.contextmanager
def atomic_folder(out: Path) -> Iterator[Path]:
    """A folder to write into that becomes `out`, replacing what was there, or is removed when the block fails.

    ConfigError when it cannot be made or another process writes to it; StorageError when the disk fails.
    """
    partial = out.with_name(f"{out.name}.partial")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        lock = os.open(partial, os.O_RDONLY)
    except OSError as error:
        raise ConfigError(f"{out}: cannot be written ({error.strerror}); choose another output folder") from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(lock), partial.stat()):
                raise BlockingIOError
        except OSError:
            raise ConfigError(f"{out}: another preparation is writing to it; wait or choose another folder") from None
        try:
            for left_over in partial.iterdir():
                disk.remove(left_over)
            yield partial
            disk.remove(out)
            disk.publish(partial, out)
        except OSError as error:
            raise StorageError(f"{error.filename or out}: {error.strerror}; nothing was written to {out}") from None
        finally:
            with contextlib.suppress(StorageError):
                disk.remove(partial)
    finally:
        os.close(lock)
