"""LLaMA-MoE-v2's residual MLP (2411.15708): one expert that is always on and routed ones, their outputs just added.

Published as 1 + 7 experts of F/8, top-1: experts=7, top_k=1, dense_ends=1. The neurons are chosen as in sharing_inter,
from importances whose groups are the tokens of each gate (`importance.py`), and the routed output is not scaled.
"""

from torch import Tensor

from moe_engine.config import Model
from moe_engine.upcycle import sharing_inter
from moe_engine.upcycle.layer import Dense, Routed
from moe_engine.upcycle.options import Options, partitioned

preserves = sharing_inter.preserves


def child(parent: Model, options: Options) -> Model:
    """As sharing_inter, with scale 1."""
    width = sharing_inter.expert_width(parent.intermediate_size, options)
    return partitioned(parent, options, width, 1.0, shared_intermediate_size=options.residual_experts * width)


def build(layer: int, dense: Dense, options: Options, score_EF: Tensor) -> Routed:
    """As sharing_inter."""
    return sharing_inter.build(layer, dense, options, score_EF)
