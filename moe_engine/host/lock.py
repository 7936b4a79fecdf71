"""One run at a time in an --out: the main rank holds a lock on `out/lock` as long as it lives.

The system lets go of the lock when the process ends, however it ends, so nothing has to be cleaned up.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import TextIO

from moe_engine.errors import ConfigError


def lock(out: Path) -> TextIO | None:
    """Hold `out`, an existing folder, until the returned file is closed; None where the file system knows no locks.

    ConfigError names the process that holds it.
    """
    path = out / "lock"
    try:
        file = path.open("a+")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; move it away, or choose another --out") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = _holder(file)
        file.close()
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise ConfigError(
                f"--out {out} is in use by {holder}: two runs would overwrite each other; end that one or choose "
                "another --out"
            ) from None
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            return None
        raise
    said = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    with contextlib.suppress(OSError):  # on a full disk the lock holds all the same, only without a name
        os.truncate(path, 0)
        os.write(file.fileno(), json.dumps(said).encode())
    return file


def _holder(file: TextIO) -> str:
    file.seek(0)
    try:
        said = json.loads(file.read())
        return f"process {said['pid']} on {said['host']} since {said['since']}"
    except (ValueError, KeyError, TypeError):
        return "another process"
