"""LLaMA-MoE's independent random construction (2406.16554): the neurons shuffled and dealt out, F/E to each expert."""

import torch

from moe_engine.config import Model
from moe_engine.upcycle.layer import Dense, Routed, generator, take
from moe_engine.upcycle.options import Options, part, partitioned
from moe_engine.upcycle.preservation import Preservation, partition


def child(parent: Model, options: Options) -> Model:
    """Experts of width F/E; ConfigError if E does not divide F."""
    return partitioned(parent, options, part(parent.intermediate_size, options.experts, "experts"))


def build(layer: int, dense: Dense, options: Options) -> Routed:
    """Each neuron in one expert."""
    width = part(dense.gate_FD.shape[0], options.experts, "experts")
    order_F = torch.randperm(dense.gate_FD.shape[0], generator=generator(options, layer))
    neuron_Ef = order_F.view(options.experts, width).sort(dim=1).values
    return take(dense, neuron_Ef.to(dense.gate_FD.device))


def preserves(options: Options) -> Preservation:
    """Not preserved, unless all experts are chosen."""
    return partition(options.scale or options.experts / options.top_k, options.experts)
