"""Worker processes that take inputs as they come and give results back in that order."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from typing import TypeVar

from moe_engine.errors import DataError
from moe_engine.prepare.tokenizer.tokenizer import Tokenizer

A = TypeVar("A")
B = TypeVar("B")


def worker_count(workers: int | None, size: int, model: Tokenizer) -> int:
    """Processes for `size` bytes of input, unless `workers` says. Bytes are copied faster than a process takes them;
    starting processes pays from some megabytes on."""
    if workers is not None:
        return workers
    if model.kind == "bytes" or size < 8 << 20:
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_order(function: Callable[[A], B], inputs: Iterable[A], workers: int) -> Iterator[tuple[A, B]]:
    """Each input with its result; at most 3 * workers of them are held. DataError when a worker dies.

    function and inputs are pickled when there is more than one worker.
    """
    if workers == 1:
        for given in inputs:
            yield given, function(given)
        return
    pending: deque[tuple[A, Future[B]]] = deque()
    with ExitStack() as stack:
        pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_start_worker)
        stack.callback(pool.shutdown, cancel_futures=True)
        try:
            for given in inputs:
                pending.append((given, pool.submit(function, given)))
                if len(pending) > 2 * workers:
                    first, future = pending.popleft()
                    yield first, future.result()
            while pending:
                first, future = pending.popleft()
                yield first, future.result()
        except BrokenProcessPool:
            raise DataError("a worker process died (out of memory?); try again with fewer --workers") from None


def _start_worker() -> None:
    """A worker leaves Ctrl-C to the parent and ends when the parent does, however that ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        """End this process at once when the parent has ended."""
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
