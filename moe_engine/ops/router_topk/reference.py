"""Definition of router_topk in plain torch."""

import torch
from torch import Tensor


def router_topk(
    logits: Tensor, k: int, renormalize: bool, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(weight_TK, index_TK int32, probs_TE, lse_T). The choice is a stable descending sort of softmax(logits) + bias;
    the weights are the unbiased probabilities, divided by their sum over K if renormalize."""
    probs = torch.softmax(logits, dim=-1)
    score = probs if bias is None else probs + bias
    index = torch.sort(score, dim=-1, descending=True, stable=True).indices[:, :k].contiguous()
    weight = probs.gather(-1, index)
    if renormalize:
        weight = weight / weight.sum(-1, keepdim=True)
    return weight, index.int(), probs, logits.logsumexp(-1)


def router_topk_backward(
    grad_weight: Tensor, grad_probs: Tensor, grad_lse: Tensor, index: Tensor, probs: Tensor, renormalize: bool
) -> Tensor:
    """dlogits = p * (g - sum_E g * p + grad_lse), g = grad_probs with grad_weight added at index.

    With renormalize, grad_weight is first (grad_weight - sum_K grad_weight * w) / s, w = p[index] / s, s = sum_K
    p[index]."""
    index = index.long()
    if renormalize:
        chosen = probs.gather(-1, index)
        total = chosen.sum(-1, keepdim=True)
        grad_weight = (grad_weight - (grad_weight * chosen / total).sum(-1, keepdim=True)) / total
    grad = grad_probs.scatter_add(-1, index, grad_weight)
    return probs * (grad - (grad * probs).sum(-1, keepdim=True) + grad_lse[:, None])
