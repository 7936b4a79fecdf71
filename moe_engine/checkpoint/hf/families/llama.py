"""Llama: dense decoder. Also what every other family says of embeddings, attention, norms and head."""

from moe_engine.checkpoint.hf.table import Row, Table

DECODER = (
    Row("model.embed_tokens.weight", "embedding.weight"),
    Row("model.layers.{i}.input_layernorm.weight", "layers.{i}.attention_norm.weight"),
    Row("model.layers.{i}.self_attn.q_proj.weight", "layers.{i}.attention.q.weight"),
    Row("model.layers.{i}.self_attn.k_proj.weight", "layers.{i}.attention.k.weight"),
    Row("model.layers.{i}.self_attn.v_proj.weight", "layers.{i}.attention.v.weight"),
    Row("model.layers.{i}.self_attn.o_proj.weight", "layers.{i}.attention.o.weight"),
    Row("model.layers.{i}.post_attention_layernorm.weight", "layers.{i}.ffn_norm.weight"),
    Row("model.norm.weight", "norm.weight"),
    Row("lm_head.weight", "head.weight"),
)
DENSE = (
    Row("model.layers.{i}.mlp.gate_proj.weight", "layers.{i}.ffn.w_gate_up[0]"),
    Row("model.layers.{i}.mlp.up_proj.weight", "layers.{i}.ffn.w_gate_up[1]"),
    Row("model.layers.{i}.mlp.down_proj.weight", "layers.{i}.ffn.down.weight"),
)
TABLE: Table = {"dense": DECODER + DENSE}
