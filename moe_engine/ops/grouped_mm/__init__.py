"""Grouped matmul: one matrix per expert, rows sorted by expert.

    rows of expert e: start_e .. start_e + counts[e], start_e = counts[0] + ... + counts[e-1]

    y[rows of e]  = x[rows of e] @ w[e].T            forward
    dx[rows of e] = dy[rows of e] @ w[e]             grouped_mm_dx
    dw[e]         = dy[rows of e].T @ x[rows of e]   grouped_mm_dw

Rows past sum(counts) give exactly 0 in y and dx and never reach dw, whatever they hold; an expert without rows gets a
dw of exactly 0 (torch.nn.functional.grouped_mm leaves such rows uninitialised). Sums are fp32 or wider.
"""

import torch
from torch import Tensor

from moe_engine.ops.backend import on_cuda
from moe_engine.ops.grouped_mm import reference

_forward = torch.library.custom_op("moe_engine::grouped_mm", reference.grouped_mm, mutates_args=())
_dx = torch.library.custom_op("moe_engine::grouped_mm_dx", reference.grouped_mm_dx, mutates_args=())
_dw = torch.library.custom_op("moe_engine::grouped_mm_dw", reference.grouped_mm_dw, mutates_args=())
on_cuda(__name__, grouped_mm=_forward, grouped_mm_dx=_dx, grouped_mm_dw=_dw)


def grouped_mm(x_RK: Tensor, w_ENK: Tensor, counts_E: Tensor) -> Tensor:
    """y_RN: each expert's rows times its matrix. Differentiable in x and w.

    x_RK, w_ENK: one floating dtype. counts_E: int32, rows per expert, sum <= R. Raises ValueError if these disagree."""
    if x_RK.dim() != 2 or w_ENK.dim() != 3 or x_RK.shape[1] != w_ENK.shape[2] or x_RK.dtype != w_ENK.dtype:
        raise ValueError(
            f"found x {tuple(x_RK.shape)} {x_RK.dtype} and w {tuple(w_ENK.shape)} {w_ENK.dtype}, "
            "expected [R, K] and [E, N, K] of one dtype"
        )
    if counts_E.shape != w_ENK.shape[:1] or counts_E.dtype != torch.int32:
        raise ValueError(
            f"found counts {tuple(counts_E.shape)} {counts_E.dtype}, expected [{w_ENK.shape[0]}] int32, one per expert"
        )
    return torch.ops.moe_engine.grouped_mm(x_RK, w_ENK, counts_E)


@_forward.register_fake
def _(x, w, counts):
    return x.new_empty(x.shape[0], w.shape[1])


@_dx.register_fake
def _(grad, w, counts):
    return grad.new_empty(grad.shape[0], w.shape[2])


@_dw.register_fake
def _(grad, x, counts):
    return grad.new_empty(counts.shape[0], grad.shape[1], x.shape[1])


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, grad):
    x, w, counts = ctx.saved_tensors
    need_x, need_w, _ = ctx.needs_input_grad
    return (
        torch.ops.moe_engine.grouped_mm_dx(grad, w, counts) if need_x else None,
        torch.ops.moe_engine.grouped_mm_dw(grad, x, counts) if need_w else None,
        None,
    )


_forward.register_autograd(_differentiate, setup_context=_save)
