"""Experts: the whole SwiGLU feed-forward layer of all experts, from tokens to the weighted sum of their rows.

    row r of expert e, t = assignment_of_row[r] // K, s = weight[assignment_of_row[r]]:
        g, u    = x[t] @ w_gate_up[e].T             h_R(2F): gate columns, then up columns
        a       = s * silu(g) * u                   a_RF
        o       = a @ w_down[e].T
    y[t] = sum_k o[row_of[t, k]]

A token keeps D + 2KF elements for backward, x and h: no gathered copy of x, no activation, no output of an expert,
because a weight's gradient is <dy, o> / s = <dy @ w_down, a> / s (arXiv 2512.14080). Without `keep_h` it keeps D and
backward computes h again. With dy of the row's token and da = dy @ w_down[e]:

    dweight    = sum_F da * silu(g) * u             dw_down[e]    = dy[rows of e].T @ a[rows of e]
    dg, du     = dSwiGLU(s * da)                    dw_gate_up[e] = (dg, du)[rows of e].T @ x[rows of e]
    dx[t]      = sum_k ((dg, du) @ w_gate_up[e])[row_of[t, k]]

Rows past sum(counts), the dropped assignments, give exactly 0 everywhere; an expert without rows gets gradients of
exactly 0. Sums are fp32 or wider; the weight is multiplied in before a is rounded.
"""

import torch
from torch import Tensor

from moe_engine.ops.backend import on_cuda
from moe_engine.ops.experts import reference

_forward = torch.library.custom_op("moe_engine::experts", reference.experts, mutates_args=())
_backward = torch.library.custom_op("moe_engine::experts_backward", reference.experts_backward, mutates_args=())
on_cuda(__name__, experts=_forward, experts_backward=_backward)


def experts(
    x_TD: Tensor,
    weight_TK: Tensor,
    w_gate_up_EFD: Tensor,
    w_down_EDF: Tensor,
    counts_E: Tensor,
    assignment_of_row_R: Tensor,
    row_of_TK: Tensor,
    keep_h: bool = True,
) -> Tensor:
    """y_TD: each token through its experts. Differentiable in x, weight and both matrices.

    x, w_gate_up [E, 2F, D] (gate rows, then up rows) and w_down [E, D, F]: one floating dtype. weight_TK: fp32 (fp64
    for fp64). counts, assignment_of_row, row_of: int32, from sort_by_expert. Raises ValueError if these disagree."""
    _check_matrices(x_TD, weight_TK, w_gate_up_EFD, w_down_EDF)
    _check_routing(x_TD, weight_TK, w_down_EDF, counts_E, assignment_of_row_R, row_of_TK)
    return torch.ops.moe_engine.experts(
        x_TD, weight_TK, w_gate_up_EFD, w_down_EDF, counts_E, assignment_of_row_R, row_of_TK, keep_h
    )[0]


def _check_matrices(x: Tensor, weight: Tensor, w_gate_up: Tensor, w_down: Tensor) -> None:
    experts, width, f = w_down.shape
    if x.dim() != 2 or x.shape[1] != width or w_gate_up.shape != (experts, 2 * f, width):
        raise ValueError(
            f"found x {tuple(x.shape)}, w_gate_up {tuple(w_gate_up.shape)} and w_down {tuple(w_down.shape)}, "
            "expected [T, D], [E, 2F, D] and [E, D, F]"
        )
    if not x.dtype == w_gate_up.dtype == w_down.dtype or weight.dtype != torch.promote_types(x.dtype, torch.float32):
        raise ValueError(
            f"found x {x.dtype}, matrices {w_gate_up.dtype} and {w_down.dtype}, weights {weight.dtype}, expected one "
            "dtype for the first three and float32 weights (float64 if the rest is)"
        )


def _check_routing(
    x: Tensor, weight: Tensor, w_down: Tensor, counts: Tensor, assignment_of_row: Tensor, row_of: Tensor
) -> None:
    rows = assignment_of_row.shape[0]
    if weight.shape != row_of.shape or row_of.shape[0] != x.shape[0] or row_of.numel() != rows:
        raise ValueError(
            f"found weight {tuple(weight.shape)}, row_of {tuple(row_of.shape)} and {rows} rows for {x.shape[0]} "
            "tokens, expected [T, K] twice and T*K rows"
        )
    if counts.shape != w_down.shape[:1]:
        raise ValueError(f"found {tuple(counts.shape)} counts for {w_down.shape[0]} experts, expected one for each")
    if not counts.dtype == assignment_of_row.dtype == row_of.dtype == torch.int32:
        raise ValueError(
            f"found counts {counts.dtype}, assignment_of_row {assignment_of_row.dtype} and row_of {row_of.dtype}, "
            "expected int32, as sort_by_expert gives them"
        )


@_forward.register_fake
def _(x, weight, w_gate_up, w_down, counts, assignment_of_row, row_of, keep_h):
    h = x.new_empty(assignment_of_row.shape[0] if keep_h else 0, w_gate_up.shape[1])
    return x.new_empty(x.shape), h


@_backward.register_fake
def _(grad, x, weight, w_gate_up, w_down, counts, assignment_of_row, row_of, h, need_x, need_matrices):
    return (
        x.new_empty(x.shape if need_x else 0),
        weight.new_empty(weight.shape),
        w_gate_up.new_empty(w_gate_up.shape if need_matrices else 0),
        w_down.new_empty(w_down.shape if need_matrices else 0),
    )


def _save(ctx, inputs, output):
    h = output[1]
    ctx.mark_non_differentiable(h)
    ctx.set_materialize_grads(False)  # no zeros in the place of a gradient of h
    ctx.save_for_backward(*inputs[:7], h)


def _differentiate(ctx, grad, _):
    if grad is None:  # y took no part in what is differentiated
        return (None,) * 8
    need_x, need_weight, need_gate_up, need_down, *_ = ctx.needs_input_grad
    dx, dweight, dw_gate_up, dw_down = torch.ops.moe_engine.experts_backward(
        grad, *ctx.saved_tensors, need_x, need_gate_up or need_down
    )
    return (
        dx if need_x else None,
        dweight if need_weight else None,
        dw_gate_up if need_gate_up else None,
        dw_down if need_down else None,
        *[None] * 4,
    )


_forward.register_autograd(_differentiate, setup_context=_save)
