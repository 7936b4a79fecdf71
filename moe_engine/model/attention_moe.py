"""Attention whose heads are experts (LLaMA-MoE v2): an expert is one kv head with its h = H/A query heads.

    x[T/tp, D]   route      as in moe.py, over A experts; the chosen weights always sum to attention_scaling_factor
                 dispatch   rows (token, expert), each with a ticket: its weight, token number and position
                 arrange    by (expert, sequence), in order of tokens: N rows in P groups of at most n
                 q, k, v    of each row by its expert's matrices; rotate by the token's position
                 attend     [P, h/tp, n, C], causal within a group and a document
                 o          weight * attended, by the expert's matrix                     y[M, D]{tp}
    y[T/tp, D]   combine    back to the tokens, summed over the k rows of each

A token's query in an expert sees only those earlier tokens of its document that the router sent to the same expert. In
a group they stand next to each other, padding comes last, so plain causal attention is right; a bias is made where a
group holds more than one document, and the document of a token starts at (token number - position).

ep cuts the experts, unless each ep rank keeps them all and no row leaves it. tp cuts the query heads of an expert; its
one kv head is computed on every tp rank, for other queries, so the gradients of w_k and w_v are summed over tp.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from moe_engine.config import Model
from moe_engine.model.attention import Places, document_bias, head_norm, rotate, turns
from moe_engine.model.moe import combine_and_unpermute, permute_and_dispatch
from moe_engine.model.router import Router, Routing
from moe_engine.ops import grouped_mm
from moe_engine.parallel.collectives import copy_to
from moe_engine.parallel.mesh import Axis, Mesh
from moe_engine.parallel.weight import weight


class Arrangement(NamedTuple):
    """Rows in order of (expert, sequence, token): row_N in order of arrival, slot_N among the P * n places of groups.

    counts_L int32: rows of each expert. bias [P, 1, n, n], or None where no group holds two documents.
    """

    row_N: Tensor
    slot_N: Tensor
    counts_L: Tensor
    groups: int
    longest: int
    bias: Tensor | None


class Sequences(NamedTuple):
    """What an ep x tp plane reads at once: `count` sequences of `length`; this ep rank's tokens start at `first`."""

    count: int
    length: int
    first: int


def arrange(
    expert_M: Tensor, token_M: Tensor, position_M: Tensor, experts: int, sequences: Sequences, dtype: torch.dtype
) -> Arrangement:
    """Where each arriving row belongs. All int64; expert_M == experts marks padding. One host synchronisation."""
    groups = experts * sequences.count
    group_M = expert_M * sequences.count + token_M // sequences.length
    order_M = (expert_M * (sequences.count * sequences.length) + token_M).argsort()
    group_M, document_M = group_M[order_M], (token_M - position_M)[order_M]
    counts_P = group_M.new_zeros(groups + 1).index_add_(0, group_M.clamp(max=groups), torch.ones_like(group_M))[:groups]
    mixed = (group_M.diff() == 0) & (document_M.diff() != 0)
    rows, longest, documents = torch.stack([counts_P.sum(), counts_P.max(), mixed.sum()]).tolist()
    longest = max(longest, 1)
    group_N = group_M[:rows]
    start_P = counts_P.cumsum(0) - counts_P
    slot_N = group_N * longest + torch.arange(rows, device=group_N.device) - start_P[group_N]
    bias = None
    if documents:  # the places after a group's rows come last: no row sees them, whatever their document
        document_Pn = document_M.new_zeros(groups * longest).index_copy(0, slot_N, document_M[:rows])
        bias = document_bias(document_Pn.view(groups, longest), dtype)
    return Arrangement(order_M[:rows], slot_N, counts_P.view(experts, -1).sum(1).int(), groups, longest, bias)


class _Take(torch.autograd.Function):
    """x[index], no row twice: backward writes each gradient to its place, where index_select would add."""

    @staticmethod
    def forward(ctx, x: Tensor, index: Tensor) -> Tensor:
        """x[N, ...], index[M] int64 -> x[index], [M, ...]."""
        ctx.save_for_backward(index)
        ctx.shape = x.shape
        return x.index_select(0, index)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        """grad[M, ...] -> dx[N, ...], 0 in the rows that index leaves out."""
        (index,) = ctx.saved_tensors
        return grad.new_zeros(ctx.shape).index_copy_(0, index, grad), None


def _take(x: Tensor, index: Tensor) -> Tensor:
    return _Take.apply(x, index)  # pyright: ignore[reportReturnType]


class AttentionExperts(nn.Module):
    """The experts of this rank, h query heads and a kv head each. Spelled with A experts before ep and tp cut them:

    w_q [A, h, C, D], cut {ep, tp}    w_k, w_v [A, C, D], cut {ep}    w_o [A, D, h, C], cut {ep, -, tp}

    replicate: ep does not cut them.
    """

    def __init__(self, config: Model, mesh: Mesh, replicate: bool):
        super().__init__()
        self.tp, experts, hidden, head_dim = mesh.tp, config.num_attention_experts, config.hidden_size, config.head_dim
        heads, std = config.num_attention_heads // experts, config.initializer_range
        ep = {} if replicate else {0: mesh.ep}
        self.w_q = weight((experts, heads, head_dim, hidden), cut=ep | {1: mesh.tp}, std=std)
        self.w_k = weight((experts, head_dim, hidden), cut=ep, std=std)
        self.w_v = weight((experts, head_dim, hidden), cut=ep, std=std)
        self.w_o = weight((experts, hidden, heads, head_dim), cut=ep | {2: mesh.tp}, std=std)
        self.count = self.w_k.shape[0]  # under ZeRO 3 a weight has its shape in this module's forward alone

    def forward(
        self, x_ND: Tensor, weight_N1: Tensor, turn: tuple[Tensor, Tensor], at: Arrangement, norms: list[nn.Module]
    ) -> Tensor:
        """The weighted outputs y[N, D]{tp} of arranged rows; turn: cos, sin [N, 1, C]; norms: of q and of k."""
        q_norm, k_norm = norms
        q_NX = grouped_mm(x_ND, self.w_q.flatten(1, 2), at.counts_L)
        k_NC, v_NC = (grouped_mm(x_ND, copy_to(w, self.tp), at.counts_L) for w in (self.w_k, self.w_v))
        q_NhC = rotate(q_norm(q_NX.unflatten(1, self.w_q.shape[1:3])), *turn)
        k_N1C = rotate(k_norm(k_NC.unsqueeze(1)), *turn)
        q, k, v = (_grouped(rows, at) for rows in (q_NhC, k_N1C, v_NC.unsqueeze(1)))
        a_PhnC = F.scaled_dot_product_attention(q, k, v, attn_mask=at.bias, is_causal=at.bias is None, enable_gqa=True)
        a_NX = _take(a_PhnC.transpose(1, 2).flatten(0, 1), at.slot_N).flatten(1)
        return grouped_mm((a_NX * weight_N1).to(x_ND.dtype), self.w_o.flatten(2), at.counts_L)


def _grouped(rows_NhC: Tensor, at: Arrangement) -> Tensor:
    """Rows to their places in [P, h, n, C], zero where there is none."""
    heads = rows_NhC.shape[1:]
    places = rows_NhC.new_zeros(at.groups * at.longest, *heads).index_copy(0, at.slot_N, rows_NhC)
    return places.view(at.groups, at.longest, *heads).transpose(1, 2)


class AttentionMoE(nn.Module):
    """Router and attention experts of one layer.

    replicate: every ep rank holds all experts, as dense weights, and keeps its tokens: its own ep axis has size 1.
    """

    def __init__(self, config: Model, mesh: Mesh, replicate: bool = False):
        super().__init__()
        self.config, self.tp, self.ep = config, mesh.tp, Axis("ep") if replicate else mesh.ep
        experts, top_k = config.num_attention_experts, config.num_attention_experts_per_tok
        self.router = Router(config, mesh.tp, experts, top_k, config.attention_scaling_factor)
        self.experts = AttentionExperts(config, mesh, replicate)
        self.q_norm, self.k_norm = head_norm(config, 1, mesh.tp), head_norm(config, 1, mesh.tp)

    def forward(self, x_TD: Tensor, at: Places) -> tuple[Tensor, Routing]:
        """x[T/tp, D], normalised -> the layer's contribution [T/tp, D], and the routing of these tokens."""
        count, length = at.positions_BS.shape
        sequences = Sequences(self.ep.size * count, length, self.ep.rank * count * length)
        routing = self.router(x_TD)
        ticket_TK3 = self._tickets(routing.weight_TK, at.positions_BS, sequences)
        num_experts = self.config.num_attention_experts
        dispatched, origin = permute_and_dispatch(x_TD, ticket_TK3, routing.index_TK, num_experts, self.ep, self.tp)
        rows_MD, ticket_M3 = dispatched.wait()
        token_M, position_M = ticket_M3[:, 1:].long().unbind(1)
        experts = self.experts.count
        order = arrange(dispatched.expert_M.long(), token_M, position_M, experts, sequences, x_TD.dtype)
        x_ND, weight_N1, position_N1 = (
            _take(rows, order.row_N) for rows in (rows_MD, ticket_M3[:, :1], position_M.unsqueeze(1))
        )
        turn = turns(position_N1, at.inverse_frequency, x_TD.dtype)
        y_ND = self.experts(x_ND, weight_N1, turn, order, [self.q_norm, self.k_norm])
        y_MD = torch.zeros_like(rows_MD).index_copy(0, order.row_N, y_ND)
        return combine_and_unpermute(y_MD, origin), routing

    def _tickets(self, weight_TK: Tensor, positions_BS: Tensor, sequences: Sequences) -> Tensor:
        """What travels with each row, [T/tp, K, 3]: weight, token number on the plane, position. fp32 holds whole
        numbers below 2^24; config/checks.py refuses planes with more tokens."""
        mine = self.tp.cut(positions_BS.numel())
        token_T = torch.arange(mine.start, mine.stop, device=weight_TK.device) + sequences.first
        place_T2 = torch.stack([token_T, positions_BS.flatten()[mine]], 1).to(weight_TK.dtype)
        return torch.cat([weight_TK.unsqueeze(2), place_T2.unsqueeze(1).expand(-1, weight_TK.shape[1], -1)], 2)
