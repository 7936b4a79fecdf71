"""LLaMA-MoE-v2's attention MoE (2411.15708): an expert is one KV head with its query heads.

    A experts, h = H/A query heads each      q, o: heads a h .. (a+1) h      k, v: the KV head of those

With A = G an expert is a whole group. With A = split * G the experts of a group each have a copy of its KV head. All
experts chosen, with equal weights, and scale A: dense attention.
"""

from typing import NamedTuple

from torch import Tensor

from moe_engine.config import Model
from moe_engine.errors import ConfigError
from moe_engine.upcycle.options import Options, changed
from moe_engine.upcycle.preservation import Preservation


class AttentionExperts(NamedTuple):
    """w_q[A, h, C, D], w_k[A, C, D], w_v[A, C, D], w_o[A, D, h, C]."""

    w_q: Tensor
    w_k: Tensor
    w_v: Tensor
    w_o: Tensor


def child(model: Model, options: Options) -> Model:
    """The model, dense or with experts, with attention experts in the layers that hold experts."""
    _split(model, options)
    layers, ends = model.num_hidden_layers, options.dense_ends
    return changed(
        model,
        num_attention_experts=options.attention_experts,
        num_attention_experts_per_tok=options.attention_top_k,
        attention_moe_layers=tuple(range(ends, layers - ends)) if ends else "all",
        attention_scaling_factor=options.attention_scale or options.attention_experts / options.attention_top_k,
    )


def build(parent: Model, options: Options, q: Tensor, k: Tensor, v: Tensor, o: Tensor) -> AttentionExperts:
    """The experts of one layer. q[H*C, D], k and v [G*C, D], o[D, H*C]: Hugging Face's and the engine's shapes.

    ConfigError unless A is a multiple of the KV heads G and divides the query heads H.
    """
    split, experts, dim = _split(parent, options), options.attention_experts, parent.head_dim
    heads = parent.num_attention_heads // experts
    k, v = (w.view(-1, dim, w.shape[1]).repeat_interleave(split, dim=0) for w in (k, v))
    w_o = o.view(o.shape[0], experts, heads, dim).transpose(0, 1).contiguous()
    return AttentionExperts(q.reshape(experts, heads, dim, q.shape[1]).clone(), k, v, w_o)


def preserves(options: Options) -> Preservation:
    """A token meets only the tokens of its own experts."""
    return Preservation(
        "not preserved: the keys of an expert come from the tokens routed to it; dense attention only where all "
        "attention experts are chosen, with equal weights and scale A"
    )


def _split(model: Model, options: Options) -> int:
    """Experts that share a KV head."""
    heads, groups, experts = model.num_attention_heads, model.num_key_value_heads, options.attention_experts
    if not experts or experts % groups or heads % experts:
        valid = ", ".join(str(a) for a in range(groups, heads + 1, groups) if heads % a == 0)
        raise ConfigError(
            f"attention_experts {experts}: expected a multiple of {groups} KV heads that divides {heads} query heads: "
            f"valid are {valid}"
        )
    return experts // groups
