"""How many parameters a model has: in all, active for one token, and on one rank of a layout. Arithmetic only.

    dense   V*D embedding (twice unless tied) + per layer D*C*(2H + 2G) attention + 3*D*F dense FFN or shared expert
            + 2*D norms, and of q and k 2*C ("head") or C*(H + G) ("projection", cut like attention) + D
    expert  E * 3*D*F per expert layer, and a router of E*D, which is dense (every rank of ep holds it)
            A * 2*D*C*(H/A + 1) per attention MoE layer, and a router of A*D; its attention is no dense one

active = total minus the experts that a token does not visit: embeddings and routers are counted in full, as in the
published "47B, 13B active" of Mixtral-8x7B.
"""

from typing import NamedTuple

from moe_engine.config import Model, Parallel


class ParameterCounts(NamedTuple):
    """Parameters by component. `head` is 0 when it is tied to the embedding."""

    embedding: int
    head: int
    attention: int
    dense_mlp: int
    shared_experts: int
    experts: int
    routers: int
    norms: int
    attention_experts: int
    attention_routers: int
    active_experts: int  # the part of `experts` that one token visits
    active_attention_experts: int

    @property
    def total(self) -> int:
        """All parameters."""
        return self.dense + self.experts + self.attention_experts

    @property
    def active(self) -> int:
        """Parameters that one token visits."""
        return self.dense + self.active_experts + self.active_attention_experts

    @property
    def dense(self) -> int:
        """All parameters that are no experts' weights: reduced over dp x ep."""
        ffn, routers = self.dense_mlp + self.shared_experts, self.routers + self.attention_routers
        return self.embedding + self.head + self.attention + ffn + routers + self.norms


class RankParameters(NamedTuple):
    """Parameters of one rank: resident copies, and the share whose optimizer states a ZeRO stage >= 1 keeps here."""

    dense: int
    expert: int
    owned_dense: int  # ceil(dense / (dp * ep))
    owned_expert: int  # ceil(expert / dp)

    @property
    def resident(self) -> int:
        """Parameters held in full."""
        return self.dense + self.expert

    @property
    def owned(self) -> int:
        """Parameters whose optimizer states live here."""
        return self.owned_dense + self.owned_expert


def parameter_counts(model: Model) -> ParameterCounts:
    """Parameters of the whole model, by component."""
    d, layers, sparse = model.hidden_size, model.num_hidden_layers, model.num_moe_layers
    heads = model.num_attention_heads + model.num_key_value_heads
    attention = model.head_dim * heads * (2 * d + (model.qk_norm == "projection"))
    expert, routed = 3 * d * model.moe_intermediate_size, model.num_attention_moe_layers
    attention_expert = 2 * d * model.head_dim * (heads_per_attention_expert(model) + 1)
    return ParameterCounts(
        embedding=model.vocab_size * d,
        head=0 if model.tie_word_embeddings else model.vocab_size * d,
        attention=(layers - routed) * attention,
        dense_mlp=(layers - sparse) * 3 * d * model.intermediate_size,
        shared_experts=sparse * 3 * d * model.shared_intermediate_size,
        experts=sparse * model.num_local_experts * expert,
        routers=sparse * model.num_local_experts * d,
        norms=(2 * layers + 1) * d + (2 * layers * model.head_dim if model.qk_norm == "head" else 0),
        attention_experts=routed * model.num_attention_experts * attention_expert,
        attention_routers=routed * model.num_attention_experts * d,
        active_experts=sparse * model.num_experts_per_tok * expert,
        active_attention_experts=routed * model.num_attention_experts_per_tok * attention_expert,
    )


def heads_per_attention_expert(model: Model) -> int:
    """Query heads of one attention expert; 0 without them."""
    return model.num_attention_heads // model.num_attention_experts if model.num_attention_experts else 0


def attention_experts_over_tp(model: Model, tp: int) -> int:
    """Parameters of all attention experts on one of `tp` ranks: tp cuts the query heads of each, not its kv head."""
    heads = heads_per_attention_expert(model)
    return parameter_counts(model).attention_experts // (heads + 1) * (heads // tp + 1)


def rank_parameters(model: Model, parallel: Parallel) -> RankParameters:
    """Parameters of one rank of a layout that `check_layout` accepts: all ranks hold the same number.

    tp cuts embedding, head, attention and FFNs; norms and routers are whole on every rank; ep cuts the experts.
    Replicated attention experts are dense.
    """
    counts = parameter_counts(model)
    cut = counts.embedding + counts.head + counts.attention + counts.dense_mlp + counts.shared_experts
    dense = cut // parallel.tp + counts.routers + counts.attention_routers + counts.norms
    expert = counts.experts // (parallel.ep * parallel.tp)
    attention = attention_experts_over_tp(model, parallel.tp)
    if parallel.replicate_attention_experts:
        dense += attention
    else:
        expert += attention // parallel.ep
    replicas = parallel.dp * parallel.ep
    return RankParameters(dense, expert, -(-dense // replicas), -(-expert // parallel.dp))
