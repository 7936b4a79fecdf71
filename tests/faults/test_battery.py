"""The battery notices what it is there to notice: each part finds an engine that was broken on purpose."""

from pathlib import Path

import pytest
import torch

from moe_engine.checkpoint import find, save
from moe_engine.checkpoint.folders import prune, publish_step, steps_in
from moe_engine.host.signals import Requests
from moe_engine.train import state
from tests.faults.__main__ import main
from tests.faults.arena import Arena
from tests.faults.battery import BATTERY


def failures(tmp_path: Path, name: str, count: int) -> list[str]:
    outcomes = list(BATTERY[name].inject(Arena(tmp_path), count))
    assert len(outcomes) >= count
    return [outcome for outcome in outcomes if outcome]


def test_rows_and_the_last_line(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    assert main(["--only", "C5,C4", "--count", "4", "--json", str(tmp_path / "rows.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("C5      the disk says no") and lines[1].split()[-3:-1] == ["4", "0"]
    assert lines[-1] == "injections 8, failures 0"
    with pytest.raises(SystemExit):
        main(["--only", "Z9"])
    assert "found id 'Z9', expected some of A1" in capsys.readouterr().err


def test_every_id_is_in_a_tier():
    assert all(fault.nightly for fault in BATTERY.values())
    assert {"A1", "A2", "B1", "C1", "E1", "E2", "E3", "E4", "F1", "F2", "F3", "F4", "F5", "G1", "G2", "G3", "G5"} <= {
        name for name, fault in BATTERY.items() if fault.ci
    }


def test_checksums_that_nobody_compares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(find, "problems_of", lambda *arguments: [])
    assert failures(tmp_path, "C1", 4)


@pytest.mark.slow
def test_the_old_checkpoint_removed_before_the_new_one_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def in_the_wrong_order(temporary: Path, final: Path) -> None:
        for step in steps_in(final.parent):
            save.disk.remove(save.folder_of(final.parent, step))
        publish_step(temporary, final)

    monkeypatch.setattr(save, "publish_step", in_the_wrong_order)
    monkeypatch.setattr(save, "prune", lambda *arguments: prune(arguments[0], 0, 0))
    assert any("no checkpoint is left" in found for found in failures(tmp_path, "A2", 40))


def test_expert_biases_that_do_not_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """FlagScale #412: the resumed run is not the untouched one."""
    real = state.Checkpoint.extra

    def forget(self: state.Checkpoint, rank: int) -> dict[str, torch.Tensor]:
        found = real(self, rank)
        return {name: torch.zeros_like(t) if name.startswith("expert_bias") else t for name, t in found.items()}

    monkeypatch.setattr(state.Checkpoint, "extra", forget)
    assert any("the next step differs" in found for found in failures(tmp_path, "E4", 4))


@pytest.mark.slow
def test_a_random_state_that_does_not_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch, "set_rng_state", lambda value: None)
    found = failures(tmp_path, "B2", 4)
    assert any("another batch, state or random state" in text for text in found)


@pytest.mark.slow
def test_a_signal_that_nobody_hears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Requests, "_stop", lambda *arguments: None)
    monkeypatch.setattr("tests.faults.preemption.GRACE", 5.0)
    assert failures(tmp_path, "B2", 2)
