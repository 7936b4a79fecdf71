"""router_topk on CUDA: one program has whole rows of logits, so softmax, choice and weights need a single read.

The k choices are k maxima in turn, the lowest index among equals, each taken out before the next. NaN counts as the
largest score, as in torch.sort.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_engine.ops.tune import FUSED


@triton.jit(do_not_specialize=["tokens"])
def router_topk_kernel(
    logits, bias, weight, index, probs, lse, tokens, experts,
    K: tl.constexpr, RENORMALIZE: tl.constexpr, BIASED: tl.constexpr, ROWS: tl.constexpr, E_PAD: tl.constexpr,
    K_PAD: tl.constexpr,
):  # fmt: skip
    """ROWS rows of logits[T, E] a program -> weight[T, K], index[T, K], probs[T, E], lse[T]. E_PAD and K_PAD are E and
    K padded to powers of two. bias[E] is read only if BIASED."""
    t, e, choice = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, E_PAD), tl.arange(0, K_PAD)
    there, at = t < tokens, t.to(tl.int64)[:, None]
    inside = there[:, None] & (e < experts)[None, :]
    x = tl.load(logits + at * experts + e[None, :], mask=inside, other=float("-inf"))
    largest = tl.max(x, 1)
    exponential = tl.exp(x - largest[:, None])
    total = tl.sum(exponential, 1)
    p = exponential / total[:, None]
    tl.store(probs + at * experts + e[None, :], p, mask=inside)
    tl.store(lse + t, largest + tl.log(total), mask=there)
    score = p
    if BIASED:
        score += tl.load(bias + e, mask=e < experts, other=0.0)[None, :]
    score = tl.where(score == score, score, float("inf"))
    free = tl.broadcast_to((e < experts)[None, :], (ROWS, E_PAD))
    chosen, taken = tl.zeros((ROWS, K_PAD), tl.int32), tl.zeros((ROWS, K_PAD), tl.float32)
    for j in tl.static_range(K):
        best = tl.max(tl.where(free, score, float("-inf")), 1)
        winner = tl.min(tl.where(free & (score == best[:, None]), e[None, :], E_PAD), 1)
        won = e[None, :] == winner[:, None]
        free = free & ~won
        chosen = tl.where(choice[None, :] == j, winner[:, None], chosen)
        taken = tl.where(choice[None, :] == j, tl.sum(tl.where(won, p, 0.0), 1)[:, None], taken)
    if RENORMALIZE:
        taken = taken / tl.sum(taken, 1)[:, None]
    slots = there[:, None] & (choice < K)[None, :]
    tl.store(index + at * K + choice[None, :], chosen, mask=slots)
    tl.store(weight + at * K + choice[None, :], taken, mask=slots)


@triton.jit(do_not_specialize=["tokens"])
def router_topk_backward_kernel(
    grad_weight, grad_probs, grad_lse, index, probs, grad, tokens, experts,
    K: tl.constexpr, RENORMALIZE: tl.constexpr, ROWS: tl.constexpr, E_PAD: tl.constexpr,
):  # fmt: skip
    """ROWS rows a program: grad[T, E] of the logits by the formula in reference.py; K passes over index stand for its
    scatter."""
    t, e = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, E_PAD)
    there, at = t < tokens, t.to(tl.int64)
    inside, place = there[:, None] & (e < experts)[None, :], at[:, None] * experts + e[None, :]
    p = tl.load(probs + place, mask=inside, other=0.0)
    g = tl.load(grad_probs + place, mask=inside, other=0.0)
    total, mean = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
    if RENORMALIZE:
        for j in tl.static_range(K):
            expert = tl.load(index + at * K + j, mask=there, other=0)
            taken = tl.load(probs + at * experts + expert, mask=there, other=1.0)
            total += taken
            mean += taken * tl.load(grad_weight + at * K + j, mask=there, other=0.0)
        mean /= total
    for j in tl.static_range(K):
        expert = tl.load(index + at * K + j, mask=there, other=0)
        of_weight = tl.load(grad_weight + at * K + j, mask=there, other=0.0)
        if RENORMALIZE:
            of_weight = (of_weight - mean) / total
        g += tl.where(e[None, :] == expert[:, None], of_weight[:, None], 0.0)
    of_lse = tl.load(grad_lse + t, mask=there, other=0.0)
    tl.store(grad + place, p * (g - tl.sum(g * p, 1)[:, None] + of_lse[:, None]), mask=inside)


def _rows(e_pad: int) -> int:
    return max(1, min(32, 2048 // e_pad))


def router_topk(
    logits: Tensor, k: int, renormalize: bool, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(weight_TK, index_TK int32, probs_TE, lse_T) from one launch."""
    logits = logits.contiguous()
    tokens, experts = logits.shape
    weight, index = logits.new_empty(tokens, k), logits.new_empty(tokens, k, dtype=torch.int32)
    probs, lse, e_pad = torch.empty_like(logits), logits.new_empty(tokens), triton.next_power_of_2(experts)
    if tokens:
        router_topk_kernel[(triton.cdiv(tokens, _rows(e_pad)),)](
            logits, logits if bias is None else bias.to(logits.dtype).contiguous(), weight, index, probs, lse, tokens,
            experts, k, renormalize, bias is not None, _rows(e_pad), e_pad, triton.next_power_of_2(k), **FUSED,
        )  # fmt: skip
    return weight, index, probs, lse


def router_topk_backward(
    grad_weight: Tensor, grad_probs: Tensor, grad_lse: Tensor, index: Tensor, probs: Tensor, renormalize: bool
) -> Tensor:
    """dlogits_TE, fp32 like probs."""
    (tokens, experts), grad, e_pad = probs.shape, torch.empty_like(probs), triton.next_power_of_2(probs.shape[1])
    if tokens:
        router_topk_backward_kernel[(triton.cdiv(tokens, _rows(e_pad)),)](
            grad_weight.contiguous(), grad_probs.contiguous(), grad_lse.contiguous(), index, probs, grad, tokens,
            experts, index.shape[1], renormalize, _rows(e_pad), e_pad, **FUSED,
        )  # fmt: skip
    return grad
