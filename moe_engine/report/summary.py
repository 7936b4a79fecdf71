"""What a run leaves its user with: the loss curve as a picture, the experts' load, and where to go from here."""

from pathlib import Path

from moe_engine.log.rows import read_rows
from moe_engine.report.curve import expert_load_table, loss_curve_png


def write_summary(out: Path) -> list[str]:
    """Draw `out`/loss.png and return the closing lines; the main rank calls it after the last step."""
    rows = read_rows(out / "metrics.jsonl") if (out / "metrics.jsonl").is_file() else []
    if not rows:
        return []  # nothing was trained here
    picture, last = out / "loss.png", rows[-1]
    loss_curve_png(out / "metrics.jsonl", picture)
    held_out = read_rows(out / "eval.jsonl") if (out / "eval.jsonl").is_file() else []
    lines = ["", f"loss at step {last['step']}: {number(last['lm_loss'])} nats per token (training)"]
    if held_out:
        lines.append("held-out loss: " + " -> ".join(number(row["loss"]) for row in held_out) + " nats per token")
    if last.get("expert_load"):
        lines += ["", *expert_load_table(last["expert_load"], last["moe_layers"]).splitlines()]
    return [
        *lines,
        "",
        f"loss curve   {picture}",
        f"metrics      {out / 'metrics.jsonl'}",
        f"TensorBoard  tensorboard --logdir {out / 'tensorboard'} --host 127.0.0.1",
        f"checkpoint   {out / 'checkpoints'}",
        f"more steps   --out {out} --resume auto --steps {2 * last['step']}",
        "your text    tools/prepare_data.py --help, then --data FOLDER",
    ]


def number(loss: float | None) -> str:
    """As printed; None is JSON's word for what was not finite."""
    return "not finite" if loss is None else f"{loss:.4f}"
