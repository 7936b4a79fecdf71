"""Ranks that are killed: at any moment, in the middle of a save, at every single step that the saver takes on disk.

Afterwards a run goes on by --resume auto and has to be the untouched run, to the last bit, or nothing was proved.
"""

import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from moe_engine.checkpoint.find import find_checkpoint
from moe_engine.checkpoint.folders import steps_in
from moe_engine.checkpoint.open import Checkpoint
from moe_engine.checkpoint.pieces import Piece
from moe_engine.checkpoint.save import Saver, Shard
from moe_engine.config import Run
from moe_engine.errors import EngineError
from moe_engine.host import disk
from moe_engine.parallel.local_ranks import run_on_ranks
from moe_engine.parallel.mesh import Axis, build_mesh
from tests.faults.arena import Arena, Fault, Injections
from tests.faults.ranks import Before, Layout, Ranks, difference, losses_of, run_of, times_done, train_to_the_end

LAYOUTS: list[Layout] = [(1, 2, 1), (2, 2, 1), (1, 2, 2), (1, 4, 1), (1, 2, 1), (2, 2, 2)]
DEADLINE = 20.0  # seconds in which the survivors of a kill have to end; a lost connection tells them at once, except
# before the first message of a group (gloo#520), when they wait for the watch


def untouched(arena: Arena, layout: Layout, behind: bool = False) -> tuple[Path, float]:
    """A run that nothing happens to, and its seconds; EngineError when even that fails.

    One for each layout, done when first asked for; the very first is done twice, and the two have to be the same.
    """
    runs = arena.shared.setdefault("untouched", {})
    if (layout, behind) not in runs:
        began = time.monotonic()
        out = _run(arena, layout, behind)
        seconds = time.monotonic() - began
        if not runs and (found := difference(_run(arena, layout, behind), out)):
            raise EngineError(f"two untouched runs differ: {found}")
        runs[layout, behind] = out, seconds
    return runs[layout, behind]


def _run(arena: Arena, layout: Layout, behind: bool) -> Path:
    out = arena.folder("untouched")
    if found := train_to_the_end(run_of(arena.corpus(), out, layout, async_save=behind)):
        raise EngineError(f"an untouched run failed: {found}")
    return out


class Battered(NamedTuple):
    """A run that something is about to happen to, and the one that nothing happened to."""

    run: Run
    ranks: Ranks
    truth: Path
    seconds: float  # that the untouched run took


def launched(arena: Arena, layout: Layout = (1, 2, 1), behind: bool = False, before: Before | None = None) -> Battered:
    """Ranks that have just been started, in a folder of their own."""
    truth, seconds = untouched(arena, layout, behind)
    run = run_of(arena.corpus(), arena.folder("battered"), layout, async_save=behind)
    return Battered(run, Ranks(run, before), truth, seconds)


def killed_ranks(arena: Arena, count: int) -> Injections:
    """A1: SIGKILL of one rank, half of the time while a checkpoint is being written."""
    for i in range(count):
        run, ranks, truth, seconds = launched(arena, LAYOUTS[i % len(LAYOUTS)], behind=i % 4 >= 2)
        if i % 2:
            in_a_save(ranks, arena.draw)
        else:
            time.sleep(arena.draw.uniform(0.05, seconds))
        ranks.signal(arena.draw.randrange(run.world_size), signal.SIGKILL)
        yield after_a_kill(ranks) or go_on(run, truth)


def killed_again_and_again(arena: Arena, count: int) -> Injections:
    """A5: one run whose every restart is killed; it has to get to its end all the same."""
    layout: Layout = (1, 2, 1)
    truth, seconds = untouched(arena, layout)
    out, done = arena.folder("restarts"), -1
    run = run_of(arena.corpus(), out, layout)
    for _ in range(count - 1):
        ranks = Ranks(run)
        time.sleep(arena.draw.uniform(0.6, 1.0) * seconds)
        ranks.signal(arena.draw.randrange(2), signal.SIGKILL)
        found = after_a_kill(ranks)
        newest = max(steps_in(out / "checkpoints"), default=0)
        yield found or (f"went back from step {done} to {newest}" if newest < done else None)
        done = newest
    yield go_on(run, truth)


def in_a_save(ranks: Ranks, draw: random.Random) -> None:
    """Return a moment after some folder is being written, or when the run has ended."""
    skip = draw.randrange(4)
    seen: set[str] = set()
    while ranks.running() and len(seen) <= skip:
        seen |= {path.name for path in (ranks.out / "checkpoints").glob("*.tmp")}
        time.sleep(0.0005)
    time.sleep(draw.uniform(0, 0.02))


def after_a_kill(ranks: Ranks) -> str | None:
    """The survivors ended in time, and not as if nothing had happened."""
    codes = ranks.wait(DEADLINE)
    if None in codes:
        return f"survivors were still there after {DEADLINE:g} s: exit codes {codes}"
    if -signal.SIGKILL in codes and set(codes) - {-signal.SIGKILL, 70, 74, 0}:
        return f"exit codes {codes}"
    return None


def go_on(run: Run, truth: Path) -> str | None:
    """Resume to the end; the whole is the untouched run, and no step up to the last save is missing or done again."""
    out = Path(run.train.out)
    saved = max(steps_in(out / "checkpoints"), default=0)
    before = times_done(out, saved)
    if found := train_to_the_end(run):
        return found
    if found := difference(out, truth):
        return found
    if len(before) != saved * run.world_size or len(losses_of(out)) != run.train.steps:
        return f"a step up to the last save, {saved}, is missing"
    if again := times_done(out, saved) - before:
        return f"saved was step {saved}, but (rank, step) {sorted(again)[:4]} are done again"
    shutil.rmtree(out)
    return None


# A2: the saver alone, on two ranks, ended at each of its steps on disk

OPERATIONS = ("make_folder", "write_file", "sync", "sync_folder", "rename", "remove")
WHOLE = torch.arange(4096.0)


def crashes_of_the_saver(arena: Arena, count: int) -> Injections:
    """A2: every operation on disk of every rank, before it, after it, and in the middle of a file."""
    places = list(all_places(arena))
    arena.draw.shuffle(places)
    for place in places[:count]:
        yield crash_at(arena, *place)


def all_places(arena: Arena) -> Iterator[tuple[int, int, str]]:
    """(rank, number of the operation, before | middle | after), counted in a save that nothing happens to."""
    root = arena.folder("counted")

    def on_rank(rank: int) -> list[str]:
        names: list[str] = []
        save_twice(root, rank, lambda: record(names))
        return names

    for rank, operations in enumerate(run_on_ranks(on_rank, 2)):
        for number, name in enumerate(operations):
            yield from ((rank, number, when) for when in ("before", "after"))
            if name == "write_file":
                yield rank, number, "middle"


def crash_at(arena: Arena, rank: int, number: int, when: str) -> str | None:
    root = arena.folder("crashed")

    def on_rank(me: int) -> None:
        save_twice(root, me, lambda: arm(number, when, lambda: os._exit(9)) if me == rank else None)

    try:
        run_on_ranks(on_rank, 2, timeout=30)
    except RuntimeError:
        pass  # it crashed, as it was meant to
    else:
        return f"rank {rank}, operation {number}, {when}: nothing crashed"
    where = f"rank {rank}, {when} operation {number}: "
    warnings: list[str] = []
    try:
        Saver(root, Axis("world"))  # what the next run does first
        folder = find_checkpoint("auto", root, Axis("world"), warnings.append)
        if folder is None or warnings:
            return where + (f"{warnings}" if warnings else "no checkpoint is left")
        value = Checkpoint(folder).whole("w")
        step = int(folder.name.partition("-")[2])
        if not torch.equal(value, WHOLE + step):
            return f"{where}step {step} holds other values"
        run_on_ranks(lambda me: save_twice(root, me, first=3), 2, timeout=30)
        if steps_in(root)[-1] != 4:
            return f"{where}the next run cannot save"
    except (EngineError, RuntimeError) as error:
        return where + str(error).splitlines()[-1]
    shutil.rmtree(root)
    return None


def save_twice(root: Path, rank: int, between: Callable[[], None] = lambda: None, first: int = 1) -> None:
    """Two checkpoints of which one is kept; each rank holds half of the weight."""
    saver = Saver(root, build_mesh(2, 1, 1).world, keep_last=1)
    for step in (first, first + 1):
        if step > first:
            between()
        half = WHOLE.view(2, -1)[rank] + step
        piece = Piece("w", ((0, len(WHOLE)),), rank * len(half), len(half))
        saver.save(step, Shard([(piece, {"master": half})], {}), {"weights": {"w": [len(WHOLE)]}})


def record(names: list[str]) -> None:
    """From now on the name of each operation on disk is added to `names`."""
    for name in OPERATIONS:
        real = getattr(disk, name)
        setattr(disk, name, lambda *a, name=name, real=real: (names.append(name), real(*a))[1])


def arm(number: int, when: str, crash: Callable[[], Any]) -> None:
    """From now on the operation of that number crashes this process."""
    count = iter(range(10**9))

    def wrapped(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*arguments: Any) -> Any:
            mine = next(count) == number
            if mine and when == "before":
                crash()
            if mine and when == "middle":
                path, parts = arguments
                arguments = path, _cut_short(parts, crash)
            result = real(*arguments)
            if mine and when == "after":
                crash()
            return result

        return operation

    for name in OPERATIONS:
        setattr(disk, name, wrapped(name, getattr(disk, name)))


def _cut_short(parts: Any, crash: Callable[[], Any]) -> Iterator[Any]:
    for part in parts:
        yield part[: len(part) // 2]
        crash()


KILLS = {
    "A1": Fault("SIGKILL of a rank, half of them during a save", killed_ranks, 12, 120),
    "A2": Fault("the saver ends at any of its operations on disk", crashes_of_the_saver, 40, 1000),
    "A5": Fault("every restart of a run is killed", killed_again_and_again, 0, 20),
}
