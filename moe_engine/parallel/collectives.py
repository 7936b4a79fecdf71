"""The only file that moves tensors between ranks inside forward and backward. Each function names its conjugate:

    forward                      backward
    all_gather(x, axis)          reduce_scatter           cut rows -> all rows
    reduce_scatter(x, axis)      all_gather               partial sums {axis} -> cut rows
    copy_to(x, axis)             all_reduce               a replicated tensor enters a region cut along the axis
    reduce_from(x, axis)         identity                 partial sums {axis} -> replicated
    all_to_all(x, send, recv)    all_to_all(recv, send)   rows change owner

Rows are always dimension 0. Along an axis of size 1 each of them is the identity. `start_all_to_all(...).wait()` is
all_to_all in two halves: what is computed between them, and in backward the gradients of that, overlaps with the rows
that travel.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_engine.parallel.mesh import Axis

# torch 2.13 renamed both
ALL_GATHER = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


def sum_(x: Tensor, axis: Axis) -> Tensor:
    """In-place sum over the axis, outside autograd. Returns x."""
    if axis.size > 1:
        dist.all_reduce(x, group=axis.group)
    return x


def max_(x: Tensor, axis: Axis) -> Tensor:
    """In-place maximum over the axis, outside autograd. Returns x."""
    if axis.size > 1:
        dist.all_reduce(x, op=dist.ReduceOp.MAX, group=axis.group)
    return x


def barrier(axis: Axis) -> None:
    """Wait for every rank of the axis."""
    if axis.size > 1:
        dist.barrier(group=axis.group)


def gather_rows(x: Tensor, axis: Axis) -> Tensor:
    """x[n, ...] of every rank, in rank order -> [axis * n, ...]; outside autograd."""
    if axis.size == 1:
        return x
    out = x.new_empty(axis.size * x.shape[0], *x.shape[1:])
    ALL_GATHER(out, x.contiguous(), group=axis.group)
    return out


def gather_bytes(data: bytes, axis: Axis) -> list[bytes]:
    """The bytes of every rank, in rank order; by way of host memory, outside autograd."""
    sizes = gather_rows(torch.tensor([len(data)]), axis).tolist()
    padded = torch.zeros(1, max(sizes), dtype=torch.uint8)
    padded[0, : len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else 0
    return [bytes(row[:size].numpy()) for row, size in zip(gather_rows(padded, axis), sizes, strict=True)]


def _scatter_sum(x: Tensor, axis: Axis) -> Tensor:
    out = x.new_empty(x.shape[0] // axis.size, *x.shape[1:])
    REDUCE_SCATTER(out, x.contiguous(), group=axis.group)
    return out


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, axis: Axis) -> Tensor:
        """x[n/axis, ...] -> x[n, ...], in rank order."""
        ctx.axis = axis
        return gather_rows(x, axis)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        """grad[n, ...]{axis} -> dx[n/axis, ...], this rank's rows of the sum."""
        return _scatter_sum(grad, ctx.axis), None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, axis: Axis) -> Tensor:
        """x[n, ...]{axis} -> x[n/axis, ...], this rank's rows of the sum."""
        ctx.axis = axis
        return _scatter_sum(x, axis)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        """grad[n/axis, ...] -> dx[n, ...], the same on every rank."""
        return gather_rows(grad, ctx.axis), None


class _CopyTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, axis: Axis) -> Tensor:
        """x, as a view of the same storage; nothing is sent."""
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        """grad{axis} -> its sum on every rank, in a copy: autograd may still use grad."""
        return sum_(grad.clone(), ctx.axis), None


class _ReduceFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, axis: Axis) -> Tensor:
        """x{axis} -> its sum on every rank, in a copy."""
        return sum_(x.clone(), axis)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        """The gradient of a sum is that of each term, and every rank has it: nothing is sent."""
        return grad, None


class PendingRows:
    """The rows of an all-to-all under way: being filled, and complete in what `wait` returns, once."""

    rows: Tensor | None

    def __init__(self, send: list[int], recv: list[int], axis: Axis):
        self.send, self.recv, self.axis = send, recv, axis
        self.under_way: tuple[dist.Work, Tensor, Tensor] | None = None  # keeps both ends alive

    def launch(self, x: Tensor, send: list[int], recv: list[int]) -> Tensor:
        """Begin to send x[sum(send), ...]; returns [sum(recv), ...], not to be read before `finish`. Backward swaps
        send and recv."""
        x, out = x.contiguous(), x.new_empty(sum(recv), *x.shape[1:])
        work = dist.all_to_all_single(out, x, recv, send, group=self.axis.group, async_op=True)
        assert work is not None
        self.under_way = work, x, out
        return out

    def finish(self) -> Tensor:
        """Wait for what `launch` began, and return the rows that arrived. On CUDA the stream waits, not the host."""
        assert self.under_way is not None, "nothing is under way"
        work, _, out = self.under_way
        work.wait()
        self.under_way = None
        return out

    def wait(self) -> Tensor:
        """The rows that arrived: sum(recv) of them, in the order of the ranks that sent them."""
        rows, self.rows = self.rows, None  # held on to, they would hold this object through the graph, and live on
        assert rows is not None, "these rows have been taken"
        return rows if self.axis.size == 1 else _Wait.apply(rows, self)  # pyright: ignore[reportReturnType]


class _Start(torch.autograd.Function):
    """The first half. Its backward is the second half of the gradient's trip back, and the other way round: what
    autograd carries from one to the other has the shape that it expects and is not used."""

    @staticmethod
    def forward(ctx, x: Tensor, pending: PendingRows) -> Tensor:
        """x[sum(send), ...] -> [sum(recv), ...], still being filled."""
        ctx.pending = pending
        return pending.launch(x, pending.send, pending.recv)

    @staticmethod
    @once_differentiable
    def backward(ctx, unused: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        """dx[sum(send), ...], which _Wait.backward has sent on its way."""
        return ctx.pending.finish(), None


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, pending: PendingRows) -> Tensor:
        """rows[sum(recv), ...], complete, as a view."""
        ctx.pending = pending
        pending.finish()
        return rows.view_as(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        """Send grad[sum(recv), ...] back to the ranks whose rows these were; _Start.backward ignores the result."""
        ctx.pending.launch(grad, ctx.pending.recv, ctx.pending.send)
        return grad, None


def all_gather(x: Tensor, axis: Axis) -> Tensor:
    """x[n/axis, ...] -> x[n, ...]; the gradient, a partial sum {axis}, is reduce-scattered."""
    return x if axis.size == 1 else _AllGather.apply(x, axis)  # pyright: ignore[reportReturnType]


def reduce_scatter(x: Tensor, axis: Axis) -> Tensor:
    """x[n, ...]{axis} -> x[n/axis, ...]; the gradient is all-gathered. axis.size must divide n."""
    return x if axis.size == 1 else _ReduceScatter.apply(x, axis)  # pyright: ignore[reportReturnType]


def copy_to(x: Tensor, axis: Axis) -> Tensor:
    """A replicated x used on rows (or columns) cut along the axis: each rank's gradient is partial and is summed."""
    return x if axis.size == 1 else _CopyTo.apply(x, axis)  # pyright: ignore[reportReturnType]


def reduce_from(x: Tensor, axis: Axis) -> Tensor:
    """x{axis} -> its sum on every rank. What follows is replicated, so the gradient passes unchanged."""
    return x if axis.size == 1 else _ReduceFrom.apply(x, axis)  # pyright: ignore[reportReturnType]


def start_all_to_all(x: Tensor, send: list[int], recv: list[int], axis: Axis) -> PendingRows:
    """Rows leave for their new owners: the first send[0] rows go to rank 0, and so on; recv[i] come from rank i."""
    pending = PendingRows(send, recv, axis)
    pending.rows = x if axis.size == 1 else _Start.apply(x, pending)  # pyright: ignore[reportAttributeAccessIssue]
    return pending


def all_to_all(x: Tensor, send: list[int], recv: list[int], axis: Axis) -> Tensor:
    """Rows to their new owners -> sum(recv) rows, in rank order. See start_all_to_all."""
    return start_all_to_all(x, send, recv, axis).wait()
