"""Signals to ranks: to save and end, once more while they do, to save and go on; and ranks that stand still."""

import os
import shutil
import signal
import time
from pathlib import Path

from moe_engine.checkpoint.folders import steps_in
from moe_engine.config import Run
from moe_engine.parallel.collectives import barrier
from moe_engine.train.session import Session
from tests.faults.arena import Arena, Fault, Injections
from tests.faults.kills import LAYOUTS, go_on, in_a_save, launched
from tests.faults.ranks import Before, Layout, Ranks, before_each_step, last_words, run_of, trace_of

GRACE = 25.0  # seconds; torchrun and Slurm kill after 30


def told_to_stop(arena: Arena, count: int) -> Injections:
    """B1: SIGTERM to one rank or to all, at any moment from the start on."""
    for i in range(count):
        run, ranks, truth, seconds = launched(arena, LAYOUTS[i % len(LAYOUTS)], behind=i % 4 >= 2)
        time.sleep(arena.draw.uniform(0.05, seconds))
        whom = range(run.world_size) if i % 2 else [arena.draw.randrange(run.world_size)]
        at = steps_done(ranks.out)
        for rank in whom:
            ranks.signal(rank, signal.SIGTERM)
        yield stopped_well(ranks, run, at) or go_on(run, truth)


def told_again(arena: Arena, count: int) -> Injections:
    """B2: SIGTERM and SIGINT once more during the save."""
    for _ in range(count):
        run, ranks, truth, _ = launched(arena)
        in_a_save(ranks, arena.draw)
        at = steps_done(ranks.out)
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            ranks.signal(0, number)
            ranks.signal(1, number)
            time.sleep(0.003)
        yield stopped_well(ranks, run, at) or go_on(run, truth)


def told_to_save(arena: Arena, count: int) -> Injections:
    """B3: SIGUSR1 saves and goes on; the run is the untouched one, with more checkpoints."""
    for _ in range(count):
        run, ranks, truth, seconds = launched(arena, before=_usr1_at(arena.draw.randrange(1, 11)))
        codes = ranks.wait(seconds + 60)
        more = len(steps_in(ranks.out / "checkpoints"))
        if set(codes) != {0} or more not in (4, 5):
            yield f"exit codes {codes}, {more} checkpoints: {last_words(ranks.out)}"
        else:
            yield go_on(run, truth)


def _usr1_at(step: int) -> Before:
    """A rank sends itself the signal when it has done `step`."""

    def before(rank: int, session: Session) -> None:
        def act(done: int) -> None:
            if done == step and rank == 1:
                os.kill(os.getpid(), signal.SIGUSR1)

        before_each_step(session, act)

    return before


def steps_done(out: Path) -> int:
    """The last step that some rank has left a trace of."""
    return max((step for _, step in trace_of(out)), default=0)


def stopped_well(ranks: Ranks, run: Run, at: int) -> str | None:
    """All ranks end with 75 within the grace period, with their last step saved.

    at: the step that was done when they were told. A run that was about to end anyway may end with 0.
    """
    codes = ranks.wait(GRACE)
    done, saved = steps_done(ranks.out), max(steps_in(ranks.out / "checkpoints"), default=0)
    if set(codes) != {75} and not (set(codes) == {0} and at >= run.train.steps - 2):
        return f"told to stop at step {at}: exit codes {codes}: {last_words(ranks.out)}"
    return None if done == saved else f"step {done} was done, step {saved} is saved"


def standing_still(arena: Arena, count: int) -> Injections:
    """B4: a rank is stopped, sleeps, or waits in a collective that no other rank is in; the rest has to say so."""
    layouts: list[Layout] = [(1, 2, 1), (1, 4, 1), (1, 2, 2)]
    for i in range(count):
        out = arena.folder("still")
        run = run_of(arena.corpus(), out, layouts[i % 3], steps=1000, step_timeout=3.0)
        victim, kind = arena.draw.randrange(run.world_size), ("stopped", "asleep", "astray")[i % 3]
        ranks = Ranks(run, before=_hold_up(victim, kind, step=arena.draw.randrange(2, 6)))
        codes = ranks.wait(60, but=victim)
        yield _reported(out, codes, victim, kind)


def _hold_up(victim: int, kind: str, step: int) -> Before:
    def before(rank: int, session: Session) -> None:
        def act(done: int) -> None:
            if done != step or rank != victim:
                return
            if kind == "stopped":
                os.kill(os.getpid(), signal.SIGSTOP)
            elif kind == "asleep":
                time.sleep(600)
            else:  # one collective more than the others: what follows meets the wrong partners, or nobody
                barrier(session.mesh.world)

        before_each_step(session, act)

    return before


def _reported(out: Path, codes: list[int | None], victim: int, kind: str) -> str | None:
    survivors = [rank for rank in range(len(codes)) if rank != victim]
    if any(codes[rank] not in (70,) for rank in survivors):
        return f"{kind} rank {victim}: exit codes {codes}: {last_words(out)}"
    for rank in survivors:
        said = (out / f"said-rank-{rank:05d}.txt").read_text()
        line = next((line for line in said.splitlines() if "no progress for 3 s at step" in line), None)
        if line is None and kind != "astray":
            return f"{kind} rank {victim}: rank {rank} did not say that it waits"
        if line is not None and kind != "astray" and f"rank {victim} " not in line.partition(": no progress")[2]:
            return f"{kind} rank {victim}: rank {rank} blames another: {line[:300]}"
    shutil.rmtree(out)
    return None


def two_in_one_folder(arena: Arena, count: int) -> Injections:
    """A7: a second run in the same --out is refused and told who is there; the first one goes on."""
    for _ in range(count):
        run, first, truth, _ = launched(arena)
        out = first.out
        while not (out / "metrics.jsonl").is_file() and first.running():
            time.sleep(0.01)
        second = Ranks(run_of(arena.corpus(), out, (1, 1, 1)))
        codes, said = second.wait(30), last_words(out)
        first_codes = first.wait(60)
        if codes != [78] or f"in use by process {first.processes[0].pid} on " not in said:
            yield f"the second ended with {codes}: {said}"
        elif set(first_codes) != {0}:
            yield f"the first ended with {first_codes}: {said}"
        else:
            yield go_on(run, truth)


PREEMPTION = {
    "A7": Fault("two runs in one folder", two_in_one_folder, 1, 5),
    "B1": Fault("SIGTERM to one rank or all, at any moment", told_to_stop, 12, 60),
    "B2": Fault("SIGTERM and SIGINT again during the save", told_again, 0, 10),
    "B3": Fault("SIGUSR1: save and go on", told_to_save, 2, 10),
    "B4": Fault("a rank that stops, sleeps or goes astray", standing_still, 3, 15),
}
