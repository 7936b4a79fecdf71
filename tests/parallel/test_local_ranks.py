"""Local ranks answer in order, report the first failure, and leave no process behind."""

import multiprocessing
import os
import time

import pytest
import torch.distributed as dist

from moe_engine.parallel.local_ranks import run_on_ranks


def test_results_come_in_rank_order():
    assert run_on_ranks(lambda rank, x: (rank, x, dist.get_world_size(), os.environ["WORLD_SIZE"]), 3, "a") == [
        (0, "a", 3, "3"), (1, "a", 3, "3"), (2, "a", 3, "3"),
    ]  # fmt: skip


def test_failure_names_the_rank_and_shows_its_traceback():
    def fail(rank: int) -> None:
        if rank == 1:
            raise KeyError("lost key")
        dist.barrier()  # never completed: the others have to be ended

    with pytest.raises(RuntimeError, match=r"rank 1 of 2: Traceback(.|\n)*KeyError: 'lost key'"):
        run_on_ranks(fail, 2)
    assert multiprocessing.active_children() == []


def test_death_and_silence_are_failures():
    with pytest.raises(RuntimeError, match=r"rank \d of 2: the process died"):
        run_on_ranks(lambda rank: os._exit(3), 2)
    with pytest.raises(RuntimeError, match=r"ranks \[0\] did not answer within 0\.5 s"):
        run_on_ranks(lambda rank: time.sleep(60), 1, timeout=0.5)
    assert multiprocessing.active_children() == []
