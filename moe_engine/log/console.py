"""The progress line."""

from collections.abc import Sequence
from typing import Any

LABELS = {
    "lm_loss": "LM:",
    "routing_supervision_loss": "Routing Loss:",
}  # of numbers that are not called by their own names


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
