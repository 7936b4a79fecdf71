"""A run that stands still ends itself, and every rank that can speak says who is to blame."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from moe_engine.host.watch import State, Watch, culprits
from moe_engine.parallel.collectives import sum_
from moe_engine.parallel.local_ranks import run_on_ranks
from moe_engine.parallel.mesh import build_mesh


def run_watched(folder: Path, world: int, hold_up: Callable[[int], None], timeout: float = 2.0) -> list[list[int]]:
    """Two collectives, before the second of which some rank is held up; the codes that each rank would end with."""

    def on_rank(rank: int) -> list[int]:
        mesh, codes = build_mesh(world, 1, 1), []
        store = dist.FileStore(str(folder / "watch"), world)
        with Watch(store, rank, world, timeout, folder, end=codes.append) as watch:
            watch.heartbeat(7, "training")
            sum_(torch.ones(1), mesh.world)
            hold_up(rank)
            sum_(torch.ones(1), mesh.world)
        return codes

    return run_on_ranks(on_rank, world)


def test_a_rank_that_sleeps_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    codes = run_watched(tmp_path, 3, lambda rank: time.sleep(7) if rank == 1 else None)
    said = capfd.readouterr().err
    assert codes == [[70]] * 3
    for rank in range(3):
        (line,) = [line for line in said.splitlines() if line.startswith(f"error: rank {rank}: no progress for 2 s at")]
        assert "step 7, training" in line and "rank 1 is in" in line and "--resume auto" in line
        assert ("parallel/collectives.py" in line.partition("; ")[0]) == (rank != 1)
        assert "in sum_" in (tmp_path / f"hang-rank-{rank:05d}.txt").read_text() or rank == 1


def test_a_rank_that_is_stopped_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    def stop(rank: int) -> None:
        if rank == 0:
            time.sleep(0.6)  # long enough to have said where it is
            subprocess.Popen(["sh", "-c", f"sleep 8; kill -CONT {os.getpid()}"])
            os.kill(os.getpid(), signal.SIGSTOP)

    codes = run_watched(tmp_path, 3, stop)
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: rank")]
    assert codes[1:] == [[70], [70]]
    for rank in (1, 2):
        (line,) = [line for line in said if line.startswith(f"error: rank {rank}")]
        assert "rank 0 does not answer (last at step 7, training)" in line


def test_slow_is_not_still(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    """Steps that take most of the time-out, and one rank that is late again and again."""

    def on_rank(rank: int) -> list[int]:
        mesh, codes = build_mesh(2, 1, 1), []
        store = dist.FileStore(str(tmp_path / "watch"), 2)
        with Watch(store, rank, 2, 1.5, tmp_path, end=codes.append) as watch:
            for step in range(5):
                watch.heartbeat(step, "training")
                time.sleep(0.5 * rank)
                sum_(torch.ones(1), mesh.world)
        return codes

    assert run_on_ranks(on_rank, 2) == [[], []] and "error" not in capfd.readouterr().err


class Gone(dist.HashStore):
    """A store whose host has left."""

    def set(self, *arguments: object) -> None:
        raise RuntimeError("Connection reset by peer")

    check = set


def test_a_store_that_is_gone_does_not_silence_the_watch(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    codes: list[int] = []
    with Watch(Gone(), 0, 2, 0.5, tmp_path, end=codes.append) as watch:
        watch.heartbeat(3, "training")
        time.sleep(1.5)
    assert codes == [70]
    assert "at step 3, training" in (said := capfd.readouterr().err) and "cannot be asked (Connection reset" in said


def test_no_time_out_no_thread(tmp_path: Path):
    with Watch(dist.HashStore(), 0, 1, 0.0, tmp_path) as watch:
        assert not watch.thread.is_alive()


@pytest.mark.parametrize(
    ("states", "wanted"),
    [
        ({0: State(5, "training", 1, "a"), 1: None}, "rank 1 does not answer (and never has)"),
        (
            {0: State(5, "training", 1, "a"), 1: State(4, "saving", 99, "b")},
            "rank 1 does not answer (last at step 4, sav",
        ),
        ({0: State(5, "training", 1, "a"), 1: State(5, "training", 1)}, "rank 1 still moves"),
        (
            {r: State(5, "training", 1, "other" if r == 2 else "usual") for r in range(4)},
            "rank 2 is in other; the others are in usual",
        ),
        ({r: State(5, "training", 1, "same") for r in range(4)}, "all ranks are in same"),
    ],
)
def test_who_is_to_blame(states: dict[int, State | None], wanted: str):
    assert wanted in culprits(states, silence=10)
