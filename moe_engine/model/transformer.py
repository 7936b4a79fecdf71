"""The Llama / Mixtral decoder: embed -> [norm, attention, norm, feed-forward] x layers -> norm, head.

Between layers a rank holds x[T/tp, D]: the micro-batch's tokens as one flat list, cut along tp. Norms and routers are
replicated over tp and see the rank's own tokens, so their gradients are summed over tp (`copy_to`).
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from moe_engine.config import Model
from moe_engine.model.attention import Attention, Places, inverse_frequencies, places
from moe_engine.model.attention_moe import AttentionMoE
from moe_engine.model.loss import vocab_cross_entropy
from moe_engine.model.mlp import DenseMLP
from moe_engine.model.moe import MoE, Origin
from moe_engine.model.norm import RMSNorm
from moe_engine.model.recompute import recomputed
from moe_engine.model.router import RouterStats, Routing, router_stats
from moe_engine.parallel.collectives import all_gather, reduce_scatter
from moe_engine.parallel.linear import ColumnLinear, VocabEmbedding
from moe_engine.parallel.mesh import Mesh


class Output(NamedTuple):
    """What a forward pass returns.

    loss_T: of each token, fp32, 0 where the label is -100; the same on all tp ranks. -loss_T is log p of the label.
    routings, attention_routings: of the feed-forward and of the attention routers, in order of layers, for the tokens
    of this tp rank. stats: their sums by sequence on all tp ranks, one RouterStats for each kind that the model has.
    """

    loss_T: Tensor
    routings: tuple[Routing, ...]
    attention_routings: tuple[Routing, ...]
    stats: tuple[RouterStats, ...]


class Block(nn.Module):
    """One decoder layer. Returns x[T/tp, D] and the routing of its feed-forward and its attention router, or None."""

    def __init__(self, config: Model, mesh: Mesh, layer: int, recompute: str = "none", replicate: bool = False):
        super().__init__()
        self.recompute = recompute
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, mesh.tp)
        routed = config.is_attention_moe(layer)
        self.attention = AttentionMoE(config, mesh, replicate) if routed else Attention(config, mesh)
        self.ffn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, mesh.tp)
        sparse = config.is_moe(layer)
        keep_h = recompute != "selective"
        hidden, width = config.hidden_size, config.intermediate_size
        self.ffn = MoE(config, mesh, keep_h) if sparse else DenseMLP(hidden, width, config.initializer_range, mesh)

    def forward(self, x_TD: Tensor, at: Places) -> tuple[Tensor, Routing | None, Routing | None]:
        """x[T/tp, D] -> x[T/tp, D]. The feed-forward experts' outputs travel back outside what is recomputed."""
        if self.recompute != "none" and torch.is_grad_enabled():
            found = recomputed(self.compute, self.recompute, x_TD, at)
        else:
            found = self.compute(x_TD, at)
        x_TD, rows, origin, routing, attention_routing = found
        y_TD = self.ffn.finish(rows, origin) if isinstance(self.ffn, MoE) else rows
        return x_TD + y_TD, routing, attention_routing

    def compute(self, x_TD: Tensor, at: Places) -> tuple[Tensor, Tensor, Origin | None, Routing | None, Routing | None]:
        """What recompute repeats: all but the way of the feed-forward experts' outputs back to their tokens."""
        h_TD, attention_routing, routing = self.attention_norm(x_TD), None, None
        if isinstance(self.attention, AttentionMoE):
            y_TD, attention_routing = self.attention(h_TD, at)
        else:
            y_TD = self.attention(h_TD, at)
        x_TD = x_TD + y_TD
        h_TD = self.ffn_norm(x_TD)
        if not isinstance(self.ffn, MoE):
            return x_TD, self.ffn(h_TD), None, None, attention_routing
        rows, origin, shared_TD, routing = self.ffn.compute(h_TD)
        return x_TD if shared_TD is None else x_TD + shared_TD, rows, origin, routing, attention_routing


class Transformer(nn.Module):
    """The whole decoder on this rank of the mesh.

    recompute: "none", "selective" or "full", see recompute.py.
    replicate_attention_experts: every ep rank holds those of all (see attention_moe.py).
    """

    def __init__(self, config: Model, mesh: Mesh, recompute: str = "none", replicate_attention_experts: bool = False):
        super().__init__()
        self.config, self.tp = config, mesh.tp
        self.embedding = VocabEmbedding(config.vocab_size, config.hidden_size, mesh.tp, config.initializer_range)
        self.layers = nn.ModuleList(
            Block(config, mesh, i, recompute, replicate_attention_experts) for i in range(config.num_hidden_layers)
        )
        self.inverse_frequency = inverse_frequencies(config)  # not a buffer: those become bf16 with the model
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, mesh.tp)
        self.head = ColumnLinear(config.hidden_size, config.vocab_size, mesh.tp, config.initializer_range)
        if config.tie_word_embeddings:
            self.head.weight = self.embedding.weight

    def forward(
        self, tokens_BS: Tensor, positions_BS: Tensor, labels_BS: Tensor, counted_BS: Tensor | None = None
    ) -> Output:
        """The loss of every token, and what every router decided.

        tokens_BS, positions_BS, labels_BS int64; counted_BS bool, False for padding that the routers' statistics leave
        out. tp must divide B * S.
        """
        h_TD, routings, attention_routings = self.hidden(tokens_BS, positions_BS)
        loss_T = vocab_cross_entropy(self.head(h_TD), labels_BS.flatten(), self.tp)
        group_T = self._sequence_of_tokens(tokens_BS, counted_BS)
        stats = router_stats((routings, attention_routings), group_T, len(tokens_BS), self.tp)
        return Output(loss_T, routings, attention_routings, stats)

    def logits(self, tokens_BS: Tensor, positions_BS: Tensor) -> Tensor:
        """Next-token logits[B * S, V/tp]."""
        return self.head(self.hidden(tokens_BS, positions_BS)[0])

    def hidden(
        self, tokens_BS: Tensor, positions_BS: Tensor
    ) -> tuple[Tensor, tuple[Routing, ...], tuple[Routing, ...]]:
        """The normalised output of the last layer for all tokens, h[T, D], and the routings (see Output)."""
        x_TD = reduce_scatter(self.embedding(tokens_BS.flatten()), self.tp)
        self.inverse_frequency = self.inverse_frequency.to(x_TD.device)  # once: such a copy waits for the device
        at = places(positions_BS, self.inverse_frequency, x_TD.dtype)
        routings, attention_routings = [], []
        for layer in self.layers:
            x_TD, routing, attention_routing = layer(x_TD, at)
            routings += [routing] if routing else []
            attention_routings += [attention_routing] if attention_routing else []
        return all_gather(self.norm(x_TD), self.tp), tuple(routings), tuple(attention_routings)

    def _sequence_of_tokens(self, tokens_BS: Tensor, counted_BS: Tensor | None) -> Tensor:
        """The sequence of each of this rank's tokens [T/tp], -1 where it does not count."""
        sequences, length = tokens_BS.shape
        mine = self.tp.cut(sequences * length)
        sequence_T = torch.arange(mine.start, mine.stop, device=tokens_BS.device) // length
        return sequence_T if counted_BS is None else sequence_T.masked_fill(~counted_BS.flatten()[mine], -1)
