"""Balancing losses by name, from statistics that are sums over tokens (`router.router_stats`).

With f_e = assignments / (k * tokens) and P_e = mean probability:

    name             value per layer                                                       at uniform routing
    micro_batch      E * sum_e f_e P_e over a data rank's micro-batch                       1
    sequence         the same per sequence, mean over sequences (by tokens)                 1   (DeepSeek)
    global_batch     f_e over the whole global batch, P_e over the micro-batch              1
    layerwise        k * micro_batch                                                       k
    hf_mixtral       as layerwise, but f and P pooled over all layers first                 k   (transformers)
    deepspeed_top2   f_e counts first choices only                                          1   (DeepSpeed, GShard)

Values are means over the MoE layers, so 1 (or k) means uniform; attention MoE layers have a mean of their own, which is
added. f carries no gradient. The names differ by constants and in what they balance; none is converted silently.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_engine.model.router import RouterStats


def balance_loss(name: str, kinds: Sequence[RouterStats], load: Sequence[Tensor] | None = None) -> Tensor:
    """The balancing loss of one micro-batch, a scalar: the mean of each kind of router, added up. At least one kind.

    The gradient flows through the probabilities alone. load: for each kind f_NE of the whole global batch (shares that
    sum to 1), needed by `global_batch`. Raises ValueError for an unknown name.
    """
    values = [_balance(name, stats, None if load is None else load[i]) for i, stats in enumerate(kinds)]
    return torch.stack(values).sum()


def z_loss(kinds: Sequence[RouterStats]) -> Tensor:
    """Mean over layers and tokens of logsumexp(logits)^2 (ST-MoE, arXiv 2202.08906), added over the kinds, a scalar."""
    return torch.stack([(stats.z_NB.sum(1) / stats.tokens_NB.sum(1)).mean() for stats in kinds]).sum()


def load_share(count_NE: Tensor) -> Tensor:
    """Assignment counts -> shares that sum to 1 in every layer."""
    return count_NE / count_NE.sum(1, keepdim=True).clamp(min=1)


def _balance(name: str, stats: RouterStats, load_NE: Tensor | None) -> Tensor:
    experts, top_k = stats.prob_NBE.shape[-1], stats.top_k
    tokens = stats.tokens_NB[0].sum()
    prob_NE = stats.prob_NBE.sum(1) / tokens
    share_NE = stats.count_NBE.sum(1) / (top_k * tokens)
    match name:
        case "micro_batch":
            return experts * (share_NE * prob_NE).sum(1).mean()
        case "layerwise":
            return top_k * experts * (share_NE * prob_NE).sum(1).mean()
        case "global_batch":
            assert load_NE is not None, "global_batch needs the load of the whole global batch"
            return experts * (load_NE * prob_NE).sum(1).mean()
        case "deepspeed_top2":
            return experts * (stats.first_NBE.sum(1) / tokens * prob_NE).sum(1).mean()
        case "hf_mixtral":
            return top_k * experts * (share_NE.mean(0) * prob_NE.mean(0)).sum()
        case "sequence":
            per_sequence = experts * (stats.count_NBE * stats.prob_NBE).sum(-1)
            return (per_sequence / (top_k * stats.tokens_NB.clamp(min=1))).sum(1).div(tokens).mean()
    raise ValueError(f"unknown balancing loss {name!r}")
