"""LLaMA-MoE-v2's vanilla MLP MoE (2411.15708): the neurons cut in order, F/E to each expert; or its gradient split."""

import torch
from torch import Tensor

from moe_engine.config import Model
from moe_engine.upcycle import gradient, random
from moe_engine.upcycle.layer import Dense, Routed, take
from moe_engine.upcycle.options import Options, part

preserves = random.preserves


def child(parent: Model, options: Options) -> Model:
    """Experts of width F/E, routed output scaled by E/k (4.0 for 8 experts top-2)."""
    return random.child(parent, options)


def build(layer: int, dense: Dense, options: Options, score_EF: Tensor | None = None) -> Routed:
    """Expert e holds neurons e F/E to (e+1) F/E; with scores, those of the gradient split."""
    if score_EF is not None:
        return gradient.build(layer, dense, options, score_EF)
    neurons = dense.gate_FD.shape[0]
    width = part(neurons, options.experts, "experts")
    return take(dense, torch.arange(neurons, device=dense.gate_FD.device).view(options.experts, width))
