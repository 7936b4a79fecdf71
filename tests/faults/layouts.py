"""Checkpoints that change their layout: weights, masters and moments stay the same numbers, wherever they lie."""

import itertools
import json
from pathlib import Path

import torch
from torch import Tensor

from moe_engine.checkpoint.folders import folder_of
from moe_engine.checkpoint.manifest import read_manifest
from moe_engine.checkpoint.open import Checkpoint
from moe_engine.checkpoint.pieces import Piece
from moe_engine.checkpoint.save import Saver
from moe_engine.checkpoint.shard import open_shard
from moe_engine.errors import EngineError
from moe_engine.log.rows import read_rows
from moe_engine.train.session import Session
from moe_engine.train.state import load_state, save_state
from tests.faults.arena import Arena, Fault, Injections
from tests.faults.ranks import Layout, Ranks, last_words, run_of, train_to_the_end

STEPS = 3
KINDS = ("master", "exp_avg", "exp_avg_sq")
# (layout, ZeRO stage); the first is where the state comes from
ALL: list[tuple[Layout, int]] = [
    ((1, 1, 1), 2), ((1, 2, 2), 2), ((2, 2, 1), 1), ((1, 4, 1), 2), ((4, 1, 1), 2), ((1, 1, 2), 1), ((2, 1, 2), 2),
    ((2, 1, 1), 0), ((2, 2, 2), 2), ((1, 1, 1), 0), ((1, 1, 1), 1), ((1, 2, 1), 2), ((2, 1, 1), 3), ((1, 1, 4), 1),
    ((1, 1, 4), 2), ((1, 8, 1), 2), ((8, 1, 1), 1), ((1, 1, 8), 2), ((4, 2, 1), 2), ((1, 4, 2), 1),
]  # fmt: skip


def resharded(arena: Arena, count: int) -> Injections:
    """E4: every layout takes over the same state on its own ranks and saves it; then all ordered pairs are read.

    A pair is read in the pieces that the other layout's own checkpoint lists: what its ranks would ask for. Each layout
    also trains one step on real ranks, which has to be that of the run that was never interrupted.
    """
    layouts = ALL[: max(2, round(count**0.5))]
    (first, zero), start = layouts[0], arena.folder("origin")
    if found := train_to_the_end(
        run_of(arena.corpus(), start, first, zero=zero, jitter=False, steps=STEPS + 1, save_every=STEPS)
    ):
        raise EngineError(f"an untouched run failed: {found}")
    truth, goal = Checkpoint(folder_of(start / "checkpoints", STEPS)), last_row(start)
    wholes = {(name, kind): truth.whole(name, kind) for name in truth.manifest["weights"] for kind in KINDS}
    taken = {key: taken_over(arena, truth.folder, *key) for key in layouts}
    readers = {key: Checkpoint(folder) for key, (folder, _) in taken.items()}
    for source, target in itertools.islice(itertools.product(layouts, repeat=2), count):
        what = f"{source} -> {target}"
        yield moved(readers[source], readers[target], wholes, what) or agree(taken[target][1], goal, what)


def taken_over(arena: Arena, folder: Path, layout: Layout, zero: int) -> tuple[Path, list[float]]:
    """The state of `folder` as a layout holds and saves it, and the loss and gradient norm of its next step."""
    out = arena.folder("taken-over")
    given = read_manifest(folder)

    def before(rank: int, session: Session) -> None:
        load_state(session.engine, session.mesh, folder)
        saver = Saver(out / "again", session.mesh.world)
        save_state(session.engine, session.mesh, saver, STEPS, {key: given[key] for key in ("run", "data", "tokens")})

    run = run_of(arena.corpus(), out, layout, zero=zero, jitter=False, steps=STEPS + 1, resume=str(folder))
    if set(codes := Ranks(run, before).wait(120)) != {0}:
        raise EngineError(f"{layout}, ZeRO {zero}: exit codes {codes}: {last_words(out)}")
    return folder_of(out / "again", STEPS), last_row(out)


def last_row(out: Path) -> list[float]:
    """Loss and gradient norm of the last step."""
    row = read_rows(out / "metrics.jsonl")[-1]
    assert row["step"] == STEPS + 1
    return [row["loss"], row["grad_norm"]]


def pieces_of(reader: Checkpoint) -> list[Piece]:
    """What the ranks of a checkpoint own, from the files' own tables."""
    tables = [open_shard(reader.folder / name).metadata()["pieces"] for name in reader.manifest["files"]]
    return [
        Piece(name, tuple(map(tuple, box)), start, length)
        for table in tables
        for name, box, start, length in json.loads(table)
    ]


def moved(source: Checkpoint, target: Checkpoint, wholes: dict[tuple[str, str], Tensor], what: str) -> str | None:
    """Each piece of the target, filled from the source, is bit for bit the original's."""
    for piece in pieces_of(target):
        for kind in KINDS:
            out = torch.full((piece.length,), torch.nan)
            source.fill(kind, piece, out)
            part = wholes[piece.name, kind][tuple(slice(*side) for side in piece.box)].reshape(-1)
            if not torch.equal(out, part[piece.start : piece.start + piece.length]):
                return f"{what}: {piece.name} {kind} differs"
    return None


def agree(mine: list[float], theirs: list[float], what: str) -> str | None:
    """Losses and gradient norms of the next step, to 1e-6."""
    apart = max(abs(a - b) / abs(b) for a, b in zip(mine, theirs, strict=True))
    return None if apart <= 1e-6 else f"{what}: the next step differs by {apart:.1e} from that of the run itself"


LAYOUTS = {"E4": Fault("a checkpoint is read on another layout", resharded, 64, 400)}
