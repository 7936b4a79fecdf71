"""OLMoE: Qwen3-MoE's names; its norms of q and k are over all heads together."""

from collections.abc import Mapping
from typing import Any

from moe_engine.config.hf.families.family import ROUTING, HfFamily
from moe_engine.config.hf.families.qwen3_moe import TENSORS


def olmoe_heads(config: Mapping[str, Any]) -> dict[str, Any]:
    """OLMoE's norms of q and k are as wide as the model: transformers 4 reads no head_dim, 5 could not use another."""
    return {"head_dim": config["hidden_size"] // config["num_attention_heads"]}


FAMILY = HfFamily(
    "OlmoeForCausalLM",
    TENSORS,
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
)
