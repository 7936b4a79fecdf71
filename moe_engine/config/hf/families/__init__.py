"""One file a family: its config.json's keys and its tensors' names, by model_type."""

from moe_engine.config.hf.families import llama, llama_moe_v2, mixtral, olmoe, qwen3_moe
from moe_engine.config.hf.families.family import HfFamily

FAMILIES: dict[str, HfFamily] = {
    "llama": llama.FAMILY,
    "mixtral": mixtral.FAMILY,
    "qwen3_moe": qwen3_moe.FAMILY,
    "olmoe": olmoe.FAMILY,
    "llama_moe_v2": llama_moe_v2.FAMILY,
}
