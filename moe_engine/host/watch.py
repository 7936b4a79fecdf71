"""Noticing that a run has stopped: a thread of every rank that outlives a main thread which waits for ever.

    main thread     heartbeat(step, "evaluation")    says where it is
    watch thread    every few seconds                writes {step, where, since} under the rank's key in the store
                    no heartbeat for `timeout` s     writes the call that the main thread is in, reads what the others
                                                     wrote, names who holds them up, ends the process with code 70

A rank that is stopped cannot write, one that sleeps or is lost in its own code shows another call than those that wait
for it, and one that left out a collective waits in another than the rest. The stacks of all threads go to `out`.
"""

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch.distributed as dist

from moe_engine.host.console import print_error

Heartbeat = Callable[[int, str], None]  # (step, what it does): this rank is alive
CODE = 70
ENGINE = str(Path(__file__).resolve().parents[1])


class State(NamedTuple):
    """What a rank last wrote about itself. silent: seconds since; call: where its main thread is, if it noticed."""

    step: int
    where: str
    silent: float
    call: str | None = None


class Watch:
    """Watches the thread that makes it, from `with` to the end of the block. timeout 0: nothing is watched.

    store: shared by all ranks. say: told what is wrong when the thread has waited for `timeout` seconds; end: then
    called with the exit code.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        world: int,
        timeout: float,
        out: Path,
        say: Callable[[str], object] = print_error,
        end: Callable[[int], Any] = os._exit,
    ) -> None:
        self.store, self.rank, self.world = store, rank, world
        self.timeout, self.out, self.say, self.end = timeout, out, say, end
        self.interval = min(timeout / 8, 10.0)
        self.main = threading.get_ident()
        self.at = (0, "start", time.monotonic())
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def __enter__(self) -> Self:
        if self.timeout:
            self._write(*self.at[:2], None)
            self.thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stopped.set()
        if self.thread.is_alive():
            self.thread.join(timeout=5)  # the store may have gone, and the thread be waiting for it

    def heartbeat(self, step: int, where: str) -> None:
        """The main thread is alive: at `step`, doing `where`."""
        self.at = (step, where, time.monotonic())

    def _run(self) -> None:
        while not self.stopped.wait(self.interval):
            step, where, since = self.at
            late = time.monotonic() - since > self.timeout
            self._write(step, where, innermost(self.main) if late else None)
            if not late:
                continue
            self.stopped.wait(3 * self.interval)  # the others notice too
            if self.at[2] != since:  # it went on after all
                continue
            last = threading.Timer(8 * self.interval, self.end, [CODE])  # if the store does not answer
            last.daemon = True
            last.start()
            self._report(step, where)
            self.stopped.wait(2 * self.interval)  # the end of this rank would interrupt what the others have to say
            last.cancel()
            self.end(CODE)
            return

    def _write(self, step: int, where: str, call: str | None) -> None:
        with contextlib.suppress(RuntimeError):  # the store is gone: `_report` says so
            self.store.set(f"watch/{self.rank}", json.dumps([step, where, time.time(), call]))

    def _read(self) -> dict[int, State | None]:
        keys = [f"watch/{rank}" for rank in range(self.world)]
        if self.store.has_extended_api() and self.store.check(keys):  # pyright: ignore[reportAttributeAccessIssue]
            said = self.store.multi_get(keys)  # pyright: ignore[reportAttributeAccessIssue]
        else:
            said = [self.store.get(key) if self.store.check([key]) else None for key in keys]
        return {rank: _state(text) for rank, text in enumerate(said)}

    def _report(self, step: int, where: str) -> None:
        try:
            blame = culprits(self._read(), silence=4 * self.interval)
        except RuntimeError as error:  # the store went with the rank, or the node, that held it
            blame = f"the other ranks cannot be asked ({error})"
        path = self.out / f"hang-rank-{self.rank:05d}.txt"
        try:
            with path.open("w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
            stacks = f"stacks in {path}"
        except OSError as error:
            stacks = f"no stacks: {error}"
        self.say(
            f"rank {self.rank}: no progress for {self.timeout:g} s at step {step}, {where}, in "
            f"{innermost(self.main)}: {blame}; {stacks}. Restart with --resume auto; raise --step-timeout if a step "
            "takes that long"
        )


def _state(text: bytes | None) -> State | None:
    """What a rank wrote, None when it never has."""
    if not text:
        return None
    step, where, at, call = json.loads(text)
    return State(step, where, time.time() - at, call)


def culprits(states: dict[int, State | None], silence: float) -> str:
    """Which ranks hold the others up, in words."""
    mute = [rank for rank, state in states.items() if state is None or state.silent > silence]
    said = []
    for rank in mute:
        state = states[rank]
        last = f"last at step {state.step}, {state.where}" if state else "and never has"
        said.append(f"rank {rank} does not answer ({last})")
    calls = {rank: state.call for rank, state in states.items() if state and rank not in mute}
    behind = [rank for rank, call in calls.items() if call is None]
    said += [f"rank {rank} still moves" for rank in behind]
    counts = Counter(call for call in calls.values() if call)
    if not mute and len(counts) > 1:
        usual = counts.most_common(1)[0][0]
        said += [f"rank {rank} is in {call}" for rank, call in calls.items() if call and call != usual]
        said.append(f"the others are in {usual}")
    return "; ".join(said) or f"all ranks are in {next(iter(counts), 'no call')}"


def innermost(thread: int) -> str:
    """The engine's innermost call of a thread, and what it waits in: `all_to_all at parallel/dispatch.py:60`."""
    frame = sys._current_frames().get(thread)
    if frame is None:
        return "a thread that has ended"
    stack = traceback.extract_stack(frame)
    ours = [call for call in stack if call.filename.startswith(ENGINE)]
    last = stack[-1]
    place = f"{Path(last.filename).name}:{last.lineno} {last.name}"
    if not ours or ours[-1] is last:
        return place
    return f"{Path(ours[-1].filename).relative_to(ENGINE)}:{ours[-1].lineno} {ours[-1].name}, {place}"
