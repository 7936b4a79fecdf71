"""OLMoE: Qwen3-MoE's names; its norms of q and k are over all heads together."""

from moe_engine.checkpoint.hf.families.qwen3_moe import TABLE

__all__ = ["TABLE"]
