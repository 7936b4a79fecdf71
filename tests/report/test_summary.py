"""The closing lines of a run."""

import json
from pathlib import Path

import pytest

from moe_engine.report.summary import write_summary


def test_more_steps_are_more_than_there_are(tmp_path: Path) -> None:
    """Also where a run was told to train fewer than its checkpoint has."""
    row = {"loss": 2.0, "lm_loss": 2.0, "expert_load": [], "moe_layers": []}
    rows = (json.dumps(row | {"step": step}) + "\n" for step in (1, 20))
    (tmp_path / "metrics.jsonl").write_text("".join(rows))
    lines = write_summary(tmp_path)
    assert f"more steps   --out {tmp_path} --resume auto --steps 40" in lines and (tmp_path / "loss.png").is_file()


@pytest.mark.parametrize("lines", ["", "torn"])
def test_case_16_nothing_was_trained(tmp_path: Path, lines: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(lines)
    assert write_summary(tmp_path) == [] and not (tmp_path / "loss.png").exists()


def test_case_16_a_last_step_that_was_skipped(tmp_path: Path) -> None:
    """Its loss is null in the files: that must not be what a finished run ends with."""
    row = {"step": 2, "loss": None, "lm_loss": None, "expert_load": [], "moe_layers": []}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "eval.jsonl").write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": null}\n')
    lines = write_summary(tmp_path)
    assert "loss at step 2: not finite nats per token (training)" in lines
    assert "held-out loss: 3.0000 -> not finite nats per token" in lines
