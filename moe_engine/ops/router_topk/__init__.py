"""Router: softmax over all experts, then the top k.

    probs_TE = softmax(logits_TE)                    in fp32, over all experts
    index_TK = top k of probs (+ bias_E)             best first, ties to the lowest index
    weight_TK = probs[index] (/ their sum)           from the unbiased probs; divided if `renormalize`
    lse_T     = log sum_E exp(logits)                for the z-loss

The bias (balancing without an aux loss, arXiv 2408.15664) only picks: the weights do not contain it and it gets no
gradient. Gradients reach the logits from the weights, from probs and from lse; probs alone is kept. Mixtral's softmax
over the top-2 logits is `renormalize`.
"""

import torch
from torch import Tensor

from moe_engine.ops.backend import on_cuda
from moe_engine.ops.router_topk import reference

_forward = torch.library.custom_op("moe_engine::router_topk", reference.router_topk, mutates_args=())
_backward = torch.library.custom_op("moe_engine::router_topk_backward", reference.router_topk_backward, mutates_args=())
on_cuda(__name__, router_topk=_forward, router_topk_backward=_backward)


def router_topk(
    logits_TE: Tensor, k: int, renormalize: bool, bias_E: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Choose k experts per token: (weight_TK f32, index_TK int32, probs_TE f32, lse_T f32), slots by descending
    probs + bias.

    logits_TE: f32 (fp64 is kept). bias_E: f32 or None. Raises ValueError for k outside 1..E and for other dtypes."""
    experts = logits_TE.shape[-1]
    if not 1 <= k <= experts:
        raise ValueError(f"found k = {k}, expected 1 to {experts}, the number of experts")
    if logits_TE.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"found logits in {logits_TE.dtype}, expected float32: the router decides in fp32")
    return torch.ops.moe_engine.router_topk(logits_TE, k, renormalize, bias_E)


@_forward.register_fake
def _(logits, k, renormalize, bias):
    tokens = logits.shape[0]
    index = logits.new_empty(tokens, k, dtype=torch.int32)
    return logits.new_empty(tokens, k), index, logits.new_empty(logits.shape), logits.new_empty(tokens)


@_backward.register_fake
def _(grad_weight, grad_probs, grad_lse, index, probs, renormalize):
    return probs.new_empty(probs.shape)


def _save(ctx, inputs, output):
    ctx.save_for_backward(output[1], output[2])
    ctx.renormalize = inputs[2]


def _differentiate(ctx, grad_weight, grad_index, grad_probs, grad_lse):
    index, probs = ctx.saved_tensors
    grad = torch.ops.moe_engine.router_topk_backward(grad_weight, grad_probs, grad_lse, index, probs, ctx.renormalize)
    return grad, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)
