"""Standard output and error that outlast their readers: a program finishes its work when nobody takes what it prints.

    | head         the reader has enough: the rest is dropped, and the exit code is that of the work
    > /dev/full    the disk takes no more: one warning; a program that was run to print ends with code 74
    >&-            closed from the start: as > /dev/null

One semantics for all tools and launchers: otherwise `tool | head` ends with this code or that by who was faster.
"""

import contextlib
import errno
import io
import os
import select
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from moe_engine.config.messages import BULLET
from moe_engine.errors import EngineError, StorageError
from moe_engine.text import printable

NAMES = {1: "stdout", 2: "stderr"}


class Outlet(io.FileIO):
    """The raw side of a standard stream. After the first write that fails it takes everything and writes nothing."""

    lost: OSError | None = None

    def write(self, data: Any, /) -> int:
        """Bytes written: all of them, as far as the caller sees, once a write has failed. Never raises OSError."""
        while self.lost is None:
            try:
                written = super().write(data)
                if written is not None:
                    return written
                select.select([], [self], [])  # full, and left non-blocking by another program
            except OSError as error:
                self.lost = error
                if error.errno != errno.EPIPE:
                    self._warn(error)
        return memoryview(data).nbytes

    def _warn(self, error: OSError) -> None:
        here = self.fileno()
        text = f"warning: {NAMES[here]}: {error.strerror}; nothing more is printed there\n"
        with contextlib.suppress(OSError):
            os.write(2 if here == 1 else 1, text.encode())


def outlast_readers() -> None:
    """Make sys.stdout and sys.stderr, unless redirected, streams that never raise OSError or UnicodeEncodeError."""
    while (spare := os.open(os.devnull, os.O_RDWR)) <= 2:  # one was closed: the next file would get its number
        pass
    os.close(spare)
    for descriptor, name in NAMES.items():
        old = getattr(sys, name)
        if old is not getattr(sys, f"__{name}__"):  # somebody in this process reads it
            continue
        raw = Outlet(descriptor, "w", closefd=False)
        stream = io.TextIOWrapper(
            io.BufferedWriter(raw),
            encoding=getattr(old, "encoding", "utf-8"),
            errors="backslashreplace",
            line_buffering=name == "stderr" or raw.isatty(),
            write_through=getattr(old, "write_through", False),
        )
        setattr(sys, name, stream)


def run_program(main: Callable[[], int], prints: bool = True) -> NoReturn:
    """Run `main` and exit with its code. prints: what it prints is what it is run for, and losing it is code 74."""
    outlast_readers()
    try:
        code: Any = main()
    except SystemExit as end:  # --help
        code = end.code
    sys.stdout.flush()
    lost = getattr(getattr(getattr(sys.stdout, "buffer", None), "raw", None), "lost", None)
    if prints and lost and lost.errno != errno.EPIPE:
        code = code or StorageError.exit_code
    sys.exit(code)


def print_error(text: str) -> None:
    """One line on standard error, in one piece, or the lines of several ranks run into each other."""
    sys.stderr.write(f"error: {text}\n")
    sys.stderr.flush()


def failed(error: EngineError) -> int:
    """Say why a tool ends; its exit code."""
    print_error(on_lines(error))
    return error.exit_code


def on_lines(error: EngineError) -> str:
    """An error's text as it is printed: problems of a list on lines of their own, all else escaped."""
    return BULLET.join(map(printable, str(error).split(BULLET)))
