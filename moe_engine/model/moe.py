"""The Mixture-of-Experts layer, and all the bytes that it moves:

    x[T/tp, D]   route      softmax over E in fp32, top-k, renormalise          this rank's tokens only
                 permute    rows sorted by expert                               R = T/tp * K rows
                 dispatch   all_to_all over ep, all_gather over tp              M rows
                 experts    grouped matmuls on w[L, .., F/tp, ..]               y[M, D]{tp}
                 combine    reduce_scatter over tp, all_to_all over ep          R rows
    y[T/tp, D]   unpermute  sum over the k rows of a token, times their weights

The router weight is replicated over tp while every tp rank routes tokens of its own, so its gradient is summed over tp
(`copy_to`). Dropless by default; a capacity factor drops, per rank and micro-batch, what lies past
ceil(factor * T/tp * K / E) rows of an expert, later tokens first, without renormalising the weights that remain.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_engine.config import Model
from moe_engine.model.router_losses import pack_stats
from moe_engine.ops import grouped_mm, permute, router_topk, sort_by_expert, swiglu, unpermute
from moe_engine.parallel.collectives import copy_to, reduce_from
from moe_engine.parallel.dispatch import combine, dispatch
from moe_engine.parallel.mesh import Mesh
from moe_engine.parallel.weight import weight


class Routing(NamedTuple):
    """Where each token goes. index_TK int32, E = dropped; chosen_TK is the router's choice before any drop.

    weight_TK, probs_TE fp32; z_T = logsumexp(logits)^2; dropped_T counts a token's dropped assignments.
    """

    weight_TK: Tensor
    index_TK: Tensor
    chosen_TK: Tensor
    probs_TE: Tensor
    z_T: Tensor
    dropped_T: Tensor


class Router(nn.Module):
    """Scores in fp32 whatever the model's precision; ties go to the lowest index.

    expert_bias[E] (fp32, no gradient) steers the choice of experts and never their weights; the training step moves
    it by `expert_bias_update_rate * sign(mean load - load)` (aux-loss-free balancing, arXiv 2408.15664).
    """

    def __init__(self, config: Model, mesh: Mesh):
        super().__init__()
        self.config, self.tp = config, mesh.tp
        self.weight = weight((config.num_local_experts, config.hidden_size), std=config.initializer_range)
        self.expert_bias: Tensor | None
        bias = torch.zeros(config.num_local_experts) if config.expert_bias_update_rate else None
        self.register_buffer("expert_bias", bias, persistent=False)

    def forward(self, x_TD: Tensor) -> Routing:
        config = self.config
        x_TD = x_TD.float()
        if self.training and config.router_jitter_noise:
            x_TD = x_TD * torch.empty_like(x_TD).uniform_(
                1 - config.router_jitter_noise, 1 + config.router_jitter_noise
            )
        logits_TE = F.linear(x_TD, copy_to(self.weight, self.tp).float())
        weight_TK, chosen_TK, probs_TE = router_topk(
            logits_TE, config.num_experts_per_tok, config.norm_topk_prob, self.expert_bias
        )
        weight_TK = weight_TK * config.routed_scaling_factor
        z_T = logits_TE.logsumexp(1).square()
        dropped_TK = self._overflow(chosen_TK)
        if dropped_TK is None:
            return Routing(weight_TK, chosen_TK, chosen_TK, probs_TE, z_T, torch.zeros_like(z_T))
        weight_TK = weight_TK.masked_fill(dropped_TK, 0)
        index_TK = chosen_TK.masked_fill(dropped_TK, config.num_local_experts)
        return Routing(weight_TK, index_TK, chosen_TK, probs_TE, z_T, dropped_TK.sum(1).float())

    def _overflow(self, index_TK: Tensor) -> Tensor | None:
        """True for assignments past the capacity of their expert, in order of tokens; None when dropless."""
        config = self.config
        if config.capacity_factor is None:
            return None
        experts = config.num_local_experts
        capacity = math.ceil(config.capacity_factor * index_TK.numel() / experts)
        counts_E, _, row_of_TK = sort_by_expert(index_TK, experts)
        first_row_E = counts_E.cumsum(0) - counts_E
        return row_of_TK - first_row_E[index_TK.long()] >= capacity


class Experts(nn.Module):
    """The experts of this rank: w_gate_up[E/ep, 2, F/tp, D] (gate, then up) and w_down[E/ep, D, F/tp]."""

    def __init__(self, config: Model, mesh: Mesh):
        super().__init__()
        experts, width, hidden = config.num_local_experts, config.moe_intermediate_size, config.hidden_size
        cut = {0: mesh.ep, 2: mesh.tp}
        self.w_gate_up = weight((experts, 2, width, hidden), cut=cut, std=config.initializer_range)
        self.w_down = weight((experts, hidden, width), cut=cut, std=config.initializer_range)

    def forward(self, rows_MD: Tensor, counts_L: Tensor) -> Tensor:
        """rows sorted by local expert -> y[M, D]{tp}; rows past sum(counts) give zeros."""
        h_MF = swiglu(grouped_mm(rows_MD, self.w_gate_up.flatten(1, 2), counts_L))
        return grouped_mm(h_MF, self.w_down, counts_L)


class MoE(nn.Module):
    """Router and experts of one layer. Returns the layer's output and the router's statistics for losses and logs."""

    def __init__(self, config: Model, mesh: Mesh):
        super().__init__()
        self.experts_total, self.ep, self.tp = config.num_local_experts, mesh.ep, mesh.tp
        self.router = Router(config, mesh)
        self.experts = Experts(config, mesh)

    def forward(self, x_TD: Tensor, member_BT: Tensor) -> tuple[Tensor, Tensor]:
        """x[T/tp, D], normalised; member_BT: 1 where a local token counts for a sequence, 0 for padding.

        Returns y[T/tp, D] and stats[B, X] (see router_losses), complete on every tp rank.
        """
        routing = self.router(x_TD)
        counts_E, token_of_row_R, row_of_TK = sort_by_expert(routing.index_TK, self.experts_total)
        rows_RD = permute(x_TD, token_of_row_R, row_of_TK)
        rows_RD = self._on_experts(rows_RD, counts_E)
        y_TD = unpermute(rows_RD, routing.weight_TK, row_of_TK)
        return y_TD, reduce_from(member_BT @ pack_stats(*routing[2:]), self.tp)

    def _on_experts(self, rows_RD: Tensor, counts_E: Tensor) -> Tensor:
        if self.ep.size == self.tp.size == 1:
            return self.experts(rows_RD, counts_E)
        rows_MD, expert_M, route = dispatch(rows_RD, counts_E, self.ep, self.tp)
        counts_L, source_of_M, place_of_M1 = sort_by_expert(expert_M.unsqueeze(1), self.experts_total // self.ep.size)
        rows_MD = self.experts(permute(rows_MD, source_of_M, place_of_M1), counts_L)
        rows_MD = permute(rows_MD, place_of_M1.squeeze(1), source_of_M.unsqueeze(1))  # back to arrival order
        return combine(rows_MD, route, self.ep, self.tp)
