"""The Llama / Mixtral decoder: embed -> [norm, attention, norm, feed-forward] x layers -> norm, head.

Between layers a rank holds x[T/tp, D]: the micro-batch's tokens as one flat list, cut along tp. Norms and routers are
replicated over tp and see the rank's own tokens, so their gradients are summed over tp (`copy_to`).
"""

import torch
from torch import Tensor, nn

from moe_engine.config import Model
from moe_engine.model.attention import Attention, Places, inverse_frequencies, places
from moe_engine.model.attention_moe import AttentionMoE
from moe_engine.model.loss import vocab_cross_entropy
from moe_engine.model.mlp import DenseMLP
from moe_engine.model.moe import Home, MoE, bring
from moe_engine.model.norm import RMSNorm
from moe_engine.model.recompute import recomputed
from moe_engine.parallel.collectives import all_gather, reduce_scatter
from moe_engine.parallel.linear import ColumnLinear, VocabEmbedding
from moe_engine.parallel.mesh import Axis, Mesh

Stats = tuple[Tensor, Tensor]


class Block(nn.Module):
    """One decoder layer. Returns x[T/tp, D] and the stats[B, X] of its routers: feed-forward, attention; X = 0 where
    there is none."""

    def __init__(self, config: Model, mesh: Mesh, layer: int, keep_h: bool = True, replicate: bool = False):
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, mesh.tp)
        routed = config.is_attention_moe(layer)
        self.attention = AttentionMoE(config, mesh, replicate) if routed else Attention(config, mesh)
        self.ffn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, mesh.tp)
        sparse = config.is_moe(layer)
        self.ffn = MoE(config, mesh, keep_h) if sparse else DenseMLP(config, mesh, config.intermediate_size)

    def forward(self, x_TD: Tensor, at: Places, member_BT: Tensor) -> tuple[Tensor, Stats]:
        return self.finish(*self.compute(x_TD, at, member_BT))

    def compute(self, x_TD: Tensor, at: Places, member_BT: Tensor) -> tuple[Tensor, Tensor, Home | Axis, Stats]:
        """What recompute repeats: all but the way of the feed-forward experts' outputs back to their tokens."""
        h_TD, stats_BX = self.attention_norm(x_TD), member_BT.new_zeros(member_BT.shape[0], 0)
        if isinstance(self.attention, AttentionMoE):
            y_TD, attention_BX = self.attention(h_TD, at, member_BT)
        else:
            y_TD, attention_BX = self.attention(h_TD, at), stats_BX
        x_TD = x_TD + y_TD
        h_TD = self.ffn_norm(x_TD)
        if not isinstance(self.ffn, MoE):
            return x_TD, self.ffn(h_TD), Axis("here"), (stats_BX, attention_BX)
        rows, home, shared_TD, stats_BX = self.ffn.through_experts(h_TD, member_BT)
        return x_TD if shared_TD is None else x_TD + shared_TD, rows, home, (stats_BX, attention_BX)

    def finish(self, x_TD: Tensor, rows: Tensor, home: Home | Axis, stats: Stats) -> tuple[Tensor, Stats]:
        return x_TD + bring(rows, home), stats


class Transformer(nn.Module):
    """The whole decoder on this rank of the mesh.

    recompute: "none", "selective" or "full", see recompute.py.
    replicate_attention_experts: every ep rank holds those of all (see attention_moe.py).
    """

    def __init__(self, config: Model, mesh: Mesh, recompute: str = "none", replicate_attention_experts: bool = False):
        super().__init__()
        self.config, self.tp, self.recompute = config, mesh.tp, recompute
        self.embedding = VocabEmbedding(config.vocab_size, config.hidden_size, mesh.tp, config.initializer_range)
        keep_h = recompute != "selective"
        self.layers = nn.ModuleList(
            Block(config, mesh, i, keep_h, replicate_attention_experts) for i in range(config.num_hidden_layers)
        )
        self.inverse_frequency = inverse_frequencies(config)  # not a buffer: those become bf16 with the model
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, mesh.tp)
        self.head = ColumnLinear(config.hidden_size, config.vocab_size, mesh.tp, config.initializer_range)
        if config.tie_word_embeddings:
            self.head.weight = self.embedding.weight

    def forward(
        self, tokens_BS: Tensor, positions_BS: Tensor, labels_BS: Tensor, counted_BS: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The loss of every token and the statistics of every router.

        tokens_BS, positions_BS, labels_BS int64; counted_BS bool, False for padding that routers must not count.
        Returns loss_T fp32 (0 where the label is -100; the same on all tp ranks) and stats[N, B, X] of N routers: those
        of the feed-forward layers in order, then those of attention (see router_losses.by_kind). tp must divide B * S.
        """
        h_TD, stats = self.hidden(tokens_BS, positions_BS, counted_BS)
        loss_T = vocab_cross_entropy(self.head(h_TD), labels_BS.flatten(), self.tp)
        return loss_T, stats

    def logits(self, tokens_BS: Tensor, positions_BS: Tensor) -> Tensor:
        """Next-token logits[B * S, V/tp]."""
        return self.head(self.hidden(tokens_BS, positions_BS)[0])

    def hidden(
        self, tokens_BS: Tensor, positions_BS: Tensor, counted_BS: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The normalised output of the last layer for all tokens, h[T, D], and stats[N, B, X]."""
        x_TD = reduce_scatter(self.embedding(tokens_BS.flatten()), self.tp)
        self.inverse_frequency = self.inverse_frequency.to(x_TD.device)  # once: such a copy waits for the device
        at = places(positions_BS, self.inverse_frequency, x_TD.dtype)
        member_BT = self._membership(tokens_BS, counted_BS)
        pairs = []
        for layer in self.layers:
            x_TD, pair = self._run(layer, x_TD, at, member_BT)
            pairs.append(pair)
        stats = [stats_BX for kind in zip(*pairs, strict=True) for stats_BX in kind if stats_BX.shape[1]]
        packed = torch.stack(stats) if stats else member_BT.new_zeros(0, tokens_BS.shape[0], 3)
        return all_gather(self.norm(x_TD), self.tp), packed

    def _membership(self, tokens_BS: Tensor, counted_BS: Tensor | None) -> Tensor:
        """member[B, T/tp] fp32: 1 where one of this rank's tokens belongs to a sequence and counts."""
        sequences, length = tokens_BS.shape
        mine = self.tp.cut(sequences * length)
        token_T = torch.arange(mine.start, mine.stop, device=tokens_BS.device)
        member_BT = (token_T // length == torch.arange(sequences, device=token_T.device).unsqueeze(1)).float()
        return member_BT if counted_BS is None else member_BT * counted_BS.flatten()[mine]

    def _run(self, layer: nn.Module, x_TD: Tensor, at: Places, member_BT: Tensor) -> tuple[Tensor, Stats]:
        if self.recompute == "none" or not torch.is_grad_enabled():
            return layer(x_TD, at, member_BT)
        assert isinstance(layer, Block)
        return layer.finish(*recomputed(layer.compute, self.recompute, x_TD, at, member_BT))
