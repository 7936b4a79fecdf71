"""What a run leaves its user with: the loss curve as a picture, the experts' load, and where to go from here."""

from pathlib import Path

from moe_engine.log import read_rows
from moe_engine.report import expert_load_table, loss_curve_png


def write_summary(out: Path) -> list[str]:
    """Draw `out`/loss.png and return the closing lines; the main rank calls it after the last step."""
    if not (out / "metrics.jsonl").is_file():
        return []  # nothing was trained here
    picture = out / "loss.png"
    loss_curve_png(out / "metrics.jsonl", picture)
    last = read_rows(out / "metrics.jsonl")[-1]
    held_out = read_rows(out / "eval.jsonl") if (out / "eval.jsonl").is_file() else []
    lines = ["", f"loss at step {last['step']}: {last['lm_loss']:.4f} nats per token (training)"]
    if held_out:
        lines.append("held-out loss: " + " -> ".join(f"{row['loss']:.4f}" for row in held_out) + " nats per token")
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
