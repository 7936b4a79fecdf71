"""The kernels: what the MoE layer and the loss compute, on one device, without knowing of ranks.

An op is a folder: `__init__.py` (contract, schema, backward), `reference.py` (the definition in plain torch, the truth
for tests), `cases.py` (sizes and tolerances, for tests and benchmarks), and `csrc/<op>.cpp` (CPU). PyTorch's dispatcher
chooses: the C++ kernel on CPU, the reference elsewhere and on CPU where `moe_engine._C` was not built (`compiled` is
False). Every op gives the same bits on every run, and breaks ties by the lowest index.

    index, weight <- router_topk(logits)                 grouped_mm -> swiglu -> grouped_mm: the experts
    sort_by_expert(index) -> permute(x) -> experts -> unpermute(rows, weight)
    cross_entropy_stats, cross_entropy_grad: the loss over a shard of the vocabulary
"""

from moe_engine.ops.backend import compiled, use
from moe_engine.ops.cross_entropy import cross_entropy_grad, cross_entropy_stats
from moe_engine.ops.grouped_mm import grouped_mm
from moe_engine.ops.permute import permute, sort_by_expert, unpermute
from moe_engine.ops.router_topk import router_topk
from moe_engine.ops.swiglu import swiglu

__all__ = [
    "compiled",
    "cross_entropy_grad",
    "cross_entropy_stats",
    "grouped_mm",
    "permute",
    "router_topk",
    "sort_by_expert",
    "swiglu",
    "unpermute",
    "use",
]
