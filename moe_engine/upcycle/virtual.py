"""Virtual groups (2410.07524): fine-grained experts that start as the dense layer exactly.

The dense layer is cut into G shards; of N experts, expert n holds shard n mod G. The router has N/G different rows,
each repeated G times, so that top-K, G dividing K, takes whole groups and each shard exactly K/G times:

    router rows   a a a a  b b b b         G = 4, N = 8
    shards        0 1 2 3  0 1 2 3

A shard then has a share of 1/G of the weights, which a factor s restores: G where the weights are renormalised;
X G^2 / K, X = N/G, where they are the softmax over all experts (exact for a uniform router). s is put into w_down, so
that any reader of Mixtral sees the same function. Megatron's code (compat) puts s^(1/3) on gate, up and down, which a
SwiGLU does not turn into s.
"""

import torch
from torch import Tensor

from moe_engine.config import Model
from moe_engine.errors import ConfigError
from moe_engine.upcycle.layer import Dense, Routed, take
from moe_engine.upcycle.options import Options, part, upcycled
from moe_engine.upcycle.preservation import Preservation, exact


def child(parent: Model, options: Options) -> Model:
    """Experts of width F/G; ConfigError if G does not divide F."""
    width = part(parent.intermediate_size, options.granularity, "granularity")
    return upcycled(parent, options, moe_intermediate_size=width, norm_topk_prob=options.norm_topk_prob)


def build(layer: int, dense: Dense, options: Options) -> Routed:
    """Shard n mod G for expert n, times s."""
    neurons, shards = dense.gate_FD.shape[0], options.granularity
    shard_GF = torch.arange(neurons, device=dense.gate_FD.device).view(shards, part(neurons, shards, "granularity"))
    w_gate_up, w_down, _ = take(dense, shard_GF.repeat(options.experts // shards, 1))
    if options.compat:
        root = factor(options) ** (1 / 3)
        return Routed(_times(w_gate_up, root), _times(w_down, root))
    return Routed(w_gate_up, _times(w_down, factor(options)))


def factor(options: Options) -> float:
    """s, by which a shard makes up for its share of the weights."""
    if options.norm_topk_prob:
        return float(options.granularity)
    return options.experts * options.granularity / options.top_k


def repeat_rows(router_ND: Tensor, options: Options) -> Tensor:
    """A router for virtual groups: the first N/G of the given rows, each repeated G times."""
    groups = options.experts // options.granularity
    if router_ND.shape[0] < groups:
        raise ConfigError(f"the router has {router_ND.shape[0]} rows, expected {groups}: one for each group of experts")
    return router_ND[:groups].repeat_interleave(options.granularity, dim=0)


def preserves(options: Options) -> Preservation:
    """Exact with renormalised weights and s on w_down."""
    if options.compat and factor(options) != 1:
        return Preservation(
            "not preserved: s^(1/3) on gate and up is no factor s of a SwiGLU (7 to 20 % off at s = 2 to 8)"
        )
    if options.norm_topk_prob:
        return exact("each shard is taken K/G times and s = G makes up for its share of the weights")
    return Preservation("scaled: by the top-k mass times N/K; exact for a uniform router alone")


def _times(weight: Tensor, factor: float) -> Tensor:
    return (weight.float() * factor).to(weight.dtype)
