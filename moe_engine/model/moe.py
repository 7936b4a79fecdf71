"""The Mixture-of-Experts layer, and all the bytes that it moves:

    x[T/tp, D]   route      softmax over E in fp32, top-k, renormalise             this rank's tokens only
                 permute    rows sorted by expert                                  R = T/tp * K rows
                 dispatch   rows and their weights: all_to_all over ep, all_gather over tp        M rows
                 experts    weighted SwiGLU on w[L, .., F/tp, ..]                  y[M, D]{tp}
                 combine    reduce_scatter over tp, all_to_all over ep             R rows
    y[T/tp, D]   unpermute  sum over the k rows of a token

Where ep = 1 nothing is permuted: `experts` reads the tokens themselves, all_gathered over tp, and sums each token's
rows; y[T, D]{tp} is reduce_scattered. With ep > 1 each arriving row is a token with one expert. A row's weight travels
with it, so that its gradient is computed where the expert is and the experts' outputs need not be kept; what does not
depend on the rows that travel, the statistics of the router and the shared expert, which every token visits,
unweighted, is computed meanwhile.

The router weight is replicated over tp while every tp rank routes tokens of its own, so its gradient is summed over tp
(`copy_to`). Dropless by default; a capacity factor drops, per rank and micro-batch, what lies past
ceil(factor * T/tp * K / E) rows of an expert, later tokens first, without renormalising the weights that remain.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moe_engine.config import Model
from moe_engine.model.mlp import DenseMLP
from moe_engine.model.router_losses import pack_stats
from moe_engine.ops import experts, permute, router_logits, router_topk, sort_by_expert, unpermute
from moe_engine.parallel.collectives import all_gather, copy_to, gather_rows, reduce_from, reduce_scatter
from moe_engine.parallel.dispatch import Flight, Route, Table, combine, dispatch
from moe_engine.parallel.mesh import Axis, Mesh
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
        if self.training and config.router_jitter_noise:
            noise_TD = torch.empty_like(x_TD, dtype=torch.float32)
            x_TD = x_TD * noise_TD.uniform_(1 - config.router_jitter_noise, 1 + config.router_jitter_noise)
        logits_TE = router_logits(x_TD, copy_to(self.weight, self.tp))
        weight_TK, chosen_TK, probs_TE, lse_T = router_topk(
            logits_TE, config.num_experts_per_tok, config.norm_topk_prob, self.expert_bias
        )
        weight_TK = weight_TK * config.routed_scaling_factor
        z_T = lse_T.square()
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
        self.count = self.w_down.shape[0]  # under ZeRO 3 a weight has its shape in this module's forward alone

    def order(self, index_TK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The order in which forward visits the experts index_TK (int32, L = none)."""
        return sort_by_expert(index_TK, self.count)

    def forward(self, x_TD: Tensor, weight_TK: Tensor, order: tuple[Tensor, Tensor, Tensor], keep_h: bool) -> Tensor:
        """The weighted sum y[T, D]{tp} of each token's experts on x[T, D]; keep_h: h stays for backward, if any."""
        keep_h = keep_h and torch.is_grad_enabled()
        return experts(x_TD, weight_TK, self.w_gate_up.flatten(1, 2), self.w_down, *order, keep_h)


class Home(NamedTuple):
    """The way of rows back to their tokens."""

    route: Route
    assignment_of_row_R: Tensor
    row_of_TK: Tensor
    ep: Axis
    tp: Axis


def depart(
    x_TD: Tensor, columns_TKX: Tensor, index_TK: Tensor, num_experts: int, ep: Axis, tp: Axis
) -> tuple[Flight, Home]:
    """Each token to its experts index_TK, as rows that carry their columns_TKX (fp32; the first is the weight)."""
    counts_E, assignment_of_row_R, row_of_TK = sort_by_expert(index_TK, num_experts)
    table = Table(counts_E, ep, tp)
    rows_RD = permute(x_TD, assignment_of_row_R, row_of_TK)
    columns_RX = permute(columns_TKX.flatten(0, 1), assignment_of_row_R, row_of_TK.view(-1, 1))
    flight = dispatch(rows_RD, columns_RX, table, ep, tp)
    return flight, Home(flight.route, assignment_of_row_R, row_of_TK, ep, tp)


def bring(rows_MD: Tensor, home: Home | Axis) -> Tensor:
    """The experts' outputs rows[M, D]{tp} to their tokens, y[T/tp, D]; home is tp where the rows are all T tokens."""
    if isinstance(home, Axis):
        return reduce_scatter(rows_MD, home)
    rows_RD = combine(rows_MD, home.route, home.ep, home.tp)
    return unpermute(rows_RD, home.assignment_of_row_R, home.row_of_TK)


class MoE(nn.Module):
    """Router and experts of one layer. Returns the layer's output and the router's statistics for losses and logs.

    y = sum of the chosen experts, weighted + shared(x), where the config has a shared expert (LLaMA-MoE's residual).

    keep_h: False drops the experts' hidden activations, which backward then computes again.
    """

    def __init__(self, config: Model, mesh: Mesh, keep_h: bool = True):
        super().__init__()
        self.num_experts, self.ep, self.tp, self.keep_h = config.num_local_experts, mesh.ep, mesh.tp, keep_h
        self.columns = config.router_columns
        self.router = Router(config, mesh)
        self.experts = Experts(config, mesh)
        width = config.shared_intermediate_size
        self.shared = DenseMLP(config, mesh, width) if width else None

    def forward(self, x_TD: Tensor, member_BT: Tensor) -> tuple[Tensor, Tensor]:
        """x[T/tp, D], normalised; member_BT: 1 where a local token counts for a sequence, 0 for padding.

        Returns y[T/tp, D] and stats[B, X] (see router_losses), complete on every tp rank.
        """
        rows_MD, home, shared_TD, stats_BX = self.through_experts(x_TD, member_BT)
        y_TD = bring(rows_MD, home)
        return y_TD if shared_TD is None else y_TD + shared_TD, stats_BX

    def through_experts(self, x_TD: Tensor, member_BT: Tensor) -> tuple[Tensor, Home | Axis, Tensor | None, Tensor]:
        """forward, up to where the experts' outputs still have to travel; backward needs nothing of what follows.

        Returns rows_MD, their way home, the shared expert's output on x or None, and stats_BX.
        """
        routing = self.router(x_TD)
        if self.ep.size == 1:  # each token travels over tp once, not once for each of its experts
            order = self.experts.order(gather_rows(routing.index_TK, self.tp))
            arrived = all_gather(x_TD, self.tp), all_gather(routing.weight_TK, self.tp)
            rows_MD = self.experts(*arrived, order, self.keep_h)
            return rows_MD, self.tp, *self._beside_experts(x_TD, routing, member_BT)
        weight_TK1 = routing.weight_TK.unsqueeze(2)
        flight, home = depart(x_TD, weight_TK1, routing.index_TK, self.num_experts, self.ep, self.tp)
        order = self.experts.order(flight.expert_M.unsqueeze(1))
        shared_TD, stats_BX = self._beside_experts(x_TD, routing, member_BT)
        rows_MD = self.experts(*flight.land(), order, self.keep_h)
        return rows_MD, home, shared_TD, stats_BX

    def _beside_experts(self, x_TD: Tensor, routing: Routing, member_BT: Tensor) -> tuple[Tensor | None, Tensor]:
        """What does not wait for the rows that travel: the shared expert's output, and stats_BX."""
        stats_BX = reduce_from(member_BT @ pack_stats(*routing[2:], experts=self.columns), self.tp)
        return None if self.shared is None else self.shared(x_TD), stats_BX
