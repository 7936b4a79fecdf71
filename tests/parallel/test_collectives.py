"""Each collective's forward and backward on 2 and 4 real ranks, against one process that holds every rank's tensors.

The truth is autograd over a formula of all inputs x_0 .. x_n-1: the scalar is sum_r <w_r, y_r> where the outputs y_r
differ between ranks, and <w, y> once where they are replicated.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moe_engine.parallel.collectives import (
    all_gather,
    all_to_all,
    copy_to,
    gather_rows,
    max_,
    reduce_from,
    reduce_scatter,
    sum_,
)
from moe_engine.parallel.local_ranks import run_on_ranks
from moe_engine.parallel.mesh import Axis, build_mesh

Formula = Callable[[list[Tensor]], list[Tensor]]


def draws(size: int, rows: list[int], seed: int) -> list[Tensor]:
    """One [rows, 2, 3] tensor a rank, the same ones on every rank."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, 2, 3, generator=generator, dtype=torch.float64) for n in rows[:size]]


def check(axis: Axis, ours: Callable[[Tensor], Tensor], inputs: list[Tensor], formula: Formula) -> None:
    """ours(x of this rank) and its gradient under distinct upstream gradients equal autograd of the formula."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    outputs = formula(leaves)
    upstream = draws(axis.size, [y.shape[0] for y in outputs], seed=9)
    torch.autograd.backward(outputs, upstream)
    mine = inputs[axis.rank].clone().requires_grad_()
    y = ours(mine)
    torch.testing.assert_close(y, outputs[axis.rank].detach())
    y.backward(upstream[axis.rank])
    torch.testing.assert_close(mine.grad, leaves[axis.rank].grad)


def splits(size: int) -> list[list[int]]:
    """send[from][to], uneven, with empty messages and one rank that sends nothing at all."""
    table = [[(3 * a + 2 * b) % 4 for b in range(size)] for a in range(size)]
    table[size - 1] = [0] * size
    return table


def exchange(parts: list[Tensor], send: list[list[int]]) -> list[Tensor]:
    cut = [x.split(row) for x, row in zip(parts, send, strict=True)]
    return [torch.cat([cut[source][to] for source in range(len(parts))]) for to in range(len(parts))]


def conjugates_on_rank(rank: int, dp: int, tp: int) -> None:
    axis = build_mesh(dp, 1, tp).tp
    n = axis.size
    cut = draws(n, [2] * n, seed=1)
    check(axis, lambda x: all_gather(x, axis), cut, lambda xs: [torch.cat(xs)] * n)
    whole = draws(n, [2 * n] * n, seed=2)
    check(axis, lambda x: reduce_scatter(x, axis), whole, lambda xs: list(torch.stack(xs).sum(0).chunk(n)))
    send = splits(n)
    uneven = draws(n, [sum(row) for row in send], seed=3)
    recv = [row[axis.rank] for row in send]
    check(axis, lambda x: all_to_all(x, send[axis.rank], recv, axis), uneven, lambda xs: exchange(xs, send))


def replicated_on_rank(rank: int, dp: int, tp: int) -> None:
    axis = build_mesh(dp, 1, tp).tp
    n = axis.size
    (same,) = draws(1, [3], seed=4)
    scale = draws(n, [3] * n, seed=5)
    leaf = same.clone().requires_grad_()
    sum(((leaf * s).sum() for s in scale), torch.zeros(())).backward()
    mine = same.clone().requires_grad_()
    (copy_to(mine, axis) * scale[axis.rank]).sum().backward()
    torch.testing.assert_close(mine.grad, leaf.grad)

    leaves = [s.clone().requires_grad_() for s in scale]
    total = torch.stack(leaves).sum(0)
    (total * same).sum().backward()  # what follows is computed once, whatever the number of ranks
    partial = scale[axis.rank].clone().requires_grad_()
    reduced = reduce_from(partial, axis)
    torch.testing.assert_close(reduced, total.detach())
    torch.testing.assert_close(partial.detach(), scale[axis.rank])  # the input is not written to
    (reduced * same).sum().backward()
    torch.testing.assert_close(partial.grad, leaves[axis.rank].grad)


def plain_on_rank(rank: int, dp: int, tp: int) -> None:
    axis = build_mesh(dp, 1, tp).tp
    inputs = draws(axis.size, [3] * axis.size, seed=6)
    mine = inputs[axis.rank]
    torch.testing.assert_close(sum_(mine.clone(), axis), torch.stack(inputs).sum(0))
    torch.testing.assert_close(max_(mine.clone(), axis), torch.stack(inputs).amax(0))
    torch.testing.assert_close(gather_rows(mine.transpose(0, 2), axis), torch.cat([x.transpose(0, 2) for x in inputs]))


@pytest.mark.parametrize(("dp", "tp"), [(1, 2), (1, 4), (2, 2)])
@pytest.mark.parametrize("check_rank", [conjugates_on_rank, replicated_on_rank, plain_on_rank])
def test_equals_one_process(check_rank: Callable[..., None], dp: int, tp: int):
    run_on_ranks(check_rank, dp * tp, dp, tp)


def test_identity_along_an_axis_of_one():
    x, axis = torch.randn(3, 2, requires_grad=True), Axis("tp")
    for f in (all_gather, reduce_scatter, copy_to, reduce_from, sum_, max_, gather_rows):
        assert f(x, axis) is x
    assert all_to_all(x, [3], [3], axis) is x


def test_bfloat16_survives_the_wire():
    def on_rank(rank: int) -> None:
        axis = build_mesh(1, 1, 2).tp
        x = torch.full((2, 3), rank + 1.0, dtype=torch.bfloat16, requires_grad=True)
        y = reduce_scatter(x, axis)
        assert y.dtype == torch.bfloat16 and y.tolist() == [[3.0] * 3]
        gathered = all_gather(y, axis)
        moved = all_to_all(gathered, [1, 1], [1, 1], axis)
        assert moved.dtype == torch.bfloat16 and moved.tolist() == [[3.0] * 3] * 2
        moved.sum().backward()
        assert x.grad is not None and x.grad.dtype == torch.bfloat16

    run_on_ranks(on_rank, 2)
