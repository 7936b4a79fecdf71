"""Definition of router_logits in plain torch."""

import torch
from torch import Tensor


def router_logits(x: Tensor, w: Tensor) -> Tensor:
    """x_TD @ w_ED.T, both widened to fp32 (to fp64 if x is fp64) before the product."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.to(wide) @ w.to(wide).T


def router_logits_backward(grad: Tensor, x: Tensor, w: Tensor, need_x: bool, need_w: bool) -> tuple[Tensor, Tensor]:
    """dx = grad_TE @ w in the dtype of x, dw = grad.T @ x in the dtype of w, both computed in the dtype of grad. One
    that is not needed has no elements."""
    dx = (grad @ w.to(grad.dtype)).to(x.dtype) if need_x else x.new_empty(0)
    return dx, (grad.T @ x.to(grad.dtype)).to(w.dtype) if need_w else w.new_empty(0)
