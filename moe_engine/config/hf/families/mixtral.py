"""Mixtral: experts one by one, as transformers 4 and 5 write them, or fused, as transformers 5 holds them."""

from moe_engine.config.hf.families.family import DECODER, ROUTING, HfFamily, Row, Tensors

MOE = "model.layers.{i}.block_sparse_moe"
TENSORS: Tensors = {
    "per-expert": (
        *DECODER,
        Row(f"{MOE}.gate.weight", "layers.{i}.ffn.router.weight"),
        Row(f"{MOE}.experts.{{e}}.w1.weight", "layers.{i}.ffn.experts.w_gate_up[{e},0]"),
        Row(f"{MOE}.experts.{{e}}.w3.weight", "layers.{i}.ffn.experts.w_gate_up[{e},1]"),
        Row(f"{MOE}.experts.{{e}}.w2.weight", "layers.{i}.ffn.experts.w_down[{e}]"),
    ),
    "fused": (
        *DECODER,
        Row("model.layers.{i}.mlp.gate.weight", "layers.{i}.ffn.router.weight"),
        Row("model.layers.{i}.mlp.experts.gate_up_proj", "layers.{i}.ffn.experts.w_gate_up", merged=1),
        Row("model.layers.{i}.mlp.experts.down_proj", "layers.{i}.ffn.experts.w_down"),
    ),
}


FAMILY = HfFamily(
    "MixtralForCausalLM",
    TENSORS,
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
)
