"""Half-width experts: the first F/2 neurons of the dense layer, with N(0, 1e-3) noise, the router not renormalised.

It does not preserve the function: half of the neurons are gone, and the rest is scaled by the top-k mass (about k/E).
Kept because published parameter counts (Llama-3.2-3B-MoE-8x) can be had with it alone; `copy` is the exact way.
"""

import torch

from moe_engine.config import Model
from moe_engine.errors import ConfigError
from moe_engine.upcycle.layer import Dense, Routed, take, with_noise
from moe_engine.upcycle.options import Options, upcycled
from moe_engine.upcycle.preservation import Preservation

NOISE_STD = 1e-3


def child(parent: Model, options: Options) -> Model:
    """Experts of width F/2; ConfigError if F is odd."""
    if parent.intermediate_size % 2:
        raise ConfigError(
            f"intermediate_size {parent.intermediate_size} has no half: use copy, or a parent of even width"
        )
    return upcycled(parent, options, moe_intermediate_size=parent.intermediate_size // 2, norm_topk_prob=False)


def build(layer: int, dense: Dense, options: Options) -> Routed:
    """The first half of the neurons, E times, each with noise of its own."""
    first_f = torch.arange(dense.gate_FD.shape[0] // 2, device=dense.gate_FD.device)
    routed = take(dense, first_f.expand(options.experts, -1))
    return with_noise(routed, options, layer, NOISE_STD if options.noise_std is None else options.noise_std)


def preserves(options: Options) -> Preservation:
    """Not preserved."""
    return Preservation("not preserved: half of the neurons are gone and the rest is scaled by the top-k mass")
