"""A long run that is killed about every hundred steps: the same numbers at the end, and nothing that grows."""

import os
import signal
import time
from pathlib import Path

from moe_engine.checkpoint.folders import steps_in
from moe_engine.errors import EngineError
from moe_engine.log.rows import read_rows
from moe_engine.train.session import Session
from tests.faults.arena import Arena, Fault, Injections
from tests.faults.kills import after_a_kill, go_on
from tests.faults.ranks import Before, Layout, Ranks, before_each_step, last_words, run_of

LAYOUT: Layout = (1, 2, 1)
KEEP, SAVE_EVERY, PER_KILL = 3, 20, 100


def killed_on_the_way(arena: Arena, count: int) -> Injections:
    """H1: `count` kills, one about every hundred steps, of a run that keeps three checkpoints."""
    steps = PER_KILL * count
    settings = {"steps": steps, "save_every": SAVE_EVERY, "keep_last": KEEP, "eval_every": 250, "async_save": True}
    truth = arena.folder("untouched")
    usage = truth / "usage.txt"
    codes = Ranks(run_of(arena.corpus(), truth, LAYOUT, **settings), before=_usage_to(usage)).wait(3600)
    if set(codes) != {0}:
        raise EngineError(f"an untouched run failed with {codes}: {last_words(truth)}")
    out = arena.folder("soak")
    run = run_of(arena.corpus(), out, LAYOUT, **settings)
    for i in range(count):
        ranks, goal = Ranks(run), PER_KILL * i + arena.draw.randrange(PER_KILL // 2, PER_KILL)
        while ranks.running() and _done(out) < goal:
            time.sleep(0.01)
        ranks.signal(arena.draw.randrange(2), signal.SIGKILL)
        found = after_a_kill(ranks)
        kept = len(steps_in(out / "checkpoints"))
        yield found or (None if kept <= KEEP + 1 else f"{kept} checkpoints after kill {i + 1}, of {KEEP} to keep")
    yield go_on(run, truth)
    yield grown(usage, steps)


def _done(out: Path) -> int:
    path = out / "metrics.jsonl"
    rows = read_rows(path) if path.is_file() else []
    return rows[-1]["step"] if rows else 0


def _usage_to(path: Path) -> Before:
    """Rank 0 writes its resident pages and open files before each step."""

    def before(rank: int, session: Session) -> None:
        if rank:
            return
        file = path.open("a")

        def act(done: int) -> None:
            resident = int(Path("/proc/self/statm").read_text().split()[1])
            file.write(f"{resident} {len(os.listdir('/proc/self/fd'))}\n")
            file.flush()

        before_each_step(session, act)

    return before


def grown(usage: Path, steps: int) -> str | None:
    """Memory after the first quarter grows by less than 2 %, open files by none."""
    rows = [tuple(map(int, line.split())) for line in usage.read_text().splitlines()]
    quarter = steps // 4
    early, late = rows[quarter : quarter + 50], rows[-50:]
    pages = [max(row[0] for row in part) for part in (early, late)]
    files = [min(row[1] for row in part) for part in (early, late)]  # a save opens one more for a moment
    if pages[1] > 1.02 * pages[0]:
        return f"resident memory grew from {pages[0]} to {pages[1]} pages"
    return f"open files grew from {files[0]} to {files[1]}" if files[1] > files[0] else None


SOAK = {"H1": Fault("a long run, killed about every 100 steps", killed_on_the_way, 0, 20)}
