"""Balancing losses by name, from statistics that are sums over tokens.

A layer's router yields stats[B, X], X = 3E + 3, per sequence: sum of probabilities [E], assignments [E], first choices
[E], sum of logsumexp(logits)^2, dropped assignments, tokens. Assignments are the router's choices, before a capacity
drops any. Sums make every reduction (over tp, sequences, micro-batches, data ranks) an addition. With
f_e = assignments / (k * tokens) and P_e = mean probability:

    name             value per layer                                                       at uniform routing
    micro_batch      E * sum_e f_e P_e over a data rank's micro-batch                       1
    sequence         the same per sequence, mean over sequences (by tokens)                 1   (DeepSeek)
    global_batch     f_e over the whole global batch, P_e over the micro-batch              1
    layerwise        k * micro_batch                                                       k
    hf_mixtral       as layerwise, but f and P pooled over all layers first                 k   (transformers)
    deepspeed_top2   f_e counts first choices only                                          1   (DeepSpeed, GShard)

Values are means over the MoE layers, so 1 (or k) means uniform; attention MoE layers, whose routers come after those of
the feed-forward layers in N, have a mean of their own, which is added. f carries no gradient. The names differ by
constants and in what they balance; none is converted silently.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_engine.config import Model


class RouterStats(NamedTuple):
    """Sums over tokens, for N MoE layers and B sequences."""

    prob_NBE: Tensor
    count_NBE: Tensor
    first_NBE: Tensor
    z_NB: Tensor
    dropped_NB: Tensor
    tokens_NB: Tensor


def pack_stats(
    chosen_TK: Tensor, probs_TE: Tensor, z_T: Tensor, dropped_T: Tensor, experts: int | None = None
) -> Tensor:
    """Per-token columns [T, 3E + 3] of the statistics. chosen_TK: the router's choice, before a capacity drops any.

    experts: E of the widest router of the model, where routers differ; the columns of experts that are not are zero.
    """
    if experts is not None and experts > probs_TE.shape[1]:
        probs_TE = F.pad(probs_TE, (0, experts - probs_TE.shape[1]))
    none = torch.zeros_like(probs_TE)
    first = none.scatter(1, chosen_TK[:, :1].long(), 1.0)
    chosen = none.scatter(1, chosen_TK.long(), 1.0)
    return torch.cat([probs_TE, chosen, first, torch.stack([z_T, dropped_T, torch.ones_like(z_T)], 1)], 1)


def unpack_stats(stats_NBX: Tensor) -> RouterStats:
    """The named views of packed statistics [N, B, 3E + 3]."""
    experts = (stats_NBX.shape[-1] - 3) // 3
    prob, count, first, rest = stats_NBX.split([experts, experts, experts, 3], dim=-1)
    return RouterStats(prob, count.detach(), first.detach(), *rest.unbind(-1))


def balance_loss(name: str, stats: RouterStats, top_k: int, load_NE: Tensor | None = None) -> Tensor:
    """The balancing loss of one micro-batch, a scalar; the gradient flows through the probabilities alone.

    load_NE: f_e of the whole global batch (shares that sum to 1), needed by `global_batch`. Raises ValueError for an
    unknown name.
    """
    if not len(stats.prob_NBE):  # a dense model
        return stats.prob_NBE.new_zeros(())
    experts = stats.prob_NBE.shape[-1]
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


def z_loss(stats: RouterStats) -> Tensor:
    """Mean over layers and tokens of logsumexp(logits)^2 (ST-MoE, arXiv 2202.08906), a scalar."""
    return (stats.z_NB.sum(1) / stats.tokens_NB.sum(1)).mean() if len(stats.z_NB) else stats.z_NB.new_zeros(())


def by_kind(
    config: Model, stats: RouterStats, load_NE: Tensor | None = None
) -> Iterator[tuple[int, RouterStats, Tensor | None]]:
    """k, statistics and load of the feed-forward routers, then of the attention routers where there are any."""
    if not config.num_attention_moe_layers:
        yield config.num_experts_per_tok, stats, load_NE
        return
    first = len(stats.z_NB) - config.num_attention_moe_layers
    for k, rows, experts in (
        (config.num_experts_per_tok, slice(0, first), config.num_local_experts),
        (config.num_attention_experts_per_tok, slice(first, None), config.num_attention_experts),
    ):
        wide = (field[rows, :, :experts] for field in stats[:3])
        part = RouterStats(*wide, *(field[rows] for field in stats[3:]))
        yield k, part, None if load_NE is None else load_NE[rows, :experts]


def total_balance(config: Model, name: str, stats: RouterStats, load_NE: Tensor | None = None) -> Tensor:
    """The balancing loss of all routers of a model, a scalar: the mean of each kind of layer, added up."""
    kinds = by_kind(config, stats, load_NE)
    return torch.stack([balance_loss(name, part, k, load) for k, part, load in kinds]).sum()


def total_z(config: Model, stats: RouterStats) -> Tensor:
    """The z-loss of all routers of a model, a scalar, as in `total_balance`."""
    return torch.stack([z_loss(part) for _, part, _ in by_kind(config, stats)]).sum()


def router_loss(config: Model, stats: RouterStats, load_NE: Tensor | None = None) -> Tensor:
    """What one micro-batch adds to the objective per token: aux_coef * balance + z_coef * z."""
    total = stats.prob_NBE.new_zeros(())
    if config.router_aux_loss != "none" and config.router_aux_loss_coef:
        balance = total_balance(config, config.router_aux_loss, stats, load_NE)
        total = total + config.router_aux_loss_coef * balance
    if config.router_z_loss_coef:
        total = total + config.router_z_loss_coef * total_z(config, stats)
    return total
