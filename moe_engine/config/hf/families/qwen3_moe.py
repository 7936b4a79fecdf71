"""Qwen3-MoE: norms of the heads of q and k, experts one by one or fused, dense layers among them."""

from collections.abc import Mapping
from typing import Any

from moe_engine.config import Model
from moe_engine.config.hf.families.family import DECODER, DENSE, ROUTING, HfFamily, Row, Tensors

MLP = "model.layers.{i}.mlp"
SHARED = (
    *DECODER,
    Row("model.layers.{i}.self_attn.q_norm.weight", "layers.{i}.attention.q_norm.weight"),
    Row("model.layers.{i}.self_attn.k_norm.weight", "layers.{i}.attention.k_norm.weight"),
    *DENSE,
    Row(f"{MLP}.gate.weight", "layers.{i}.ffn.router.weight"),
)
TENSORS: Tensors = {
    "per-expert": (
        *SHARED,
        Row(f"{MLP}.experts.{{e}}.gate_proj.weight", "layers.{i}.ffn.experts.w_gate_up[{e},0]"),
        Row(f"{MLP}.experts.{{e}}.up_proj.weight", "layers.{i}.ffn.experts.w_gate_up[{e},1]"),
        Row(f"{MLP}.experts.{{e}}.down_proj.weight", "layers.{i}.ffn.experts.w_down[{e}]"),
    ),
    "fused": (
        *SHARED,
        Row(f"{MLP}.experts.gate_up_proj", "layers.{i}.ffn.experts.w_gate_up", merged=1),
        Row(f"{MLP}.experts.down_proj", "layers.{i}.ffn.experts.w_down"),
    ),
}


def qwen3_moe_layers(config: Mapping[str, Any]) -> dict[str, Any]:
    """Every decoder_sparse_step-th layer holds experts, but for mlp_only_layers."""
    layers, dense = config["num_hidden_layers"], config.get("mlp_only_layers") or []
    step = config.get("decoder_sparse_step") or 1
    count = {"num_local_experts": config.get("num_experts") or 128}
    if not dense and step == 1:
        return count
    return count | {"moe_layers": [i for i in range(layers) if i not in dense and (i + 1) % step == 0]}


def qwen3_moe_keys(model: Model) -> dict[str, Any]:
    """The dense layers by their numbers."""
    dense = [i for i in range(model.num_hidden_layers) if not model.is_moe(i)]
    return {"decoder_sparse_step": 1, "mlp_only_layers": dense}


FAMILY = HfFamily(
    "Qwen3MoeForCausalLM",
    TENSORS,
    {
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e4,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 4,
        "num_local_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": False,
        "router_aux_loss_coef": 0.001,
    },
    {"qk_norm": "head"},
    ROUTING
    | {"num_local_experts": "num_experts", "moe_intermediate_size": "moe_intermediate_size"}
    | {"norm_topk_prob": "norm_topk_prob"},
    ("decoder_sparse_step", "mlp_only_layers"),
    qwen3_moe_layers,
    qwen3_moe_keys,
)
