"""LLaMA-MoE-v2: Mixtral's names, attention experts, an expert that is always on, and dense layers at both ends."""

from collections.abc import Mapping
from typing import Any

from moe_engine.config import Model
from moe_engine.config.hf.families.family import DECODER, ROUTING, HfFamily, Row, Tensors
from moe_engine.config.hf.families.mixtral import MOE
from moe_engine.config.hf.families.mixtral import TENSORS as MIXTRAL

ATTENTION, ALWAYS = "model.layers.{i}.self_attn", "model.layers.{i}.mlp_residual"
TENSORS: Tensors = {
    "per-expert": (
        *DECODER,
        Row(f"{ATTENTION}.gate.weight", "layers.{i}.attention.router.weight"),
        Row(f"{ATTENTION}.q_proj.{{e}}.weight", "layers.{i}.attention.experts.w_q[{e}]", merged=0),
        Row(f"{ATTENTION}.k_proj.{{e}}.weight", "layers.{i}.attention.experts.w_k[{e}]"),
        Row(f"{ATTENTION}.v_proj.{{e}}.weight", "layers.{i}.attention.experts.w_v[{e}]"),
        Row(f"{ATTENTION}.o_proj.{{e}}.weight", "layers.{i}.attention.experts.w_o[{e}]", merged=1),
        *MIXTRAL["per-expert"][len(DECODER) :],
        Row(f"{ALWAYS}.w1.weight", "layers.{i}.ffn.shared.w_gate_up[0]"),
        Row(f"{ALWAYS}.w3.weight", "layers.{i}.ffn.shared.w_gate_up[1]"),
        Row(f"{ALWAYS}.w2.weight", "layers.{i}.ffn.shared.down.weight"),
        Row(f"{MOE}.w1.weight", "layers.{i}.ffn.w_gate_up[0]"),
        Row(f"{MOE}.w3.weight", "layers.{i}.ffn.w_gate_up[1]"),
        Row(f"{MOE}.w2.weight", "layers.{i}.ffn.down.weight"),
    ),
}


ENDS = "num_moe_contract_layers"
LLAMA_MOE_V2 = (
    *(ENDS, "intermediate_size_residual", "scale_factor", "use_attn_moe", "attn_experts", "top_k_attn"),
    *("scale_factor_attn", "use_layer_wise_balance", "moe_type", "act_rescale", "add_rescale_bias"),
)


def llama_moe_v2_experts(config: Mapping[str, Any]) -> dict[str, Any]:
    """LLaMA-MoE-v2 (2411.15708): c dense layers at both ends, as wide as all experts; one expert that is always on."""
    experts, width, ends = config["num_local_experts"], config["intermediate_size"], config.get(ENDS) or 0
    always = config.get("intermediate_size_residual") or 0
    inner = {"moe_layers": list(range(ends, config["num_hidden_layers"] - ends))} if ends else {}
    values = inner | {"intermediate_size": experts * width + always, "shared_intermediate_size": always}
    values["routed_scaling_factor"] = config.get("scale_factor") or experts / config["num_experts_per_tok"]
    if not config.get("use_attn_moe"):
        return values
    groups = config["num_key_value_heads"]
    return values | {
        "num_attention_experts": config.get("attn_experts") or groups,
        "num_attention_experts_per_tok": config["top_k_attn"],
        "attention_scaling_factor": config.get("scale_factor_attn") or groups,
        "attention_moe_layers": inner.get("moe_layers", "all"),
    }


def llama_moe_v2_keys(model: Model) -> dict[str, Any]:
    """As its own converter writes them."""
    keys: dict[str, Any] = {
        ENDS: next((i for i in range(model.num_hidden_layers) if model.is_moe(i)), 0),
        "intermediate_size_residual": model.shared_intermediate_size or None,
        "scale_factor": model.routed_scaling_factor,
        "use_attn_moe": model.num_attention_moe_layers > 0,
    }
    if model.num_attention_moe_layers:
        keys |= {"attn_experts": model.num_attention_experts, "top_k_attn": model.num_attention_experts_per_tok}
        keys |= {"scale_factor_attn": model.attention_scaling_factor}
    return keys


FAMILY = HfFamily(
    "MixtralForCausalLM",
    TENSORS,
    {"rms_norm_eps": 1e-5, "rope_theta": 1e6, "max_position_embeddings": 131072, "router_aux_loss_coef": 0.001},
    {"norm_topk_prob": True},
    ROUTING | {"num_local_experts": "num_local_experts", "moe_intermediate_size": "intermediate_size"},
    LLAMA_MOE_V2,
    llama_moe_v2_experts,
    llama_moe_v2_keys,
)
