"""What every family says of itself: keys of config.json and names of tensors, used in both directions.

    Row("model.layers.{i}.block_sparse_moe.experts.{e}.w1.weight", "layers.{i}.ffn.experts.w_gate_up[{e},0]")

{i} runs over the layers, {e} over the first dimension of the weight; what is in brackets are indices: a tensor is a box
of a weight, with its elements in the same order. A row counts where the model has that weight, so that a dense layer
among expert layers, or a tied head, needs no rule of its own.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from moe_engine.config import Model

ROUTING = {
    "num_experts_per_tok": "num_experts_per_tok",
    "router_aux_loss_coef": "router_aux_loss_coef",
}


class Row(NamedTuple):
    """theirs: name on disk. ours: a weight, or a part of it. merged: dimensions merged, merged + 1 of the part are one
    on disk."""

    theirs: str
    ours: str
    merged: int | None = None


Tensors = dict[str, tuple[Row, ...]]  # layout -> its rows


# embeddings, attention, norms and head, which all families call the same; and a dense feed-forward layer
DECODER = (
    Row("model.embed_tokens.weight", "embedding.weight"),
    Row("model.layers.{i}.input_layernorm.weight", "layers.{i}.attention_norm.weight"),
    Row("model.layers.{i}.self_attn.q_proj.weight", "layers.{i}.attention.q.weight"),
    Row("model.layers.{i}.self_attn.k_proj.weight", "layers.{i}.attention.k.weight"),
    Row("model.layers.{i}.self_attn.v_proj.weight", "layers.{i}.attention.v.weight"),
    Row("model.layers.{i}.self_attn.o_proj.weight", "layers.{i}.attention.o.weight"),
    Row("model.layers.{i}.post_attention_layernorm.weight", "layers.{i}.ffn_norm.weight"),
    Row("model.norm.weight", "norm.weight"),
    Row("lm_head.weight", "head.weight"),
)
DENSE = (
    Row("model.layers.{i}.mlp.gate_proj.weight", "layers.{i}.ffn.w_gate_up[0]"),
    Row("model.layers.{i}.mlp.up_proj.weight", "layers.{i}.ffn.w_gate_up[1]"),
    Row("model.layers.{i}.mlp.down_proj.weight", "layers.{i}.ffn.down.weight"),
)


class HfFamily(NamedTuple):
    """One kind of Hugging Face folder: what its config.json says, and how its tensors are called.

    tensors: the layouts that it is written in, of which the first is the usual one. defaults: Model keys where
    config.json is silent. implied: Model keys it always has. routing: Model key -> their key, of what routers and
    experts need. more, read, write: keys that stand for several of ours, and the two ways.
    """

    architecture: str
    tensors: Tensors
    defaults: dict[str, Any]
    implied: dict[str, Any] = {}  # noqa: RUF012 (never changed)
    routing: dict[str, str] = {}  # noqa: RUF012
    more: tuple[str, ...] = ()
    read: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda config: {}
    write: Callable[[Model], dict[str, Any]] = lambda model: {}
