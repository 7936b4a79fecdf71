"""Every weight of a model, by arithmetic: its name, its whole shape, and where the layout cuts it. No torch.

    layers.3.ffn.experts.w_gate_up    (E, 2, F, D)    {0: "ep", 2: "tp"}    experts

This is what the built model's notes say (parallel/weight.py; a test equates the two), without building one: parameter
counts, adapters, the planner and the tables of Hugging Face families read it. A tied head is no weight of its own.
"""

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from moe_engine.config import Model, Parallel

Shape = tuple[int, ...]
COMPONENTS = (
    *("embedding", "head", "attention", "dense_mlp", "shared_experts", "experts", "routers", "norms"),
    *("attention_experts", "attention_routers"),
)


class Weight(NamedTuple):
    """name: as in checkpoints. cut: dimension -> "ep" or "tp". component: one of COMPONENTS."""

    name: str
    shape: Shape
    cut: Mapping[int, str]
    component: str

    @property
    def parameters(self) -> int:
        """Elements of the whole weight."""
        return math.prod(self.shape)

    @property
    def expert(self) -> bool:
        """Whether ep cuts it, so that its gradient is reduced over dp, not over dp x ep."""
        return "ep" in self.cut.values()

    def on_rank(self, parallel: Parallel) -> Shape:
        """The shape of one rank's part, in a layout whose sizes divide what they cut."""
        sizes = {"ep": parallel.ep, "tp": parallel.tp}
        return tuple(side // sizes[self.cut[d]] if d in self.cut else side for d, side in enumerate(self.shape))


def weights_of(model: Model, replicate_attention_experts: bool = False) -> Iterator[Weight]:
    """The weights of a model, in the order in which the model holds them."""
    d, v = model.hidden_size, model.vocab_size
    yield Weight("embedding.weight", (v, d), {0: "tp"}, "embedding")
    for layer in range(model.num_hidden_layers):
        at = f"layers.{layer}"
        yield Weight(f"{at}.attention_norm.weight", (d,), {}, "norms")
        if model.is_attention_moe(layer):
            yield from _attention_experts(model, f"{at}.attention", replicate_attention_experts)
        else:
            yield from _attention(model, f"{at}.attention")
        yield Weight(f"{at}.ffn_norm.weight", (d,), {}, "norms")
        if model.is_moe(layer):
            yield from _moe(model, f"{at}.ffn")
        else:
            yield from _mlp(f"{at}.ffn", model.intermediate_size, d, "dense_mlp")
    yield Weight("norm.weight", (d,), {}, "norms")
    if not model.tie_word_embeddings:
        yield Weight("head.weight", (v, d), {0: "tp"}, "head")


def weight_shapes(model: Model) -> dict[str, Shape]:
    """Name and whole shape of every weight of a model."""
    return {weight.name: weight.shape for weight in weights_of(model)}


def active_share(model: Model, component: str) -> tuple[int, int]:
    """Of a component's weights a token visits so many of so many equal parts: k of E experts, or all, 1 of 1."""
    if component == "experts":
        return model.num_experts_per_tok, model.num_local_experts
    if component == "attention_experts":
        return model.num_attention_experts_per_tok, model.num_attention_experts
    return 1, 1


def _attention(model: Model, at: str) -> Iterator[Weight]:
    d, heads, groups, width = _heads(model)
    yield Weight(f"{at}.q.weight", (heads * width, d), {0: "tp"}, "attention")
    yield Weight(f"{at}.k.weight", (groups * width, d), {0: "tp"}, "attention")
    yield Weight(f"{at}.v.weight", (groups * width, d), {0: "tp"}, "attention")
    yield Weight(f"{at}.o.weight", (d, heads * width), {1: "tp"}, "attention")
    for name, count in (("q_norm", heads), ("k_norm", groups)):
        if model.qk_norm == "projection":
            yield Weight(f"{at}.{name}.weight", (count * width,), {0: "tp"}, "attention")
        elif model.qk_norm == "head":
            yield Weight(f"{at}.{name}.weight", (width,), {}, "norms")


def _attention_experts(model: Model, at: str, replicate: bool) -> Iterator[Weight]:
    d, heads, _, width = _heads(model)
    experts = model.num_attention_experts
    each, ep = heads // experts, {} if replicate else {0: "ep"}
    yield Weight(f"{at}.router.weight", (experts, d), {}, "attention_routers")
    yield Weight(f"{at}.experts.w_q", (experts, each, width, d), {**ep, 1: "tp"}, "attention_experts")
    yield Weight(f"{at}.experts.w_k", (experts, width, d), ep, "attention_experts")
    yield Weight(f"{at}.experts.w_v", (experts, width, d), ep, "attention_experts")
    yield Weight(f"{at}.experts.w_o", (experts, d, each, width), {**ep, 2: "tp"}, "attention_experts")
    if model.qk_norm == "head":
        yield Weight(f"{at}.q_norm.weight", (width,), {}, "norms")
        yield Weight(f"{at}.k_norm.weight", (width,), {}, "norms")


def _moe(model: Model, at: str) -> Iterator[Weight]:
    experts, width, d = model.num_local_experts, model.moe_intermediate_size, model.hidden_size
    yield Weight(f"{at}.router.weight", (experts, d), {}, "routers")
    yield Weight(f"{at}.experts.w_gate_up", (experts, 2, width, d), {0: "ep", 2: "tp"}, "experts")
    yield Weight(f"{at}.experts.w_down", (experts, d, width), {0: "ep", 2: "tp"}, "experts")
    if model.shared_intermediate_size:
        yield from _mlp(f"{at}.shared", model.shared_intermediate_size, d, "shared_experts")


def _mlp(at: str, width: int, d: int, component: str) -> Iterator[Weight]:
    yield Weight(f"{at}.w_gate_up", (2, width, d), {1: "tp"}, component)
    yield Weight(f"{at}.down.weight", (d, width), {1: "tp"}, component)


def _heads(model: Model) -> tuple[int, int, int, int]:
    """Hidden size, query heads, kv heads, head dimension."""
    return model.hidden_size, model.num_attention_heads, model.num_key_value_heads, model.head_dim
