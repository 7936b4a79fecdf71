"""Exact matrix-product FLOPs of the decoder, per token. A multiply-add is 2 FLOPs; backward costs twice forward.

Counted: q, k, v, o, causal attention at half the square, FFNs (dense, shared, chosen experts), routers, the head. Not
counted: embedding look-ups, norms, softmax, recomputation (so MFU does not reward it), and the saving of a document
mask. A sequence of an attention expert has the length that it has at uniform routing, k/A of the whole.
"""

from moe_engine.config import Model


def forward_flops_per_token(config: Model, seq_length: int) -> float:
    """Matrix-product FLOPs of one token's forward pass in sequences of `seq_length`."""
    hidden, head_dim = config.hidden_size, config.head_dim
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    attention = 2 * hidden * head_dim * (2 * heads + 2 * kv_heads) + 2 * heads * head_dim * (seq_length + 1)
    dense = 6 * hidden * config.intermediate_size
    visited = config.num_experts_per_tok * config.moe_intermediate_size + config.shared_intermediate_size
    router = 2 * hidden * config.num_local_experts
    moe_layers, routed = config.num_moe_layers, config.num_attention_moe_layers
    layers = (config.num_hidden_layers - routed) * attention + routed * _attention_moe(config, seq_length)
    layers += moe_layers * (6 * hidden * visited + router) + (config.num_hidden_layers - moe_layers) * dense
    return layers + 2 * hidden * config.vocab_size


def _attention_moe(config: Model, seq_length: int) -> float:
    """Of one token in one attention MoE layer: its k experts of H/A query heads, and the router."""
    hidden, experts, k = config.hidden_size, config.num_attention_experts, config.num_attention_experts_per_tok
    if not experts:
        return 0.0
    heads = config.num_attention_heads // experts
    expert = 2 * hidden * (2 * heads + 2) + 2 * heads * (seq_length * k / experts + 1)
    return k * config.head_dim * expert + 2 * hidden * experts


def step_flops_per_token(config: Model, seq_length: int) -> float:
    """Forward and backward of one token: three times forward."""
    return 3 * forward_flops_per_token(config, seq_length)
