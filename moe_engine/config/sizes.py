"""How many parameters a model has: in all, active for one token, and on one rank of a layout; sums over `weights_of`.

active = total minus the experts that a token does not visit: embeddings and routers are counted in full, as in the
published "47B, 13B active" of Mixtral-8x7B.
"""

import math
from typing import NamedTuple

from moe_engine.config import Model, Parallel
from moe_engine.config.weights import COMPONENTS, active_share, weights_of


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
    counts = dict.fromkeys(COMPONENTS, 0)
    for weight in weights_of(model):
        counts[weight.component] += weight.parameters
    active = {}
    for component in ("experts", "attention_experts"):
        chosen, of = active_share(model, component)
        active[f"active_{component}"] = counts[component] // max(of, 1) * chosen
    return ParameterCounts(**counts, **active)


def rank_parameters(model: Model, parallel: Parallel) -> RankParameters:
    """Parameters of one rank of a layout that `check_layout` accepts: all ranks hold the same number."""
    dense = expert = 0
    for weight in weights_of(model, parallel.replicate_attention_experts):
        here = math.prod(weight.on_rank(parallel))
        dense, expert = (dense, expert + here) if weight.expert else (dense + here, expert)
    replicas = parallel.dp * parallel.ep
    return RankParameters(dense, expert, -(-dense // replicas), -(-expert // parallel.dp))


def heads_per_attention_expert(model: Model) -> int:
    """Query heads of one attention expert; 0 without them."""
    return model.num_attention_heads // model.num_attention_experts if model.num_attention_experts else 0
