"""One feed-forward layer on its way from dense to experts, and what most methods do with it: take neurons, add noise.

    dense     gate[F, D]  up[F, D]  down[D, F]                 neuron i is row i of gate and up, column i of down
    routed    w_gate_up[E, 2, f, D]  w_down[E, D, f]           and perhaps a dense layer that is always on

Splitting the neurons changes nothing in their sum: sum_e FFN(x; neurons of e) = FFN(x), whatever the order.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from moe_engine.parallel.weight import key_of
from moe_engine.upcycle.options import Options


class Dense(NamedTuple):
    """One dense SwiGLU layer: y = down (silu(gate x) * up x)."""

    gate_FD: Tensor
    up_FD: Tensor
    down_DF: Tensor


class Routed(NamedTuple):
    """The experts of one layer, w_gate_up[E, 2, f, D] and w_down[E, D, f]; `shared` is added to every token."""

    w_gate_up: Tensor
    w_down: Tensor
    shared: Dense | None = None


def take(dense: Dense, neuron_Ef: Tensor) -> Routed:
    """Expert e holds the neurons neuron_Ef[e] (int64) of the dense layer, copied."""
    w_gate_up = torch.stack([dense.gate_FD[neuron_Ef], dense.up_FD[neuron_Ef]], dim=1)
    return Routed(w_gate_up, dense.down_DF[:, neuron_Ef].transpose(0, 1).contiguous())


def take_shared(dense: Dense, neuron_f: Tensor) -> Dense:
    """A narrower dense layer of the given neurons."""
    return Dense(dense.gate_FD[neuron_f], dense.up_FD[neuron_f], dense.down_DF[:, neuron_f].contiguous())


def generator(options: Options, layer: int, expert: int | str = "") -> torch.Generator:
    """The stream of one expert of one layer, or of a whole layer, on the CPU."""
    return torch.Generator().manual_seed(key_of(options.seed, f"upcycle/{layer}/{expert}"))


def with_noise(routed: Routed, options: Options, layer: int, std: float) -> Routed:
    """N(0, std) added to a random `noise_share` of the experts' elements, other for each expert; in place."""
    if std == 0:
        return routed
    for expert in range(routed.w_down.shape[0]):
        draw = generator(options, layer, expert)
        for matrix in (routed.w_gate_up[expert], routed.w_down[expert]):
            noise = torch.randn(matrix.shape, generator=draw) * std
            if options.noise_share < 1:
                noise *= torch.rand(matrix.shape, generator=draw) < options.noise_share
            matrix.copy_(matrix.float() + noise.to(matrix.device))
    return routed
