"""The Mixture-of-Experts layer, and all the bytes that it moves:

    x[T/tp, D]   route      softmax over E in fp32, top-k, renormalise             this rank's tokens only
                 permute    rows sorted by expert                                  R = T/tp * K rows
                 dispatch   rows and their weights: all_to_all over ep, all_gather over tp        M rows
                 experts    weighted SwiGLU on w[L, .., F/tp, ..]                  y[M, D]{tp}
                 combine    reduce_scatter over tp, all_to_all over ep             R rows
    y[T/tp, D]   unpermute  sum over the k rows of a token

Where ep = 1 nothing is permuted: `experts` reads the tokens themselves, all_gathered over tp, and sums each token's
rows; y[T, D]{tp} is reduce_scattered. With ep > 1 each arriving row is a token with one expert. A row's weight travels
with it, so that its gradient is computed where the expert is and the experts' outputs need not be kept. The shared
expert, which every token visits, unweighted, is computed while the rows travel.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from moe_engine.config import Model
from moe_engine.model.mlp import DenseMLP
from moe_engine.model.router import Router, Routing
from moe_engine.ops import experts, permute, sort_by_expert, unpermute
from moe_engine.parallel.collectives import all_gather, gather_rows, reduce_scatter
from moe_engine.parallel.dispatch import Counts, Dispatched, Route, combine, dispatch
from moe_engine.parallel.mesh import Axis, Mesh
from moe_engine.parallel.weight import weight


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


class Origin(NamedTuple):
    """Where the rows of a plane came from: the way back to their tokens."""

    route: Route
    assignment_of_row_R: Tensor
    row_of_TK: Tensor
    ep: Axis
    tp: Axis


def permute_and_dispatch(
    x_TD: Tensor, columns_TKX: Tensor, index_TK: Tensor, num_experts: int, ep: Axis, tp: Axis
) -> tuple[Dispatched, Origin]:
    """Each token to its experts index_TK, as rows that carry their columns_TKX (fp32; the first is the weight)."""
    counts_E, assignment_of_row_R, row_of_TK = sort_by_expert(index_TK, num_experts)
    counts = Counts(counts_E, ep, tp)
    rows_RD = permute(x_TD, assignment_of_row_R, row_of_TK)
    columns_RX = permute(columns_TKX.flatten(0, 1), assignment_of_row_R, row_of_TK.view(-1, 1))
    dispatched = dispatch(rows_RD, columns_RX, counts, ep, tp)
    return dispatched, Origin(dispatched.route, assignment_of_row_R, row_of_TK, ep, tp)


def combine_and_unpermute(rows_MD: Tensor, origin: Origin) -> Tensor:
    """The experts' outputs rows[M, D]{tp} back to their tokens and summed there: y[T/tp, D]."""
    rows_RD = combine(rows_MD, origin.route, origin.ep, origin.tp)
    return unpermute(rows_RD, origin.assignment_of_row_R, origin.row_of_TK)


class MoE(nn.Module):
    """Router and experts of one layer. Returns the layer's output and what its router decided.

    y = sum of the chosen experts, weighted + shared(x), where the config has a shared expert (LLaMA-MoE's residual).

    keep_h: False drops the experts' hidden activations, which backward then computes again.
    """

    def __init__(self, config: Model, mesh: Mesh, keep_h: bool = True):
        super().__init__()
        self.num_experts, self.ep, self.tp, self.keep_h = config.num_local_experts, mesh.ep, mesh.tp, keep_h
        self.router = Router(
            config,
            mesh.tp,
            config.num_local_experts,
            config.num_experts_per_tok,
            config.routed_scaling_factor,
            config.norm_topk_prob,
            config.capacity_factor,
            biased=config.expert_bias_update_rate > 0,
        )
        self.experts = Experts(config, mesh)
        width = config.shared_intermediate_size
        self.shared = DenseMLP(config.hidden_size, width, config.initializer_range, mesh) if width else None

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Routing]:
        """x[T/tp, D], normalised -> y[T/tp, D] and the routing of these tokens."""
        rows_MD, origin, shared_TD, routing = self.compute(x_TD)
        y_TD = self.finish(rows_MD, origin)
        return y_TD if shared_TD is None else y_TD + shared_TD, routing

    def compute(self, x_TD: Tensor) -> tuple[Tensor, Origin | None, Tensor | None, Routing]:
        """forward, up to where the experts' outputs still have to travel; backward needs nothing of what follows.

        Returns the experts' outputs rows[M, D]{tp}, where they came from (None where ep = 1: the rows are all T
        tokens), and the shared expert's output on x, or None.
        """
        routing = self.router(x_TD)
        if self.ep.size == 1:  # each token travels over tp once, not once for each of its experts
            order = self.experts.order(gather_rows(routing.index_TK, self.tp))
            arrived = all_gather(x_TD, self.tp), all_gather(routing.weight_TK, self.tp)
            rows_MD = self.experts(*arrived, order, self.keep_h)
            return rows_MD, None, self._shared(x_TD), routing
        weight_TK1 = routing.weight_TK.unsqueeze(2)
        dispatched, origin = permute_and_dispatch(
            x_TD, weight_TK1, routing.index_TK, self.num_experts, self.ep, self.tp
        )
        order = self.experts.order(dispatched.expert_M.unsqueeze(1))
        shared_TD = self._shared(x_TD)
        rows_MD = self.experts(*dispatched.wait(), order, self.keep_h)
        return rows_MD, origin, shared_TD, routing

    def finish(self, rows_MD: Tensor, origin: Origin | None) -> Tensor:
        """The experts' outputs back to their tokens, y[T/tp, D]."""
        return reduce_scatter(rows_MD, self.tp) if origin is None else combine_and_unpermute(rows_MD, origin)

    def _shared(self, x_TD: Tensor) -> Tensor | None:
        return None if self.shared is None else self.shared(x_TD)
