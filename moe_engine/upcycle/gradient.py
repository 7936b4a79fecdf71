"""LLaMA-MoE's gradient split: each neuron goes to the expert whose tokens it matters to most, F/E to each."""

from torch import Tensor

from moe_engine.config import Model
from moe_engine.upcycle import random
from moe_engine.upcycle.layer import Dense, Routed, take
from moe_engine.upcycle.neurons import checked, greedy
from moe_engine.upcycle.options import Options, part

preserves = random.preserves


def child(parent: Model, options: Options) -> Model:
    """Experts of width F/E; ConfigError if E does not divide F."""
    return random.child(parent, options)


def build(layer: int, dense: Dense, options: Options, score_EF: Tensor) -> Routed:
    """Each neuron in one expert, by the greedy assignment on its importance."""
    neurons = dense.gate_FD.shape[0]
    width = part(neurons, options.experts, "experts")
    neuron_Ef = greedy(checked(score_EF, options.experts, neurons), width)
    return take(dense, neuron_Ef.to(dense.gate_FD.device))
