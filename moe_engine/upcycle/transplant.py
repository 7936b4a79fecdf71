"""The parts of an upcycled model under the engine's names, and a Transformer made of them and of its dense parent."""

from collections.abc import Mapping

import torch
from torch import Tensor

from moe_engine.model.mlp import DenseMLP
from moe_engine.model.transformer import Transformer
from moe_engine.upcycle.attention import AttentionExperts
from moe_engine.upcycle.layer import Dense, Routed


def dense_layer(model: Transformer, layer: int) -> Dense:
    """The feed-forward layer of decoder layer `layer` (from 0), which must be dense; views, not copies."""
    block = model.get_submodule(f"layers.{layer}.ffn")
    if not isinstance(block, DenseMLP):
        raise ValueError(f"layer {layer} holds experts, expected a dense layer")
    gate_FD, up_FD = block.w_gate_up.detach()
    return Dense(gate_FD, up_FD, block.down.weight.detach())


def routed_weights(layer: int, routed: Routed, router_ED: Tensor) -> dict[str, Tensor]:
    """The engine's names and tensors of an MoE layer; the router in the experts' dtype."""
    prefix, dtype = f"layers.{layer}.ffn", routed.w_down.dtype
    weights = {
        f"{prefix}.router.weight": router_ED.to(dtype),
        f"{prefix}.experts.w_gate_up": routed.w_gate_up,
        f"{prefix}.experts.w_down": routed.w_down,
    }
    if routed.shared is not None:
        weights[f"{prefix}.shared.w_gate_up"] = torch.stack([routed.shared.gate_FD, routed.shared.up_FD])
        weights[f"{prefix}.shared.down.weight"] = routed.shared.down_DF
    return weights


def attention_weights(layer: int, experts: AttentionExperts, router_AD: Tensor) -> dict[str, Tensor]:
    """The engine's names and tensors of an attention MoE layer."""
    prefix = f"layers.{layer}.attention"
    named = {f"{prefix}.experts.{name}": weight for name, weight in experts._asdict().items()}
    return {f"{prefix}.router.weight": router_AD.to(experts.w_q.dtype)} | named


@torch.no_grad()
def transplant(parent: Transformer, child: Transformer, parts: Mapping[str, Tensor]) -> None:
    """Fills the child from `parts` and the parent's weights of the same name. ValueError if one is not to be found."""
    theirs = dict(parent.named_parameters())
    for name, parameter in child.named_parameters():
        source = parts.get(name, theirs.get(name))
        if source is None or source.shape != parameter.shape:
            found = None if source is None else tuple(source.shape)
            raise ValueError(f"found {found} for {name}, expected {tuple(parameter.shape)}")
        parameter.copy_(source)
