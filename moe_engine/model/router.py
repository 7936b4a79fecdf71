"""Routers: which experts each token goes to, returned as it was decided, and the sums that losses and logs are made of.

    logits[T/tp, E] -> softmax over E in fp32, top-k, renormalise, scale, drop past the capacity -> Routing

Every router of a model returns its `Routing`; nothing else of a layer is needed to balance, supervise, log or analyse
it. `router_stats` makes the sums over groups of tokens once, at the top, for all layers, with one collective over tp.

The router weight is replicated over tp while every tp rank routes tokens of its own, so its gradient is summed over tp
(`copy_to`). Dropless by default; a capacity factor drops, per rank and micro-batch, what lies past
ceil(factor * T/tp * K / E) rows of an expert, later tokens first, without renormalising the weights that remain.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moe_engine.config import Model
from moe_engine.ops import router_logits, router_topk, sort_by_expert
from moe_engine.parallel.collectives import copy_to, reduce_from
from moe_engine.parallel.mesh import Axis
from moe_engine.parallel.weight import weight


class Routing(NamedTuple):
    """What one router decided for this rank's tokens, T/tp of them. Gradients flow through logits, probs and weights.

    logits_TE, probs_TE, weight_TK, lse_T (of the logits) fp32; chosen_TK int32 is the choice before any drop, best
    first; index_TK int32 the choice that is carried out, E = dropped; dropped_T fp32 counts a token's dropped
    assignments.
    """

    logits_TE: Tensor
    probs_TE: Tensor
    lse_T: Tensor
    chosen_TK: Tensor
    index_TK: Tensor
    weight_TK: Tensor
    dropped_T: Tensor


class Router(nn.Module):
    """Scores in fp32 whatever the model's precision; ties go to the lowest index.

    renormalize: the chosen weights are divided by their sum. scale multiplies them. capacity_factor None: dropless.

    expert_bias[E] (fp32, no gradient, None unless `biased`) steers the choice of experts and never their weights; the
    training step moves it by `expert_bias_update_rate * sign(mean load - load)` (aux-loss-free balancing, arXiv
    2408.15664).
    """

    expert_bias: Tensor | None

    def __init__(
        self,
        config: Model,
        tp: Axis,
        experts: int,
        top_k: int,
        scale: float,
        renormalize: bool = True,
        capacity_factor: float | None = None,
        biased: bool = False,
    ):
        super().__init__()
        self.tp, self.experts, self.top_k, self.scale = tp, experts, top_k, scale
        self.renormalize, self.capacity_factor = renormalize, capacity_factor
        self.jitter = config.router_jitter_noise
        self.weight = weight((experts, config.hidden_size), std=config.initializer_range)
        self.register_buffer("expert_bias", torch.zeros(experts) if biased else None, persistent=False)

    def forward(self, x_TD: Tensor) -> Routing:
        """x[T/tp, D] -> the Routing of these tokens. In training mode `router_jitter_noise` first multiplies x by
        numbers drawn evenly from 1 - noise to 1 + noise, in fp32."""
        if self.training and self.jitter:
            noise_TD = torch.empty_like(x_TD, dtype=torch.float32)
            x_TD = x_TD * noise_TD.uniform_(1 - self.jitter, 1 + self.jitter)
        logits_TE = router_logits(x_TD, copy_to(self.weight, self.tp))
        weight_TK, chosen_TK, probs_TE, lse_T = router_topk(logits_TE, self.top_k, self.renormalize, self.expert_bias)
        weight_TK = weight_TK * self.scale
        dropped_TK = self._overflow(chosen_TK)
        if dropped_TK is None:
            return Routing(logits_TE, probs_TE, lse_T, chosen_TK, chosen_TK, weight_TK, torch.zeros_like(lse_T))
        weight_TK = weight_TK.masked_fill(dropped_TK, 0)
        index_TK = chosen_TK.masked_fill(dropped_TK, self.experts)
        return Routing(logits_TE, probs_TE, lse_T, chosen_TK, index_TK, weight_TK, dropped_TK.sum(1).to(lse_T))

    def _overflow(self, index_TK: Tensor) -> Tensor | None:
        """True for assignments past the capacity of their expert, in order of tokens; None when dropless."""
        if self.capacity_factor is None:
            return None
        capacity = math.ceil(self.capacity_factor * index_TK.numel() / self.experts)
        counts_E, _, row_of_TK = sort_by_expert(index_TK, self.experts)
        first_row_E = counts_E.cumsum(0) - counts_E
        return row_of_TK - first_row_E[index_TK.long()] >= capacity


class RouterStats(NamedTuple):
    """Sums over the tokens of B groups, for the N routers of one kind, on all tp ranks; fp32.

    prob: of probabilities. count: assignments, the routers' choices before a capacity drops any. first: first choices.
    z: of logsumexp(logits)^2. dropped: assignments. tokens. Sums make every reduction (over tp, groups, micro-batches,
    data ranks) an addition.
    """

    top_k: int
    prob_NBE: Tensor
    count_NBE: Tensor
    first_NBE: Tensor
    z_NB: Tensor
    dropped_NB: Tensor
    tokens_NB: Tensor


def router_stats(kinds: Sequence[Sequence[Routing]], group_T: Tensor, groups: int, tp: Axis) -> tuple[RouterStats, ...]:
    """The statistics of each kind of router (feed-forward, attention) by group of tokens; one collective over tp.

    group_T: int64, the group of each of this rank's tokens, 0 .. groups - 1; any other number is not counted.
    """
    kinds = [routings for routings in kinds if routings]
    if not kinds:
        return ()
    member_BT = group_T == torch.arange(groups, device=group_T.device).unsqueeze(1)
    member_BT = member_BT.to(kinds[0][0].probs_TE.dtype)
    sums = [member_BT @ _columns(routing) for routings in kinds for routing in routings]
    flat = reduce_from(torch.cat([sum_BX.flatten() for sum_BX in sums]), tp)
    parts = iter(flat.split([sum_BX.numel() for sum_BX in sums]))
    return tuple(_stats(routings, torch.stack([next(parts) for _ in routings]), groups) for routings in kinds)


def _columns(routing: Routing) -> Tensor:
    """What is added up of each token, [T, 3E + 3]."""
    none_TE = torch.zeros_like(routing.probs_TE)
    first_TE = none_TE.scatter(1, routing.chosen_TK[:, :1].long(), 1.0)
    chosen_TE = none_TE.scatter(1, routing.chosen_TK.long(), 1.0)
    z_T = routing.lse_T.square()
    rest_T3 = torch.stack([z_T, routing.dropped_T, torch.ones_like(z_T)], 1)
    return torch.cat([routing.probs_TE, chosen_TE, first_TE, rest_T3], 1)


def _stats(routings: Sequence[Routing], sums_NX: Tensor, groups: int) -> RouterStats:
    experts, top_k = routings[0].probs_TE.shape[1], routings[0].chosen_TK.shape[1]
    sums_NBX = sums_NX.view(len(routings), groups, 3 * experts + 3)
    prob, count, first, rest = sums_NBX.split([experts, experts, experts, 3], dim=-1)
    return RouterStats(top_k, prob, count.detach(), first.detach(), *rest.unbind(-1))
