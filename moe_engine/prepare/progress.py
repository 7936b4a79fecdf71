"""How far a preparation is: a bar on a terminal, a plain line every ten seconds elsewhere, both on standard error."""

import sys
import time
from typing import Any, Self

from moe_engine.text import printable

PLAIN_SECONDS = 10.0
SHOWN_BAD_ROWS = 20


class Progress:
    """Counts input bytes against `total` and the tokens made of them. `quiet` shows nothing but bad rows."""

    def __init__(self, total: int, quiet: bool = False) -> None:
        self.total, self.quiet = max(total, 1), quiet
        self.size = self.tokens = self.bad_rows = 0
        self.start = self.last = time.monotonic()
        self.bar: Any = None

    def __enter__(self) -> Self:
        if not self.quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (BarColumn(), DownloadColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
            self.bar = Bar(*columns, console=Console(stderr=True), transient=True)
            self.bar.add_task("", total=self.total)
            self.bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self.bar is not None:
            self.bar.stop()
        if self.bad_rows > SHOWN_BAD_ROWS:
            print(f"{self.bad_rows - SHOWN_BAD_ROWS} more bad rows, listed in bad_rows.jsonl", file=sys.stderr)
        if exc[0] is None and not self.quiet:
            print(self._line("prepared"), file=sys.stderr)

    def advance(self, size: int, tokens: int) -> None:
        """`size` more bytes of input were read and gave `tokens` tokens."""
        self.size, self.tokens = self.size + size, self.tokens + tokens
        if self.bar is not None:
            self.bar.update(0, completed=min(self.size, self.total), description=self._line("tokenising"))
        elif not self.quiet and time.monotonic() - self.last >= PLAIN_SECONDS:
            self.last = time.monotonic()
            print(self._line(f"{min(self.size / self.total, 1):.0%} tokenised"), file=sys.stderr, flush=True)

    def bad_row(self, text: str) -> None:
        """Shows the first bad rows; the rest is counted."""
        self.bad_rows += 1
        if self.bad_rows <= SHOWN_BAD_ROWS:
            show = self.bar.console.print if self.bar is not None else lambda line, **_: print(line, file=sys.stderr)
            show(printable(f"skipped {text}"), markup=False, highlight=False)  # rows may hold [brackets]

    def _line(self, verb: str) -> str:
        rate = self.tokens / max(time.monotonic() - self.start, 1e-9)
        return f"{verb} {self.tokens:,} tokens at {rate:,.0f} tokens/s"
