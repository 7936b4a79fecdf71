"""Sparse upcycling (2212.05055): every expert is a copy of the dense layer; the router alone is new.

With renormalised weights any router preserves the function. noise_std > 0 breaks the symmetry of the copies: N(0, std)
on all elements, or on a random noise_share of them (noise upcycling).
"""

import torch

from moe_engine.config import Model
from moe_engine.upcycle.layer import Dense, Routed, take, with_noise
from moe_engine.upcycle.options import Options, upcycled
from moe_engine.upcycle.preservation import Preservation, copies


def child(parent: Model, options: Options) -> Model:
    """Experts of the full width F."""
    return upcycled(
        parent, options, moe_intermediate_size=parent.intermediate_size, norm_topk_prob=options.norm_topk_prob
    )


def build(layer: int, dense: Dense, options: Options) -> Routed:
    """E copies of the dense layer, with noise if asked for."""
    every_F = torch.arange(dense.gate_FD.shape[0], device=dense.gate_FD.device)
    routed = take(dense, every_F.expand(options.experts, -1))
    return with_noise(routed, options, layer, options.noise_std or 0.0)


def preserves(options: Options) -> Preservation:
    """Exact without noise, where the weights are renormalised."""
    if options.noise_std:
        return Preservation(f"not preserved: the experts carry noise of std {options.noise_std}")
    return copies(options)
