"""Permute: the order in which experts read their tokens, and the way there and back.

Token t's k-th choice is assignment t*K + k. Sorted by expert, stably, assignments become rows:

    index_TK = [[2, 0], [0, 1]]     rows: expert 0: t0 t1 | expert 1: t1 | expert 2: t0
    counts_E = [2, 1, 1]    assignment_of_row_R = [1, 2, 3, 0]    row_of_TK = [[3, 0], [1, 2]]

    rows[r] = x[assignment_of_row[r] // K]      permute
    y[t]    = sum_k rows[row_of[t, k]]          unpermute, summed in fp32 from k = 0 on

An assignment to expert E (one past the last) is dropped: its row comes after all the others, past sum(counts). The two
index tensors are each other's inverse, so each of the two functions is the other's gradient, both are gathers, and
nothing is added atomically.
"""

import torch
from torch import Tensor

from moe_engine.ops.backend import on_cuda
from moe_engine.ops.permute import reference

_sort = torch.library.custom_op("moe_engine::sort_by_expert", reference.sort_by_expert, mutates_args=())
_permute = torch.library.custom_op("moe_engine::permute", reference.permute, mutates_args=())
_unpermute = torch.library.custom_op("moe_engine::unpermute", reference.unpermute, mutates_args=())
on_cuda(__name__, sort_by_expert=_sort, permute=_permute, unpermute=_unpermute)


def sort_by_expert(index_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sort the assignments by expert: (counts_E, assignment_of_row_R, row_of_TK), all int32, R = T*K.

    index_TK: int32 in 0..E, where E means dropped. Raises ValueError for other shapes and dtypes."""
    if index_TK.dim() != 2 or index_TK.dtype != torch.int32:
        raise ValueError(f"found index {tuple(index_TK.shape)} {index_TK.dtype}, expected [T, K] int32")
    return torch.ops.moe_engine.sort_by_expert(index_TK, num_experts)


def permute(x_TD: Tensor, assignment_of_row_R: Tensor, row_of_TK: Tensor) -> Tensor:
    """rows_RD: each token once per choice, in the order of the experts. Differentiable in x."""
    _check(x_TD, row_of_TK.shape[0], assignment_of_row_R, row_of_TK)
    return torch.ops.moe_engine.permute(x_TD, assignment_of_row_R, row_of_TK)


def unpermute(rows_RD: Tensor, assignment_of_row_R: Tensor, row_of_TK: Tensor) -> Tensor:
    """y_TD in the dtype of rows: the sum of each token's rows. Differentiable in rows."""
    _check(rows_RD, row_of_TK.numel(), assignment_of_row_R, row_of_TK)
    return torch.ops.moe_engine.unpermute(rows_RD, assignment_of_row_R, row_of_TK)


def _check(x: Tensor, rows: int, assignment_of_row_R: Tensor, row_of_TK: Tensor) -> None:
    if x.dim() != 2 or x.shape[0] != rows or assignment_of_row_R.shape != (row_of_TK.numel(),):
        raise ValueError(
            f"found {tuple(x.shape)} with assignment_of_row {tuple(assignment_of_row_R.shape)} and row_of "
            f"{tuple(row_of_TK.shape)}, expected {rows} rows and T*K = {row_of_TK.numel()} assignments"
        )
    if not assignment_of_row_R.dtype == row_of_TK.dtype == torch.int32:
        raise ValueError(f"found {assignment_of_row_R.dtype} and {row_of_TK.dtype} indices, expected int32")


@_sort.register_fake
def _(index, num_experts):
    return index.new_empty(num_experts), index.new_empty(index.numel()), index.new_empty(index.shape)


@_permute.register_fake
def _(x, assignment_of_row, row_of):
    return x.new_empty(assignment_of_row.shape[0], x.shape[1])


@_unpermute.register_fake
def _(rows, assignment_of_row, row_of):
    return rows.new_empty(row_of.shape[0], rows.shape[1])


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[1:])


def _differentiate_permute(ctx, grad):
    return torch.ops.moe_engine.unpermute(grad, *ctx.saved_tensors), None, None


def _differentiate_unpermute(ctx, grad):
    return torch.ops.moe_engine.permute(grad, *ctx.saved_tensors), None, None


_permute.register_autograd(_differentiate_permute, setup_context=_save)
_unpermute.register_autograd(_differentiate_unpermute, setup_context=_save)
