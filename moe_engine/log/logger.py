"""What a run says while it runs: rank-0 console, metrics.jsonl, TensorBoard. report/ reads it back.

    row of one step --> metrics.jsonl   one JSON object a line, flushed, cut back on resume
                    --> tensorboard/    the same numbers: train/NAME, domain/NAME/loss, moe/layer_N/NAME
                    --> console         Step i/N | Loss: x | LR: y | ...

A row needs `step`; every other field is optional and documented in docs/metrics.md. `expert_load` holds, per MoE layer,
the share of assignments that each expert received (sums to 1); entropy and max/mean are derived here, in one place.
Only the main rank writes; on every other rank all methods do nothing. Text that came from outside (paths, domain names,
rows) is printed with control characters escaped, so that data cannot move the cursor or forge a line.
"""

import contextlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self, TextIO

from moe_engine.log.console import progress_line
from moe_engine.log.load import load_warnings, with_load_statistics
from moe_engine.log.rows import flatten, json_safe, read_rows, step_scalars
from moe_engine.text import printable


class Logger:
    """Console, metrics.jsonl and TensorBoard of one run; create it on every rank, it speaks on the main one only.

    `out` None keeps everything on the console. A progress line is printed every `log_every` steps (0: none of these)
    and at the last one; on a terminal a live line follows each step. Expert-load warnings come at most once per
    `warn_every` steps and judge the mean load of these steps, not the noise of one. `out` must be writable; it is made
    if it is missing.
    """

    def __init__(
        self,
        out: Path | None,
        is_main: bool,
        total_steps: int,
        quiet: bool = False,
        log_every: int = 1,
        warn_every: int = 50,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.out = out if is_main else None
        self.is_main = is_main
        self.total_steps = total_steps
        self.quiet = quiet or not is_main
        self.log_every = log_every
        self.warn_every = min(warn_every, total_steps)
        self._clock = clock
        self._first: tuple[int, float] | None = None  # step and time of the first row: where the ETA measures from
        self._load_sum: list[list[float]] = []
        self._load_steps = 0
        self._resumed_at: int | None = None
        self._files: dict[str, TextIO] = {}
        self._board: Any = None
        self._live: Any = None
        if self.out is not None:
            self.out.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def info(self, *texts: str) -> None:
        """Print each text as one line on the main rank."""
        if not self.quiet:
            for text in texts:
                self._print(printable(text), sys.stdout)

    def warn(self, *texts: str) -> None:
        """Print each text as one `warning:` line to stderr on the main rank, also when quiet."""
        if self.is_main:
            for text in texts:
                self._print(f"warning: {printable(text)}", sys.stderr)

    def step(self, row: dict[str, Any], minimised: Sequence[str] = ("lm_loss",)) -> None:
        """Record one optimizer step (`row["step"]` counts from 1) on every output, and warn about expert load.

        minimised: the numbers of the row that add up to its loss; the progress line shows them.
        """
        if not self.is_main:
            return
        row = with_load_statistics(row)
        self._append("metrics.jsonl", row)
        self._tensorboard(row["step"], step_scalars(row))
        self._progress(row, minimised)
        self._watch_load(row)

    def eval(self, row: dict[str, Any]) -> None:
        """Record one evaluation: a row of eval.jsonl, `eval/...` tags (nested: `eval/a/b`), one console line."""
        if not self.is_main:
            return
        self._append("eval.jsonl", row)
        scalars = {k: v for k, v in flatten(row).items() if k != "step"}
        self._tensorboard(row["step"], {f"eval/{k}": v for k, v in scalars.items()})
        self.info(f"Eval {row['step']}/{self.total_steps} | " + " | ".join(f"{k}: {v:.4f}" for k, v in scalars.items()))

    def truncate_after(self, step: int) -> None:
        """Drop the rows written after `step`, and a line torn by a crash, so that a resumed run has each row once.

        Call it before the first row; with step 0, a new run in a used directory starts its files afresh.
        """
        if self.out is None:
            return
        assert not self._files, "truncate_after comes before the first row"
        self._resumed_at = step
        for path in (self.out / "metrics.jsonl", self.out / "eval.jsonl"):
            if path.exists():
                kept = [row for row in read_rows(path) if row["step"] <= step]
                short = path.with_suffix(".jsonl.tmp")
                short.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
                short.replace(path)

    def close(self) -> None:
        """Close the files and the live line. Calling it twice is harmless."""
        self._stop_live()
        for file in [*self._files.values(), *([self._board] if self._board else [])]:
            with contextlib.suppress(OSError):  # a full disk must not hide why the run ends
                file.close()
        self._files, self._board = {}, None

    def _print(self, line: str, stream: TextIO) -> None:
        self._stop_live()
        print(line, file=stream, flush=True)

    def _append(self, name: str, row: dict[str, Any]) -> None:
        if self.out is None:
            return
        if name not in self._files:
            self._files[name] = (self.out / name).open("a", encoding="utf-8")
        try:
            self._files[name].write(json.dumps(json_safe(row), allow_nan=False) + "\n")
            self._files[name].flush()
        except OSError as error:  # a full disk must not end the training: the buffer keeps the row for the next flush
            self.warn(f"{self.out / name}: {error}; the row of step {row['step']} waits until there is space")

    def _tensorboard(self, step: int, scalars: dict[str, float]) -> None:
        if self.out is None or self._board is False:
            return
        try:
            if self._board is None:
                from torch.utils.tensorboard import SummaryWriter

                purge = None if self._resumed_at is None else self._resumed_at + 1
                self._board = SummaryWriter(str(self.out / "tensorboard"), purge_step=purge)
            for tag, value in scalars.items():
                self._board.add_scalar(tag, value, step)
        except ImportError:
            self._board = False
            self.warn("tensorboard is not installed: no event file is written (pip install tensorboard)")
        except OSError as error:  # its own thread met it some rows ago
            self._board = False
            self.warn(f"{self.out / 'tensorboard'}: {error}; no more events are written, metrics.jsonl has the numbers")

    def _progress(self, row: dict[str, Any], minimised: Sequence[str]) -> None:
        if self._first is None:
            self._first = (row["step"], self._clock())
        if self.quiet:
            return
        line = progress_line(row, self.total_steps, self._eta(row["step"]), minimised)
        due = self.log_every and row["step"] % self.log_every == 0
        if due or row["step"] == self.total_steps:
            self._print(line, sys.stdout)
        elif sys.stdout.isatty():
            self._show_live(line)

    def _show_live(self, line: str) -> None:
        from rich.live import Live
        from rich.text import Text

        if self._live is None:
            self._live = Live(auto_refresh=False, transient=True, redirect_stdout=False, redirect_stderr=False)
            self._live.start()
            self._live.console.show_cursor(True)  # a killed run must not leave the terminal without a cursor
        self._live.update(Text(line, no_wrap=True, overflow="ellipsis"), refresh=True)

    def _stop_live(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _eta(self, step: int) -> float | None:
        """Seconds left at the mean pace since the first row, evaluations and checkpoints included."""
        assert self._first is not None
        first_step, start = self._first
        if step == first_step:
            return None
        return (self._clock() - start) / (step - first_step) * (self.total_steps - step)

    def _watch_load(self, row: dict[str, Any]) -> None:
        shares = row.get("expert_load")
        if not shares:
            return
        total = self._load_sum or [[0.0] * len(layer) for layer in shares]
        self._load_sum = [[a + b for a, b in zip(old, new)] for old, new in zip(total, shares)]
        self._load_steps += 1
        if self._load_steps < self.warn_every:
            return
        mean = [[value / self._load_steps for value in layer] for layer in self._load_sum]
        found = load_warnings(mean, row.get("moe_layers"))
        if found:
            more = f" (and {len(found) - 3} more like it: see expert_load in metrics.jsonl)" if len(found) > 3 else ""
            self.warn(f"mean of {self._load_steps} steps up to step {row['step']}: " + "; ".join(found[:3]) + more)
        self._load_sum, self._load_steps = [], 0
