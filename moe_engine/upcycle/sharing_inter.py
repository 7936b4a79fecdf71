"""LLaMA-MoE's sharing-inter, the residual construction: what most experts would take is an expert that is always on.

y = moe(x) + shared(x). The shared expert is residual_experts * m neurons wide, the others m. With share_neurons a
routed expert is the top m of its importance over the other neurons; without, they are dealt out by the greedy
assignment, and all F neurons must then be used.
"""

import torch
from torch import Tensor

from moe_engine.config import Model
from moe_engine.errors import ConfigError
from moe_engine.upcycle.layer import Dense, Routed, take, take_shared
from moe_engine.upcycle.neurons import checked, greedy, shared_pool, top
from moe_engine.upcycle.options import Options, part, partitioned
from moe_engine.upcycle.preservation import Preservation


def child(parent: Model, options: Options) -> Model:
    """Experts of width m = expert_width, F / (experts + residual_experts) by default, and the shared one."""
    width = expert_width(parent.intermediate_size, options)
    return partitioned(parent, options, width, shared_intermediate_size=options.residual_experts * width)


def build(layer: int, dense: Dense, options: Options, score_EF: Tensor) -> Routed:
    """Scores of the routed experts alone: one group of tokens for each."""
    neurons, device = dense.gate_FD.shape[0], dense.gate_FD.device
    width = expert_width(neurons, options)
    score_EF = checked(score_EF, options.experts, neurons)
    shared = shared_pool(score_EF, width, options.residual_experts * width)
    free_F = torch.ones(neurons, dtype=torch.bool).index_fill(0, shared, False)
    choose = top if options.share_neurons else greedy
    routed = take(dense, choose(score_EF, width, free_F).to(device))
    return routed._replace(shared=take_shared(dense, shared.to(device)))


def preserves(options: Options) -> Preservation:
    """Not preserved: the shared neurons are exact, the routed ones are chosen."""
    return Preservation("not preserved: the shared neurons are all there, the others only where their expert is chosen")


def expert_width(neurons: int, options: Options) -> int:
    """m; ConfigError if the pool and one expert do not fit into the layer, or a partition leaves neurons over."""
    blocks = options.experts + options.residual_experts
    if options.residual_experts < 1:
        raise ConfigError("residual_experts 0: this method needs 1 or more; without, use sharing_inner or gradient")
    if options.expert_width is None:
        return part(neurons, blocks, "experts + residual_experts =")
    width = options.expert_width
    if not options.share_neurons and blocks * width != neurons:
        raise ConfigError(
            f"expert_width {width} x {blocks} (experts + residual_experts) is not the {neurons} neurons of a layer, "
            "which share_neurons false deals out: leave expert_width out, or share neurons"
        )
    if (options.residual_experts + 1) * width > neurons:
        raise ConfigError(f"expert_width {width}: residual_experts + 1 of that are more than {neurons} neurons")
    return width
