"""Definition of router_logits in plain torch."""

import torch
from torch import Tensor


def router_logits(x: Tensor, w: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.to(wide) @ w.to(wide).T


def router_logits_backward(grad: Tensor, x: Tensor, w: Tensor, need_x: bool, need_w: bool) -> tuple[Tensor, Tensor]:
    dx = (grad @ w.to(grad.dtype)).to(x.dtype) if need_x else x.new_empty(0)
    return dx, (grad.T @ x.to(grad.dtype)).to(w.dtype) if need_w else w.new_empty(0)
