"""router_logits on CUDA: a matrix product as wide as there are experts, its sums in fp32.

Operands of one 16-bit dtype are multiplied as they are: their products are exact in fp32. Others, and the gradients,
are widened and multiplied in full fp32. dw sums over all tokens: each stretch of tokens gives a part, and the parts are
added in order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_engine.ops.tune import FUSED

ROWS, DEPTH, STRETCH = 64, 64, 1024


@triton.jit
def router_logits_kernel(
    x, w, logits, tokens, experts, D, WIDEN: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, E_PAD: tl.constexpr
):
    t, e, at = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, E_PAD), tl.arange(0, DEPTH)
    sums = tl.zeros((ROWS, E_PAD), tl.float32)
    for first in range(0, D, DEPTH):
        d = first + at
        left = tl.load(
            x + t.to(tl.int64)[:, None] * D + d[None, :], mask=(t < tokens)[:, None] & (d < D)[None, :], other=0.0
        )
        right = tl.load(w + e[None, :] * D + d[:, None], mask=(e < experts)[None, :] & (d < D)[:, None], other=0.0)
        if WIDEN:
            left, right = left.to(tl.float32), right.to(tl.float32)
        sums = tl.dot(left, right, sums, input_precision="ieee")
    inside = (t < tokens)[:, None] & (e < experts)[None, :]
    tl.store(logits + t.to(tl.int64)[:, None] * experts + e[None, :], sums, mask=inside)


@triton.jit
def router_dx_kernel(grad, w, dx, tokens, experts, D, ROWS: tl.constexpr, DEPTH: tl.constexpr, WIDE: tl.constexpr):
    t, d = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    sums = tl.zeros((ROWS, WIDE), tl.float32)
    for first in range(0, experts, DEPTH):
        e = first + tl.arange(0, DEPTH)
        left = tl.load(
            grad + t.to(tl.int64)[:, None] * experts + e[None, :],
            mask=(t < tokens)[:, None] & (e < experts)[None, :], other=0.0,
        )  # fmt: skip
        right = tl.load(w + e[:, None] * D + d[None, :], mask=(e < experts)[:, None] & (d < D)[None, :], other=0.0)
        sums = tl.dot(left, right.to(tl.float32), sums, input_precision="ieee")
    inside = (t < tokens)[:, None] & (d < D)[None, :]
    tl.store(dx + t.to(tl.int64)[:, None] * D + d[None, :], sums.to(dx.dtype.element_ty), mask=inside)


@triton.jit
def router_dw_kernel(
    grad,
    x,
    parts,
    tokens,
    experts,
    D,
    STRETCH: tl.constexpr,
    DEPTH: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
):
    e, d = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.program_id(2) * WIDE + tl.arange(0, WIDE)
    first = tl.program_id(0) * STRETCH
    sums = tl.zeros((ROWS, WIDE), tl.float32)
    for at in range(first, tl.minimum(first + STRETCH, tokens), DEPTH):
        t = at + tl.arange(0, DEPTH)
        left = tl.load(
            grad + t.to(tl.int64)[None, :] * experts + e[:, None],
            mask=(t < tokens)[None, :] & (e < experts)[:, None], other=0.0,
        )  # fmt: skip
        right = tl.load(
            x + t.to(tl.int64)[:, None] * D + d[None, :], mask=(t < tokens)[:, None] & (d < D)[None, :], other=0.0
        )
        sums = tl.dot(left, right.to(tl.float32), sums, input_precision="ieee")
    to = parts + (tl.program_id(0).to(tl.int64) * experts + e)[:, None] * D + d[None, :]
    tl.store(to, sums, mask=(e < experts)[:, None] & (d < D)[None, :])


def router_logits(x: Tensor, w: Tensor) -> Tensor:
    x, w, (tokens, D), experts = x.contiguous(), w.contiguous(), x.shape, w.shape[0]
    logits = x.new_empty(tokens, experts, dtype=torch.float32)
    if tokens:
        widen, e_pad = x.dtype != w.dtype or x.dtype == torch.float32, max(16, triton.next_power_of_2(experts))
        router_logits_kernel[(triton.cdiv(tokens, ROWS),)](
            x, w, logits, tokens, experts, D, widen, ROWS, 32 if widen else DEPTH, e_pad, num_stages=3, **FUSED
        )
    return logits


def router_logits_backward(grad: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    grad, x, w, (tokens, D), experts = grad.contiguous(), x.contiguous(), w.contiguous(), x.shape, w.shape[0]
    dx, stretches = torch.empty_like(x), triton.cdiv(tokens, STRETCH)
    parts = x.new_empty(stretches, experts, D, dtype=torch.float32)
    if tokens:
        router_dx_kernel[(triton.cdiv(tokens, 32), triton.cdiv(D, 64))](
            grad, w, dx, tokens, experts, D, 32, 16, 64, num_stages=2, **FUSED
        )
        router_dw_kernel[(stretches, triton.cdiv(experts, 16), triton.cdiv(D, 64))](
            grad, x, parts, tokens, experts, D, STRETCH, 32, 16, 64, num_stages=2, **FUSED
        )
    return dx, parts.sum(0).to(w.dtype)
