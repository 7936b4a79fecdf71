"""Signals to a run as a cluster sends them: what was done is saved, and the exit code says that the run may go on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moe_engine.checkpoint.folders import steps_in
from moe_engine.log.rows import read_rows
from tests.launch.test_pretrain_moe import ROOT, SCRIPT, tokens  # noqa: F401 (a fixture)

SMALL = ("--seq-length", "16", "--micro-batch", "1", "--set", "train.log_every=1")


class Started:
    """A run in a session of its own."""

    def __init__(self, out: Path, data: Path, *arguments: str, ranks: int = 0) -> None:
        start = ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks)] if ranks else []
        command = [sys.executable, *start, SCRIPT, *SMALL, "--out", str(out), "--data", str(data), *arguments]
        environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
        self.out = out
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def rows(self) -> list[int]:
        path = self.out / "metrics.jsonl"
        return [row["step"] for row in read_rows(path)] if path.is_file() else []

    def wait_for_step(self, step: int) -> None:
        until = time.monotonic() + 120
        while max(self.rows(), default=0) < step:
            assert self.process.poll() is None and time.monotonic() < until, self.process.communicate()
            time.sleep(0.02)

    def end(self, timeout: float = 60) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=timeout)
        until = time.monotonic() + 15
        while _alive(self.process.pid):
            assert time.monotonic() < until, "a process was left behind"
            time.sleep(0.1)
        return self.process.returncode, out, err


def _alive(session: int) -> bool:
    try:
        os.killpg(session, 0)
    except ProcessLookupError:
        return False
    return True


def test_told_to_stop_and_to_save(tmp_path: Path, tokens: Path):  # noqa: F811
    run = Started(tmp_path, tokens, "--steps", "100000")
    run.wait_for_step(2)
    os.kill(run.process.pid, signal.SIGUSR1)
    until = time.monotonic() + 30
    while not steps_in(tmp_path / "checkpoints"):
        assert time.monotonic() < until
        time.sleep(0.02)
    run.wait_for_step(steps_in(tmp_path / "checkpoints")[0] + 1)  # it goes on
    for _ in range(3):  # once more changes nothing
        os.kill(run.process.pid, signal.SIGTERM)
    code, out, err = run.end()
    steps = run.rows()
    assert code == 75, err
    assert f"told to stop: step {steps[-1]} is saved, --resume auto goes on" in out and "Traceback" not in err
    saved = steps_in(tmp_path / "checkpoints")
    assert saved[-1] == steps[-1] and len(saved) == 2
    more = Started(tmp_path, tokens, "--steps", str(steps[-1] + 2), "--resume", "auto")
    code, out, err = more.end()
    assert code == 0 and f"resumed from {tmp_path}/checkpoints/step-{steps[-1]:08d}" in out, err
    assert more.rows() == list(range(1, steps[-1] + 3))


def test_told_to_stop_before_the_first_step(tmp_path: Path, tokens: Path):  # noqa: F811
    run = Started(tmp_path, tokens, "--steps", "100000")
    until = time.monotonic() + 60
    while not (tmp_path / "lock").is_file():  # torch is not loaded yet
        assert time.monotonic() < until
        time.sleep(0.01)
    os.kill(run.process.pid, signal.SIGTERM)
    code, out, err = run.end()
    assert code == -signal.SIGTERM or (code == 75 and "told to stop before the first step" in out), (code, err)
    assert run.rows() == [] and "Traceback" not in err


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["one rank", "launcher"])
def test_ranks_stop_together(tmp_path: Path, tokens: Path, whom: str):  # noqa: F811
    run = Started(tmp_path, tokens, "--steps", "100000", "--ep", "2", ranks=4)
    run.wait_for_step(3)
    os.kill(_ranks(run.process.pid)[2] if whom == "one rank" else run.process.pid, signal.SIGTERM)
    _, out, err = run.end()
    assert "told to stop: step" in out and (("exitcode" in err and "75" in err) or whom == "launcher")
    assert steps_in(tmp_path / "checkpoints")[-1] == run.rows()[-1]


@pytest.mark.slow
def test_no_rank_outlives_the_launcher(tmp_path: Path, tokens: Path):  # noqa: F811
    run = Started(tmp_path, tokens, "--steps", "100000", ranks=2)
    run.wait_for_step(1)
    os.kill(run.process.pid, signal.SIGKILL)
    run.end()


@pytest.mark.slow
def test_a_frozen_rank_ends_the_run(tmp_path: Path, tokens: Path):  # noqa: F811
    run = Started(tmp_path, tokens, "--steps", "100000", "--step-timeout", "5", ranks=2)
    run.wait_for_step(2)
    frozen = _ranks(run.process.pid)[1]
    os.kill(frozen, signal.SIGSTOP)
    _, _, err = run.end(timeout=90)  # torchrun waits 30 s for the frozen rank before it kills it
    assert "error: rank 0: no progress for 5 s" in err and "rank 1 does not answer" in err


def _ranks(launcher: int) -> list[int]:
    """Processes of the ranks, in rank order: the launcher's children."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    ranks = {}
    for pid in map(int, children):
        environment = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
        rank = next((entry for entry in environment if entry.startswith("RANK=")), None)
        if rank:
            ranks[int(rank.removeprefix("RANK="))] = pid
    return [ranks[rank] for rank in sorted(ranks)]
