"""Root mean square norms: x / sqrt(mean(x^2) + eps) * weight, the mean over the last dimension or over all heads.

    RMSNorm     x[.., D]         weight [D]      of tokens; or of one head's C values, with one weight for all heads
    WideNorm    x[.., H/tp, C]   weight [H*C]    one mean over the values of all heads, which tp cuts

A weight that is replicated over tp sees rows, or heads, of this rank alone, so its gradient is summed (`copy_to`).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_engine.parallel.collectives import copy_to, reduce_from
from moe_engine.parallel.mesh import Axis
from moe_engine.parallel.weight import weight


class RMSNorm(nn.Module):
    """The norm over the last dimension."""

    def __init__(self, width: int, eps: float, tp: Axis):
        super().__init__()
        self.tp, self.eps = tp, eps
        self.weight = weight((width,), fill=1.0)

    def forward(self, x: Tensor) -> Tensor:
        """x[.., D] -> the same shape; the weight's gradient is summed over tp."""
        return F.rms_norm(x, (x.shape[-1],), copy_to(self.weight, self.tp), self.eps)


class WideNorm(nn.Module):
    """The norm over the last two dimensions, of which tp cuts the first. The mean square is that of all tp ranks."""

    def __init__(self, width: int, eps: float, tp: Axis):
        super().__init__()
        self.tp, self.eps, self.width = tp, eps, width
        self.weight = weight((width,), cut={0: tp}, fill=1.0)

    def forward(self, x: Tensor) -> Tensor:
        """x[.., H/tp, C] -> the same shape; squares are added up in fp32 or wider, then over tp."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        squares = reduce_from(wide.square().sum((-2, -1), keepdim=True), self.tp)
        normed = wide * (copy_to(squares, self.tp) / self.width + self.eps).rsqrt()  # each rank's values use the sum
        return normed.to(x.dtype) * self.weight.view(x.shape[-2:])
