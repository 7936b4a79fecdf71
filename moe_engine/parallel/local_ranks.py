"""Run a function on N ranks of this machine: real processes on gloo, forked from this one.

For tests, `tools/verify_layout.py` and measurements. Forking after the imports brings 8 ranks up in a fraction of a
second; torchrun, which users start, pays the imports once per rank.
"""

import multiprocessing
import os
import signal
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def run_on_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 300.0) -> list[Any]:
    """function(rank, *args) on every rank -> the results in rank order.

    The function finds an initialised gloo world. Raises RuntimeError with the first failing rank's traceback, or when
    no rank answers for `timeout` seconds; no process outlives the call.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(
                target=_rank, args=(function, rank, world_size, folder, sender, args), daemon=True
            )
            process.start()
            sender.close()
            pipes.append(receiver)
            processes.append(process)
        try:
            results = _collect(pipes, timeout)
            for process in processes:
                process.join(timeout=5)
            return results
        finally:
            for process in processes:
                if process.is_alive() and process.pid is not None:
                    os.kill(process.pid, signal.SIGKILL)
                process.join()


def _collect(pipes: list[Connection], timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        ready = wait([p for r, p in enumerate(pipes) if r not in results], timeout)
        if not ready:
            missing = [r for r in range(len(pipes)) if r not in results]
            raise RuntimeError(f"ranks {missing} did not answer within {timeout:g} s")
        for pipe in ready:
            rank = pipes.index(pipe)  # pyright: ignore[reportArgumentType]
            try:
                ok, value = pipes[rank].recv()
            except EOFError:
                ok, value = False, "the process died"
            if not ok:
                raise RuntimeError(f"rank {rank} of {len(pipes)}: {value}")
            results[rank] = value
    return [results[rank] for rank in range(len(pipes))]


def _rank(
    function: Callable[..., Any], rank: int, world_size: int, folder: str, sender: Connection, args: tuple
) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))  # as torchrun does
    try:
        store = dist.FileStore(str(Path(folder) / "store"), world_size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
        sender.send((True, function(rank, *args)))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:  # whatever it was, the parent reports it
        sender.send((False, traceback.format_exc()))
    sender.close()
    os._exit(0)  # a forked child must not run the parent's exit handlers
