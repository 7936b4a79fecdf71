"""What a run says while it runs: rank-0 console, metrics.jsonl, TensorBoard. report.py reads it back.

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
import math
import sys
import time
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self, TextIO

TAGS = {"lr": "learning_rate"}  # of scalars that are not called by their own names
LABELS = {"lm_loss": "LM:", "routing_supervision_loss": "Routing Loss:"}  # likewise, on the console
COLLAPSE, IMBALANCE = 0.4, 2.0  # of the fair share 1/E: 5 % and 25 % of the assignments at E = 8


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
        scalars = {k: v for k, v in _flatten(row).items() if k != "step"}
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
            self._files[name].write(json.dumps(_json_safe(row), allow_nan=False) + "\n")
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


def printable(text: str) -> str:
    """`text` on one line, with control, format and line-separator characters written as escapes (`\\x1b`, `\\n`)."""
    bad = {"Cc", "Cf", "Cs", "Zl", "Zp"}
    return "".join(c.encode("unicode_escape").decode() if unicodedata.category(c) in bad else c for c in text)


def load_entropy(share_E: Sequence[float]) -> float:
    """Entropy -sum p ln p of one layer's load shares, in nats; ln E when the load is uniform (S1.30)."""
    return -sum(p * math.log(p) for p in share_E if p > 0)


def load_max_over_mean(share_E: Sequence[float]) -> float:
    """Load of the busiest expert over the mean load: 1 when uniform, E when one expert gets everything."""
    return max(share_E) * len(share_E)


def load_warnings(shares: Sequence[Sequence[float]], layers: Sequence[int] | None = None) -> list[str]:
    """One text for each expert whose share of the assignments is out of bounds (S1.31).

    `shares[i][e]` is the share of layer `layers[i]` (default i) that expert e received; a layer sums to 1. The bounds
    of S1.31, < 5 % (collapse) and > 25 % (imbalance), are for 8 experts; for E experts they are 0.4/E and 2/E, which is
    the same at 8. With top-k no expert can receive more than 1/k, so imbalance cannot be reported when E <= 2k.
    """
    found = []
    for layer, share_E in zip(layers or range(len(shares)), shares):
        count = len(share_E)
        if abs(sum(share_E) - 1) > 1e-3:  # no token was routed
            continue
        for expert, share in enumerate(share_E):
            fair, name = share * count, f"layer {layer} expert {expert} receives {100 * share:.2f} % of the assignments"
            if fair < COLLAPSE - 1e-6:
                found.append(f"{name} (< {100 * COLLAPSE / count:.3g} %: collapse)")
            elif fair > IMBALANCE + 1e-6:
                found.append(f"{name} (> {100 * IMBALANCE / count:.3g} %: imbalance)")
    return found


def with_load_statistics(row: dict[str, Any]) -> dict[str, Any]:
    """`row` with per-layer lists `moe_layers`, `load_entropy`, `load_max_over_mean` added if it has `expert_load`."""
    shares = row.get("expert_load")
    if not shares:
        return row
    derived = {
        "moe_layers": list(range(len(shares))),
        "load_entropy": [load_entropy(share_E) for share_E in shares],
        "load_max_over_mean": [load_max_over_mean(share_E) for share_E in shares],
    }
    return {**derived, **row}


def step_scalars(row: dict[str, Any]) -> dict[str, float]:
    """TensorBoard tags and values of one row of metrics.jsonl."""
    layers = row.get("moe_layers", ())
    scalars: dict[str, float] = {}
    for key, value in row.items():
        if isinstance(value, dict):
            tag = "domain/{}/loss" if key == "domain_loss" else f"train/{key}/{{}}"
            scalars |= {tag.format(name): each for name, each in value.items()}
        elif isinstance(value, int | float) and key != "step":
            scalars[f"train/{TAGS.get(key, key)}"] = value
        elif isinstance(value, list) and len(value) == len(layers) and not key.endswith("layers"):
            if any(isinstance(each, list) for each in value):
                continue
            scalars |= {f"moe/layer_{layer}/{key}": each for layer, each in zip(layers, value)}
    return scalars


def progress_line(
    row: dict[str, Any], total_steps: int, eta: float | None = None, minimised: Sequence[str] = ("lm_loss",)
) -> str:
    """The console line of one step; fields that the row lacks are left out. Opens as S1.19 asks: Step, Loss, LR."""
    parts = [f"Step {row['step']}/{total_steps}"]
    for key, form in (
        ("loss", "Loss: {:.4f}"),
        ("lr", "LR: {:.3e}"),
        *((name, f"{LABELS.get(name, name)} {{:.4f}}") for name in minimised),
        ("grad_norm", "grad norm {:.3f}"),
        ("tokens_per_s", "{:,.0f} tok/s"),
    ):
        if row.get(key) is not None:
            parts.append(form.format(row[key]))
    if row.get("mfu") is not None:
        parts.append(f"MFU {100 * row['mfu']:.1f} %")
    if row.get("load_max_over_mean"):
        parts.append(f"load max/mean {max(row['load_max_over_mean']):.2f}")
    if sum(row.get("dropped", ())):
        parts.append(f"dropped {sum(row['dropped']):,.0f}")
    if eta is not None:
        minutes, seconds = divmod(round(eta), 60)
        parts.append(f"ETA {minutes // 60}:{minutes % 60:02}:{seconds:02}")
    return " | ".join(parts)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl or eval.jsonl, oldest first; lines torn by a crash are left out."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def _flatten(row: dict[str, Any], prefix: str = "") -> dict[str, float]:
    flat: dict[str, float] = {}
    for key, value in row.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}/")
        elif isinstance(value, int | float):
            flat[prefix + key] = value
    return flat


def _json_safe(value: Any) -> Any:
    """`value` with NaN and infinities as null: JSON has no other word for them."""
    if isinstance(value, dict):
        return {str(key): _json_safe(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_safe(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
