"""router_logits on CUDA: a matrix product as wide as there are experts, its sums in fp32.

Operands of one 16-bit dtype are multiplied as they are: their products are exact in fp32. Others are widened and
multiplied in full fp32. The gradients have an fp32 operand; if the other is 16 bits wide, three TF32 products stand
for one in fp32, good to about 1e-6 (on AMD, where matrix cores multiply fp32, one does). dw sums over all tokens: each
stretch of tokens gives a part, and the parts are added in order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_engine.ops import tune

STRETCH, STRETCHES = 1024, 32  # at least so many tokens in a stretch, at most so many stretches


@triton.jit(do_not_specialize=["tokens"])
def router_logits_kernel(
    x, w, logits, tokens, experts, D, WIDEN: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, E_PAD: tl.constexpr
):
    """ROWS tokens by all experts a program, DEPTH of D at a time. E_PAD: the experts padded to a power of two, 16 or
    more. WIDEN: operands become fp32 before the product."""
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


@triton.jit(do_not_specialize=["tokens"])
def router_dx_kernel(
    grad, w, dx, tokens, experts, D, PRECISION: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """dx = grad[T, E] @ w[E, D], ROWS tokens by WIDE columns a program, DEPTH experts at a time."""
    t, d = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    sums = tl.zeros((ROWS, WIDE), tl.float32)
    for first in range(0, experts, DEPTH):
        e = first + tl.arange(0, DEPTH)
        left = tl.load(
            grad + t.to(tl.int64)[:, None] * experts + e[None, :],
            mask=(t < tokens)[:, None] & (e < experts)[None, :], other=0.0,
        )  # fmt: skip
        right = tl.load(w + e[:, None] * D + d[None, :], mask=(e < experts)[:, None] & (d < D)[None, :], other=0.0)
        sums = tl.dot(left, right.to(tl.float32), sums, input_precision=PRECISION)
    inside = (t < tokens)[:, None] & (d < D)[None, :]
    tl.store(dx + t.to(tl.int64)[:, None] * D + d[None, :], sums.to(dx.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens", "stretch"])
def router_dw_kernel(
    grad, x, parts, tokens, experts, D, stretch, PRECISION: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """parts[s] = grad.T @ x over the `stretch` tokens from s * stretch on, ROWS experts by WIDE columns a program;
    parts is fp32 [stretches, E, D]."""
    e, d = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.program_id(2) * WIDE + tl.arange(0, WIDE)
    first = tl.program_id(0) * stretch
    sums = tl.zeros((ROWS, WIDE), tl.float32)
    for at in range(first, tl.minimum(first + stretch, tokens), DEPTH):
        t = at + tl.arange(0, DEPTH)
        left = tl.load(
            grad + t.to(tl.int64)[None, :] * experts + e[:, None],
            mask=(t < tokens)[None, :] & (e < experts)[:, None], other=0.0,
        )  # fmt: skip
        right = tl.load(
            x + t.to(tl.int64)[:, None] * D + d[None, :], mask=(t < tokens)[:, None] & (d < D)[None, :], other=0.0
        )
        sums = tl.dot(left, right.to(tl.float32), sums, input_precision=PRECISION)
    to = parts + (tl.program_id(0).to(tl.int64) * experts + e)[:, None] * D + d[None, :]
    tl.store(to, sums, mask=(e < experts)[:, None] & (d < D)[None, :])


def router_logits(x: Tensor, w: Tensor) -> Tensor:
    """logits_TE fp32. 16-bit operands of one dtype go to the matrix cores as they are."""
    x, w, (tokens, D), experts = x.contiguous(), w.contiguous(), x.shape, w.shape[0]
    logits = x.new_empty(tokens, experts, dtype=torch.float32)
    if tokens:
        widen, e_pad = x.dtype != w.dtype or x.dtype == torch.float32, max(16, triton.next_power_of_2(experts))
        rows, depth = (16, 16) if widen else (64, 64)
        router_logits_kernel[(triton.cdiv(tokens, rows),)](
            x, w, logits, tokens, experts, D, widen, rows, depth, e_pad, **tune.launch_options(3)
        )
    return logits


def router_logits_backward(grad: Tensor, x: Tensor, w: Tensor, need_x: bool, need_w: bool) -> tuple[Tensor, Tensor]:
    """(dx_TD, dw_ED) in the dtypes of x and w; one that is not needed has no elements. dw is the sum of at most 32 fp32
    parts of [E, D]."""
    grad, x, w, (tokens, D), experts = grad.contiguous(), x.contiguous(), w.contiguous(), x.shape, w.shape[0]
    dx, dw = x.new_empty(x.shape if need_x else 0), w.new_empty(w.shape if need_w else 0)
    precision, options = tune.mixed_precision(x.dtype), tune.launch_options(2)
    if tokens and need_x:
        router_dx_kernel[(triton.cdiv(tokens, 32), triton.cdiv(D, 64))](
            grad, w, dx, tokens, experts, D, precision, 32, 16, 64, **options
        )
    if need_w:
        stretch = max(STRETCH, triton.cdiv(tokens, STRETCHES))
        stretches, rows = triton.cdiv(tokens, stretch), 16 if experts <= 16 else 64
        parts = x.new_empty(stretches, experts, D, dtype=torch.float32)
        if tokens:
            router_dw_kernel[(stretches, triton.cdiv(experts, rows), triton.cdiv(D, 64))](
                grad, x, parts, tokens, experts, D, stretch, precision, rows, 16, 64, **options
            )
        dw = parts.sum(0).to(w.dtype)
    return dx, dw
