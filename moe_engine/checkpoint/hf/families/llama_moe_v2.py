"""LLaMA-MoE-v2: Mixtral's names, attention experts, an expert that is always on, and dense layers at both ends."""

from moe_engine.checkpoint.hf.families.llama import DECODER
from moe_engine.checkpoint.hf.families.mixtral import MOE
from moe_engine.checkpoint.hf.families.mixtral import TABLE as MIXTRAL
from moe_engine.checkpoint.hf.table import Row, Table

ATTENTION, ALWAYS = "model.layers.{i}.self_attn", "model.layers.{i}.mlp_residual"
TABLE: Table = {
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
