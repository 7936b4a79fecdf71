"""Llama: the dense decoder."""

from moe_engine.config.hf.families.family import DECODER, DENSE, HfFamily, Tensors

TENSORS: Tensors = {"dense": DECODER + DENSE}


FAMILY = HfFamily(
    "LlamaForCausalLM", TENSORS, {"rms_norm_eps": 1e-6, "rope_theta": 1e4, "max_position_embeddings": 2048}
)
