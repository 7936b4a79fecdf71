"""Drop-upcycling (2502.19261): in each copy a random int(r F) of the neurons start anew, so that experts can differ.

    S random, |S| = int(r F);  rows S of gate and up and columns S of down ~ N(mean, std) of what they replace

mean and std are those of the replaced block of each matrix. The paper has one S for the three matrices; its released
code (compat) shuffles the neurons of an expert and draws an S for each matrix.
"""

import torch
from torch import Tensor

from moe_engine.config import Model
from moe_engine.upcycle import copy
from moe_engine.upcycle.layer import Dense, Routed, generator, take
from moe_engine.upcycle.options import Options
from moe_engine.upcycle.preservation import Preservation, copies


def child(parent: Model, options: Options) -> Model:
    """As copy."""
    return copy.child(parent, options)


def build(layer: int, dense: Dense, options: Options) -> Routed:
    """E copies, each with neurons of its own redrawn."""
    neurons, experts = dense.gate_FD.shape[0], options.experts
    draws = [generator(options, layer, expert) for expert in range(experts)]
    if options.compat:
        order_EF = torch.stack([torch.randperm(neurons, generator=draw) for draw in draws])
    else:
        order_EF = torch.arange(neurons).expand(experts, -1)
    routed = take(dense, order_EF.to(dense.gate_FD.device))
    for gate_up, down, draw in zip(routed.w_gate_up, routed.w_down, draws):
        replaced = _choose(neurons, options, draw)
        for matrix in (gate_up[0], gate_up[1], down.T):
            _redraw(matrix, replaced, draw)
            if options.compat:
                replaced = _choose(neurons, options, draw)
    return routed


def preserves(options: Options) -> Preservation:
    """Exact if nothing is dropped."""
    if options.drop_ratio == 0:
        return copies(options)
    return Preservation(f"not preserved: {options.drop_ratio:.0%} of the neurons of each expert start anew")


def _choose(neurons: int, options: Options, draw: torch.Generator) -> Tensor:
    return torch.randperm(neurons, generator=draw)[: int(options.drop_ratio * neurons)].sort().values


def _redraw(matrix_FD: Tensor, rows: Tensor, draw: torch.Generator) -> None:
    """Rows of a matrix, in place, from the normal distribution with their own mean and deviation."""
    rows = rows.to(matrix_FD.device)
    if len(rows):
        block = matrix_FD[rows].float()
        fresh = torch.randn(block.shape, generator=draw).to(block.device)
        matrix_FD[rows] = (fresh * block.std() + block.mean()).to(matrix_FD.dtype)
