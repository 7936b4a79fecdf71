"""cross_entropy on CUDA: the statistics in one pass over a row of logits, the gradient in another; no fp32 copy.

The sum of exponentials is kept relative to the largest logit so far and rescaled when a larger one comes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_engine.ops.tune import FUSED

WIDE = 4096


@triton.jit
def cross_entropy_stats_kernel(logits, label, largest, sumexp, target, V, first_id, WIDE: tl.constexpr):
    """One program per row of logits[T, V], read WIDE columns at a time: its maximum, sum of exponentials and target."""
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, WIDE)
    top = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    for first in range(0, V, WIDE):
        c = first + at
        x = tl.load(logits + row * V + c, mask=c < V, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(top, tl.max(x, 0))
        finite = tl.where(higher == float("-inf"), 0.0, higher)  # nothing but -inf so far: a sum of 0, not of NaN
        total = total * tl.exp(top - finite) + tl.sum(tl.exp(x - finite), 0)
        top = higher
    wanted = tl.load(label + row)
    column = wanted - first_id
    here = (wanted != -100) & (column >= 0) & (column < V)
    tl.store(target + row, tl.load(logits + row * V + tl.where(here, column, 0), mask=here, other=0.0).to(tl.float32))
    tl.store(largest + row, top)
    tl.store(sumexp + row, total)


@triton.jit
def cross_entropy_grad_kernel(logits, label, lse, grad, out, V, first_id, WIDE: tl.constexpr):
    """Program (row, i) writes WIDE columns of out[row] = (exp(logits - lse) - [column is the label]) * grad[row]."""
    row, c = tl.program_id(0).to(tl.int64), tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    wanted = tl.load(label + row)
    x = tl.load(logits + row * V + c, mask=c < V, other=0.0).to(tl.float32)
    d = (tl.exp(x - tl.load(lse + row)) - (c == wanted - first_id).to(tl.float32)) * tl.load(grad + row)
    tl.store(out + row * V + c, tl.where(wanted == -100, 0.0, d).to(out.dtype.element_ty), mask=c < V)


def cross_entropy_stats(logits: Tensor, label: Tensor, first_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """(max_T, sumexp_T, target_T) in fp32. A row of -inf alone has sumexp 0, where the reference has NaN."""
    logits, (tokens, V) = logits.contiguous(), logits.shape
    largest, sumexp, target = (logits.new_empty(tokens, dtype=torch.float32) for _ in range(3))
    if tokens:
        wide = min(WIDE, triton.next_power_of_2(V))
        cross_entropy_stats_kernel[(tokens,)](
            logits, label.contiguous(), largest, sumexp, target, V, first_id, wide, num_warps=8, **FUSED
        )
    return largest, sumexp, target


def cross_entropy_grad(logits: Tensor, label: Tensor, first_id: int, lse: Tensor, grad: Tensor) -> Tensor:
    """dlogits_TV in the dtype of logits; lse_T and grad_T are fp32."""
    logits, (tokens, V) = logits.contiguous(), logits.shape
    out = torch.empty_like(logits)
    if out.numel():
        wide = min(WIDE, triton.next_power_of_2(V))
        cross_entropy_grad_kernel[(tokens, triton.cdiv(V, wide))](
            logits,
            label.contiguous(),
            lse.contiguous(),
            grad.contiguous(),
            out,
            V,
            first_id,
            wide,
            num_warps=8,
            **FUSED,
        )
    return out
