"""Mixtral: experts one by one, as transformers 4 and 5 write them, or fused, as transformers 5 holds them."""

from moe_engine.checkpoint.hf.families.llama import DECODER
from moe_engine.checkpoint.hf.table import Row, Table

MOE = "model.layers.{i}.block_sparse_moe"
TABLE: Table = {
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
