"""What a model_type says without saying it: one `HfFamily` each, used in both directions."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from moe_engine.config import Model

ROUTING = {
    "num_experts_per_tok": "num_experts_per_tok",
    "router_aux_loss_coef": "router_aux_loss_coef",
}
ENDS = "num_moe_contract_layers"
LLAMA_MOE_V2 = (
    *(ENDS, "intermediate_size_residual", "scale_factor", "use_attn_moe", "attn_experts", "top_k_attn"),
    *("scale_factor_attn", "use_layer_wise_balance", "moe_type", "act_rescale", "add_rescale_bias"),
)


class HfFamily(NamedTuple):
    """What a model_type says without saying it.

    defaults: Model keys where config.json is silent. implied: Model keys it always has. routing: Model key -> their
    key, of what routers and experts need. more, read, write: keys that stand for several of ours, and the two ways.
    """

    architecture: str
    defaults: dict[str, Any]
    implied: dict[str, Any] = {}  # noqa: RUF012 (never changed)
    routing: dict[str, str] = {}  # noqa: RUF012
    more: tuple[str, ...] = ()
    read: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda config: {}
    write: Callable[[Model], dict[str, Any]] = lambda model: {}


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


def olmoe_heads(config: Mapping[str, Any]) -> dict[str, Any]:
    """OLMoE's norms of q and k are as wide as the model: transformers 4 reads no head_dim, 5 could not use another."""
    return {"head_dim": config["hidden_size"] // config["num_attention_heads"]}


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


FAMILIES = {
    "llama": HfFamily("LlamaForCausalLM", {"rms_norm_eps": 1e-6, "rope_theta": 1e4, "max_position_embeddings": 2048}),
    "mixtral": HfFamily(
        "MixtralForCausalLM",
        {
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "max_position_embeddings": 131072,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "router_aux_loss_coef": 0.001,
        },
        {"norm_topk_prob": True},
        ROUTING
        | {"num_local_experts": "num_local_experts", "router_jitter_noise": "router_jitter_noise"}
        | {"moe_intermediate_size": "intermediate_size"},
    ),
    "qwen3_moe": HfFamily(
        "Qwen3MoeForCausalLM",
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
    ),
    "olmoe": HfFamily(
        "OlmoeForCausalLM",
        {
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e4,
            "max_position_embeddings": 4096,
            "num_local_experts": 64,
            "num_experts_per_tok": 8,
            "norm_topk_prob": False,
            "router_aux_loss_coef": 0.01,
        },
        {"qk_norm": "projection"},
        ROUTING
        | {"num_local_experts": "num_experts", "moe_intermediate_size": "intermediate_size"}
        | {"norm_topk_prob": "norm_topk_prob"},
        read=olmoe_heads,
    ),
    "llama_moe_v2": HfFamily(
        "MixtralForCausalLM",
        {"rms_norm_eps": 1e-5, "rope_theta": 1e6, "max_position_embeddings": 131072, "router_aux_loss_coef": 0.001},
        {"norm_topk_prob": True},
        ROUTING | {"num_local_experts": "num_local_experts", "moe_intermediate_size": "intermediate_size"},
        LLAMA_MOE_V2,
        llama_moe_v2_experts,
        llama_moe_v2_keys,
    ),
}
