"""One table a family: the name of each tensor on disk, and the weight of the engine that it is, or is a part of."""

from moe_engine.checkpoint.hf.families import llama, llama_moe_v2, mixtral, olmoe, qwen3_moe
from moe_engine.checkpoint.hf.table import Table

TABLES: dict[str, Table] = {
    "llama": llama.TABLE,
    "mixtral": mixtral.TABLE,
    "qwen3_moe": qwen3_moe.TABLE,
    "olmoe": olmoe.TABLE,
    "llama_moe_v2": llama_moe_v2.TABLE,
}
