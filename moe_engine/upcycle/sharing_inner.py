"""LLaMA-MoE's sharing-inner: expert e is the top m neurons of its own importance; neurons may repeat or be in none."""

from torch import Tensor

from moe_engine.config import Model
from moe_engine.errors import ConfigError
from moe_engine.upcycle.layer import Dense, Routed, take
from moe_engine.upcycle.neurons import checked, top
from moe_engine.upcycle.options import Options, part, partitioned
from moe_engine.upcycle.preservation import Preservation


def child(parent: Model, options: Options) -> Model:
    """Experts of width m = expert_width, F/E by default."""
    return partitioned(parent, options, _width(parent.intermediate_size, options))


def build(layer: int, dense: Dense, options: Options, score_EF: Tensor) -> Routed:
    """The top m neurons of each row of the scores."""
    neurons = dense.gate_FD.shape[0]
    neuron_Em = top(checked(score_EF, options.experts, neurons), _width(neurons, options))
    return take(dense, neuron_Em.to(dense.gate_FD.device))


def preserves(options: Options) -> Preservation:
    """Not preserved: no partition."""
    return Preservation("not preserved: neurons are in several experts or in none")


def _width(neurons: int, options: Options) -> int:
    if options.expert_width is None:
        return part(neurons, options.experts, "experts")
    if options.expert_width > neurons:
        raise ConfigError(f"expert_width {options.expert_width} is more than the {neurons} neurons of a layer")
    return options.expert_width
