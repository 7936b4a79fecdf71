"""The kernels: what the MoE layer and the loss compute, on one device, without knowing of ranks.

An op is a folder: `__init__.py` (contract, schema, backward), `reference.py` (the definition in plain torch, the truth
for tests), `triton.py` (CUDA), `cases.py` (sizes and tolerances for tests), and `csrc/<op>.cpp` (CPU).
PyTorch's dispatcher chooses: Triton on CUDA, C++ on CPU, and the reference for fp64 on CUDA, and on CPU where
`moe_engine._C` was not built (`compiled` is False). Every op gives the same bits on every run, and breaks ties by the
lowest index.

    logits <- router_logits(x, w)       weight, index, probs, lse <- router_topk(logits)
    sort_by_expert(index) -> experts(x, weight, matrices): the layer on one rank
    sort_by_expert(index) -> permute(x) -> to other ranks, experts, and back -> unpermute(rows)
    grouped_mm, swiglu: the pieces of experts, for layers that need what is between them
    cross_entropy_stats, cross_entropy_grad: the loss over a shard of the vocabulary
"""

from moe_engine.ops.backend import compiled, use
from moe_engine.ops.cross_entropy import cross_entropy_grad, cross_entropy_stats
from moe_engine.ops.experts import experts
from moe_engine.ops.grouped_mm import grouped_mm
from moe_engine.ops.permute import permute, sort_by_expert, unpermute
from moe_engine.ops.router_logits import router_logits
from moe_engine.ops.router_topk import router_topk
from moe_engine.ops.swiglu import swiglu

__all__ = [
    "compiled",
    "cross_entropy_grad",
    "cross_entropy_stats",
    "experts",
    "grouped_mm",
    "permute",
    "router_logits",
    "router_topk",
    "sort_by_expert",
    "swiglu",
    "unpermute",
    "use",
]
