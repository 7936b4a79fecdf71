"""Permute: the order in which experts read their tokens, and the way there and back.

Token t's k-th choice is assignment t*K + k. Sorted by expert, stably, assignments become rows:

    index_TK = [[2, 0], [0, 1]]     rows: expert 0: t0 t1 | expert 1: t1 | expert 2: t0
    counts_E = [2, 1, 1]    token_of_row_R = [0, 1, 1, 0]    row_of_TK = [[3, 0], [1, 2]]

    rows[r] = x[token_of_row[r]]                      permute
    y[t]    = sum_k weight[t, k] * rows[row_of[t, k]] unpermute, summed in fp32 from k = 0 on

An assignment to expert E (one past the last) is dropped: its row comes after all the others, past sum(counts). Both
gradients are gathers too: the two index tensors are each other's inverse, so nothing is added atomically.
"""

import torch
from torch import Tensor

from moe_engine.ops.permute import reference

_sort = torch.library.custom_op("moe_engine::sort_by_expert", reference.sort_by_expert, mutates_args=())
_permute = torch.library.custom_op("moe_engine::permute", reference.permute, mutates_args=())
_permute_backward = torch.library.custom_op("moe_engine::permute_backward", reference.permute_backward, mutates_args=())
_unpermute = torch.library.custom_op("moe_engine::unpermute", reference.unpermute, mutates_args=())
_unpermute_backward = torch.library.custom_op(
    "moe_engine::unpermute_backward", reference.unpermute_backward, mutates_args=()
)


def sort_by_expert(index_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sort the assignments by expert: (counts_E, token_of_row_R, row_of_TK), all int32, R = T*K.

    index_TK: int32 in 0..E, where E means dropped. Raises ValueError for other shapes and dtypes."""
    if index_TK.dim() != 2 or index_TK.dtype != torch.int32:
        raise ValueError(f"found index {tuple(index_TK.shape)} {index_TK.dtype}, expected [T, K] int32")
    return torch.ops.moe_engine.sort_by_expert(index_TK, num_experts)


def permute(x_TD: Tensor, token_of_row_R: Tensor, row_of_TK: Tensor) -> Tensor:
    """rows_RD: each token once per choice, in the order of the experts. Differentiable in x."""
    _check_rows(token_of_row_R.shape[0], row_of_TK)
    return torch.ops.moe_engine.permute(x_TD, token_of_row_R, row_of_TK)


def unpermute(rows_RD: Tensor, weight_TK: Tensor, row_of_TK: Tensor) -> Tensor:
    """y_TD in the dtype of rows: the weighted sum of each token's rows. Differentiable in rows and weight.

    weight_TK: fp32. A weight of exactly 0 marks a dropped slot: whatever its row holds, NaN included, it adds exactly 0
    and both of its gradients are exactly 0."""
    _check_rows(rows_RD.shape[0], row_of_TK)
    if weight_TK.shape != row_of_TK.shape:
        raise ValueError(f"found weights {tuple(weight_TK.shape)}, expected {tuple(row_of_TK.shape)} as row_of")
    return torch.ops.moe_engine.unpermute(rows_RD, weight_TK, row_of_TK)


def _check_rows(rows: int, row_of_TK: Tensor) -> None:
    if rows != row_of_TK.numel():
        raise ValueError(f"found {rows} rows, expected T*K = {row_of_TK.numel()}, one for each entry of row_of")


@_sort.register_fake
def _(index, num_experts):
    return index.new_empty(num_experts), index.new_empty(index.numel()), index.new_empty(index.shape)


@_permute.register_fake
def _(x, token_of_row, row_of):
    return x.new_empty(token_of_row.shape[0], x.shape[1])


@_permute_backward.register_fake
def _(grad_rows, row_of):
    return grad_rows.new_empty(row_of.shape[0], grad_rows.shape[1])


@_unpermute.register_fake
def _(rows, weight, row_of):
    return rows.new_empty(row_of.shape[0], rows.shape[1])


@_unpermute_backward.register_fake
def _(grad, rows, weight, row_of):
    return rows.new_empty(rows.shape), weight.new_empty(weight.shape)


def _save_permute(ctx, inputs, output):
    ctx.save_for_backward(inputs[2])


def _differentiate_permute(ctx, grad_rows):
    (row_of,) = ctx.saved_tensors
    return torch.ops.moe_engine.permute_backward(grad_rows, row_of), None, None


def _save_unpermute(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _differentiate_unpermute(ctx, grad):
    rows, weight, row_of = ctx.saved_tensors
    grad_rows, grad_weight = torch.ops.moe_engine.unpermute_backward(grad, rows, weight, row_of)
    return grad_rows, grad_weight, None


_permute.register_autograd(_differentiate_permute, setup_context=_save_permute)
_unpermute.register_autograd(_differentiate_unpermute, setup_context=_save_unpermute)
