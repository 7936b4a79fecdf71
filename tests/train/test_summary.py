"""The closing lines of a run."""

import json
from pathlib import Path

from moe_engine.train.summary import write_summary


def test_more_steps_are_more_than_there_are(tmp_path: Path) -> None:
    """Also where a run was told to train fewer than its checkpoint has."""
    row = {"loss": 2.0, "lm_loss": 2.0, "expert_load": [], "moe_layers": []}
    rows = (json.dumps(row | {"step": step}) + "\n" for step in (1, 20))
    (tmp_path / "metrics.jsonl").write_text("".join(rows))
    lines = write_summary(tmp_path)
    assert f"more steps   --out {tmp_path} --resume auto --steps 40" in lines and (tmp_path / "loss.png").is_file()
