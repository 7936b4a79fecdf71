"""What is said when a run has ended, read back from its files: the loss curve as a PNG, the expert load as a table.

matplotlib is imported where the curve is drawn; no display is needed.
"""

import math
from collections.abc import Sequence
from pathlib import Path

from moe_engine.log.load import load_entropy, load_max_over_mean
from moe_engine.log.rows import read_rows


def loss_curve_png(metrics_path: Path, out_png: Path) -> None:
    """Draw the loss of each step, and of each evaluation in the eval.jsonl beside `metrics_path`, into a PNG file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss (nats per token)")
    evals = metrics_path.with_name("eval.jsonl")
    for path, key, style in ((metrics_path, "lm_loss", "-"), (evals, "loss", "o--")):
        rows = [row for row in read_rows(path) if row.get(key) is not None] if path.exists() else []
        if rows:
            name = "train, language-model loss" if path == metrics_path else "held out"
            axes.plot([row["step"] for row in rows], [row[key] for row in rows], style, label=name, linewidth=1)
    if axes.lines:
        axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(out_png, dpi=120)


def expert_load_table(shares: Sequence[Sequence[float]], layers: Sequence[int] | None = None) -> str:
    """Text table, a row per layer: each expert's share of the assignments in percent, entropy / ln E, max/mean."""
    width = max((len(share_E) for share_E in shares), default=0)
    lines = ["layer " + "".join(f"{f'e{e}':>6}" for e in range(width)) + "  entropy  max/mean"]
    for layer, share_E in zip(layers or range(len(shares)), shares):
        cells = "".join(f"{100 * share:6.1f}" for share in share_E) + " " * 6 * (width - len(share_E))
        relative = load_entropy(share_E) / math.log(len(share_E)) if len(share_E) > 1 else 1.0
        lines.append(f"{layer:5} {cells}  {relative:7.3f}  {load_max_over_mean(share_E):8.2f}")
    return "\n".join(lines)
