"""Router logits: the router's matrix product, in fp32 whatever the precision of the model.

    logits_TE = x_TD @ w_ED.T           operands widened to fp32 before they are multiplied
    dx = dlogits @ w                    rounded once, to the dtype of x
    dw = dlogits.T @ x                  rounded once, to the dtype of w

x is kept for backward as it is, so a bf16 model holds no fp32 copy of its activations.
"""

import torch
from torch import Tensor

from moe_engine.ops.backend import on_cuda
from moe_engine.ops.router_logits import reference

_forward = torch.library.custom_op("moe_engine::router_logits", reference.router_logits, mutates_args=())
_backward = torch.library.custom_op(
    "moe_engine::router_logits_backward", reference.router_logits_backward, mutates_args=()
)
on_cuda(__name__, router_logits=_forward, router_logits_backward=_backward)


def router_logits(x_TD: Tensor, w_ED: Tensor) -> Tensor:
    """logits_TE fp32 (fp64 for fp64). Differentiable in x and w. Raises ValueError if the widths differ."""
    if x_TD.dim() != 2 or w_ED.dim() != 2 or x_TD.shape[1] != w_ED.shape[1]:
        raise ValueError(f"found x {tuple(x_TD.shape)} and w {tuple(w_ED.shape)}, expected [T, D] and [E, D]")
    return torch.ops.moe_engine.router_logits(x_TD, w_ED)


@_forward.register_fake
def _(x, w):
    return x.new_empty(x.shape[0], w.shape[0], dtype=torch.promote_types(x.dtype, torch.float32))


@_backward.register_fake
def _(grad, x, w, need_x, need_w):
    return x.new_empty(x.shape if need_x else 0), w.new_empty(w.shape if need_w else 0)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, grad):
    need_x, need_w = ctx.needs_input_grad
    dx, dw = torch.ops.moe_engine.router_logits_backward(grad, *ctx.saved_tensors, need_x, need_w)
    return dx if need_x else None, dw if need_w else None


_forward.register_autograd(_differentiate, setup_context=_save)
