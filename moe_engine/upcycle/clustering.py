"""LLaMA-MoE's independent clustering (2406.16554): neurons whose gate (or up) rows point the same way form an expert.

Balanced k-means on the L2-normalised rows, exactly F/E neurons in each cluster.
"""

import torch.nn.functional as F
from torch import Tensor

from moe_engine.config import Model
from moe_engine.upcycle import random
from moe_engine.upcycle.kmeans import kmeans
from moe_engine.upcycle.layer import Dense, Routed, generator, take
from moe_engine.upcycle.options import Options, part

preserves = random.preserves


def child(parent: Model, options: Options) -> Model:
    """Experts of width F/E; ConfigError if E does not divide F."""
    return random.child(parent, options)


def build(layer: int, dense: Dense, options: Options) -> Routed:
    """Each neuron in one expert."""
    return take(dense, clusters(layer, dense, options))


def clusters(layer: int, dense: Dense, options: Options) -> Tensor:
    """neuron[E, F/E], ascending in each expert."""
    rows_FD = dense.gate_FD if options.projection == "gate" else dense.up_FD
    width = part(rows_FD.shape[0], options.experts, "experts")
    unit_FD = F.normalize(rows_FD.float(), dim=1)
    label_F = kmeans(unit_FD, options.experts, generator(options, layer), width, width).label_N
    return label_F.argsort(stable=True).view(options.experts, width)
