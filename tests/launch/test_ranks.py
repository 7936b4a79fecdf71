"""What a rank leaves behind when it ends: torchrun's own reader and report are the oracle."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from launch.ranks import ending, hang
from moe_engine.config.messages import refuse
from moe_engine.errors import ConfigError, DataError, EngineError, Preempted, StorageError

ROOT = Path(__file__).parents[2]


def raising(error: Exception) -> Callable[[], object]:
    def work() -> None:
        raise error

    return work


def exit_code(work: Callable[[], object], rank: int) -> int:
    with ending(rank) as end:
        work()
    return end.code


def report(path: Path, code: int) -> str:
    """What torchrun prints of a rank that left `path` and ended with `code`."""
    return ChildFailedError("x", {0: ProcessFailure(0, 1, code, str(path))}).format_msg()


@pytest.fixture
def left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    monkeypatch.setattr("launch.ranks.PATIENCE", 0.0)
    return tmp_path / "error.json"


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("kind", [ConfigError, DataError, StorageError, EngineError, Preempted])
def test_case_17_torchrun_reports_our_message(
    kind: type[EngineError], rank: int, left: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = exit_code(raising(kind("found 3,\x1b expected 4")), rank)
    assert code == kind.exit_code
    assert f"traceback : {kind.__name__}: found 3,\\x1b expected 4\n" in report(left, code)
    assert not list(left.parent.glob("*.tmp"))
    assert "Traceback" not in capsys.readouterr().err


def test_case_17_a_list_of_problems_stays_one(left: Path) -> None:
    def work() -> None:
        refuse(["train.steps: found -1", "train.seed: found x"])

    assert exit_code(work, 0) == 78
    assert "\n    - train.steps: found -1\n    - train.seed: found x\n" in report(left, 78)


def test_case_17_what_was_not_expected_comes_with_its_traceback(left: Path) -> None:
    def work() -> None:
        {}["missing"]

    assert exit_code(work, 1) == 70
    said = report(left, 70)
    assert 'test_ranks.py", line' in said and "KeyError: 'missing'" in said and "rank 1 ends: KeyError" in said


def test_case_17_a_hang_is_reported_too(left: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hang("rank 0: no progress for 5 s")
    assert "traceback : rank 0: no progress for 5 s\n" in report(left, 70)
    assert capsys.readouterr().err == "error: rank 0: no progress for 5 s\n"


def test_case_17_a_file_that_cannot_be_written_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in ("", str(tmp_path / "no" / "error.json"), "/dev/full/x"):
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", path)
        assert exit_code(raising(DataError("no text")), 0) == 65
        assert capsys.readouterr().err == "error: no text\n"
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE")
    assert exit_code(lambda: None, 0) == 0 and not list(tmp_path.iterdir())


LOSING = """
import os, sys
sys.path.insert(0, {root!r})
import torch
import torch.distributed as dist
from launch.ranks import ending

rank = int(os.environ["RANK"])
with ending(rank) as end:
    dist.init_process_group("gloo")
    dist.all_reduce(torch.ones(1))
    if rank == 1:
        raise ValueError("the rank that knows why")
    dist.all_reduce(torch.ones(1))
sys.exit(end.code)
"""


@pytest.mark.slow
def test_case_17_the_root_cause_is_the_rank_that_ended_first(tmp_path: Path) -> None:
    """Rank 0 only lost its peer: it must not be the one that torchrun blames."""
    (tmp_path / "losing.py").write_text(LOSING.format(root=str(ROOT)))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(tmp_path / "losing.py")]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    root = done.stderr.partition("Root Cause")[2]
    assert "ValueError: the rank that knows why" in root and "rank      : 1" in root, done.stderr
