"""Qwen3-MoE: norms of the heads of q and k, experts one by one or fused, dense layers among them."""

from moe_engine.checkpoint.hf.families.llama import DECODER, DENSE
from moe_engine.checkpoint.hf.table import Row, Table

MLP = "model.layers.{i}.mlp"
SHARED = (
    *DECODER,
    Row("model.layers.{i}.self_attn.q_norm.weight", "layers.{i}.attention.q_norm.weight"),
    Row("model.layers.{i}.self_attn.k_norm.weight", "layers.{i}.attention.k_norm.weight"),
    *DENSE,
    Row(f"{MLP}.gate.weight", "layers.{i}.ffn.router.weight"),
)
TABLE: Table = {
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
