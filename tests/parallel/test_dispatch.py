"""Dispatch and combine on real ranks: every row meets its own expert and comes home, in whatever layout.

The experts here are matrices of their own; with tp each rank holds an additive part of each of them, so that combine's
partial sums are exercised. The truth is a loop over rows on one process.
"""

import gc
import weakref
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from moe_engine.parallel.dispatch import Counts, combine, dispatch
from moe_engine.parallel.local_ranks import run_on_ranks
from moe_engine.parallel.mesh import Mesh, build_mesh

EXPERTS, WIDTH = 8, 5
SCENES = ("random", "one expert", "holes", "idle rank", "dropped")
LAYOUTS = [(1, 1, 1), (1, 2, 1), (1, 4, 1), (1, 1, 2), (1, 1, 4), (1, 2, 2), (2, 2, 1), (2, 1, 2), (1, 4, 2), (1, 2, 4)]


class Scene(NamedTuple):
    """What a rank sends: rows in order of their experts; expert EXPERTS means dropped."""

    rows: Tensor
    weights: Tensor
    experts: Tensor
    upstream: Tensor


def scene(name: str, rank: int) -> Scene:
    draw = torch.Generator().manual_seed(100 + rank)
    count = 7 + 3 * rank
    experts = torch.randint(EXPERTS, (count,), generator=draw)
    if name == "one expert":
        experts = torch.full_like(experts, 5)
    elif name == "holes":  # experts 0, 3 and the last one get nothing
        experts = torch.tensor([1, 2, 4, 5, 6])[experts % 5]
    elif name == "idle rank" and rank == 1:
        experts = experts[:0]
    elif name == "dropped":
        experts[:: 2 if rank else 1] = EXPERTS  # rank 0 drops everything
    rows = torch.randn(len(experts), WIDTH, generator=draw, dtype=torch.float64)
    weights = torch.rand(len(experts), 1, generator=draw, dtype=torch.float64)
    upstream = torch.randn(len(experts), WIDTH, generator=draw, dtype=torch.float64)
    return Scene(rows, weights, experts.sort().values, upstream)


def matrices(parts: int) -> Tensor:
    """parts[tp, E, WIDTH, WIDTH]; an expert is the sum over the first dimension."""
    draw = torch.Generator().manual_seed(5)
    return torch.randn(parts, EXPERTS, WIDTH, WIDTH, generator=draw, dtype=torch.float64)


def loop(mine: Scene, experts: Tensor) -> Tensor:
    """Row by row, on one process; dropped rows come back as zeros."""
    each = zip(mine.rows, mine.weights, mine.experts)
    out = [w * row @ experts[e] if e < EXPERTS else torch.zeros(WIDTH).double() for row, w, e in each]
    return torch.stack(out) if out else mine.rows.new_empty(0, WIDTH)


def matrices_on_rank(rank: int, mesh: Mesh, name: str) -> None:
    dp, ep, tp = mesh.dp.size, mesh.ep.size, mesh.tp.size
    mine, local = scene(name, rank), EXPERTS // ep
    parts = matrices(tp)
    counts = torch.bincount(mine.experts, minlength=EXPERTS + 1)[:EXPERTS].int()
    rows, weights = mine.rows.clone().requires_grad_(), mine.weights.clone().requires_grad_()
    experts = parts[mesh.tp.rank][mesh.ep.cut(EXPERTS)].clone().requires_grad_()

    dispatched = dispatch(rows, weights, Counts(counts, mesh.ep, mesh.tp), mesh.ep, mesh.tp)
    meanwhile = (rows * 3).sum()  # work between the halves, whose gradient meets that of the rows
    (rows_MD, weight_M1), expert_M = dispatched.wait(), dispatched.expert_M
    assert rows_MD.shape[0] == len(weight_M1) == len(expert_M) and expert_M.dtype == torch.int32
    padded = torch.cat([experts, experts.new_zeros(1, WIDTH, WIDTH)])  # expert L marks padding
    out_MD = torch.einsum("md,mdh->mh", weight_M1 * rows_MD, padded[expert_M.long()])
    y = combine(out_MD, dispatched.route, mesh.ep, mesh.tp)
    torch.autograd.backward([y, meanwhile], [mine.upstream, torch.ones_like(meanwhile)])

    leaves = mine.rows.clone().requires_grad_(), mine.weights.clone().requires_grad_()
    truth = loop(mine._replace(rows=leaves[0], weights=leaves[1]), parts.sum(0))
    torch.testing.assert_close(y, truth)
    truth.backward(mine.upstream) if truth.requires_grad else None
    for found, leaf, constant in zip((rows, weights), leaves, (3.0, 0.0), strict=True):
        wanted = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        torch.testing.assert_close(found.grad, wanted + constant)

    plane = [
        r for r in range(dp * ep * tp) if r // (ep * tp) == rank // (ep * tp)
    ]  # the ranks that share these experts
    wanted = torch.zeros_like(experts)
    for other in (scene(name, r) for r in plane):
        for row, w, e, g in zip(other.rows, other.weights, other.experts.tolist(), other.upstream):
            if e < EXPERTS and e // local == mesh.ep.rank:
                wanted[e % local] += torch.outer(w * row, g)
    torch.testing.assert_close(experts.grad, wanted)


def round_trip_on_rank(rank: int, mesh: Mesh, name: str) -> None:
    """Without experts in between, what is not dropped comes back bit for bit (one tp rank alone contributes)."""
    mine, plane = scene(name, rank), mesh.ep.size * mesh.tp.size
    counts = torch.bincount(mine.experts, minlength=EXPERTS + 1)[:EXPERTS].int()
    dispatched = dispatch(mine.rows, mine.weights, Counts(counts, mesh.ep, mesh.tp), mesh.ep, mesh.tp)
    rows_MD, _ = dispatched.wait()
    sent = torch.cat([scene(name, r).experts for r in range(mesh.world.size) if r // plane == rank // plane])
    here = mesh.ep.cut(EXPERTS)
    local = here.stop - here.start
    arrived = torch.bincount(dispatched.expert_M, minlength=local + 1)[:local]
    assert arrived.tolist() == torch.bincount(sent, minlength=EXPERTS + 1)[here].tolist()
    out_MD = rows_MD * ((dispatched.expert_M < local) & (mesh.tp.rank == 0)).unsqueeze(1)
    back = combine(out_MD, dispatched.route, mesh.ep, mesh.tp)
    assert torch.equal(back, mine.rows * (mine.experts < EXPERTS).unsqueeze(1))


@pytest.mark.parametrize(("dp", "ep", "tp"), LAYOUTS)
@pytest.mark.parametrize("check", [matrices_on_rank, round_trip_on_rank])
def test_each_row_meets_its_own_expert_and_comes_home(dp: int, ep: int, tp: int, check: Callable[..., None]):
    def on_rank(rank: int) -> None:
        mesh = build_mesh(dp, ep, tp)
        for name in SCENES:
            try:
                check(rank, mesh, name)
            except AssertionError as error:
                error.add_note(f"in the scene {name!r}")
                raise

    run_on_ranks(on_rank, dp * ep * tp)


@pytest.mark.parametrize("ep", [1, 2])
def test_counts_are_read_only_where_rows_travel(ep: int):
    """Reading them is the host's wait for the device."""

    def on_rank(rank: int) -> None:
        mesh, reads, read = build_mesh(1, ep, 1), [], Counts.read
        table = Counts(torch.full((EXPERTS,), 2, dtype=torch.int32), mesh.ep, mesh.tp)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Counts, "read", lambda counts: (reads.append(counts), read(counts))[1])
            rows, weights = torch.randn(2 * EXPERTS, WIDTH), torch.ones(2 * EXPERTS, 1)
            dispatch(rows, weights, table, mesh.ep, mesh.tp).wait()
        assert len(reads) == ep - 1

    run_on_ranks(on_rank, ep)


def test_nothing_outlives_backward():
    """Not the rows that travelled, and not the trips: a ring of references would hold them until Python looks for one,
    which the memory of a GPU does not make it do."""

    def on_rank(rank: int) -> None:
        mesh = build_mesh(1, 2, 1)
        gc.disable()
        counts = torch.full((EXPERTS,), 2, dtype=torch.int32)
        rows = torch.randn(2 * EXPERTS, WIDTH, requires_grad=True)
        dispatched = dispatch(rows, torch.ones(len(rows), 1), Counts(counts, mesh.ep, mesh.tp), mesh.ep, mesh.tp)
        alive = [weakref.ref(dispatched.rows), weakref.ref(dispatched.columns)]
        landed, _ = dispatched.wait()
        alive.append(weakref.ref(landed))
        y = combine(landed * 1.0, dispatched.route, mesh.ep, mesh.tp)
        del landed, dispatched
        assert alive[2]() is None  # a product keeps its inputs if it needs them, the trip does not
        y.sum().backward()
        del y
        assert [ref() for ref in alive] == [None, None, None]

    run_on_ranks(on_rank, 2)
