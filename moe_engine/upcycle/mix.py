"""Branch-train-mix (2403.07816): expert e is the feed-forward layer of dense model e; the rest is averaged.

The models come from one seed model and have the same shape. Attention, embeddings and norms: `average`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_engine.config import Model
from moe_engine.errors import ConfigError
from moe_engine.upcycle import copy
from moe_engine.upcycle.layer import Dense, Routed
from moe_engine.upcycle.options import Options
from moe_engine.upcycle.preservation import Preservation


def child(parent: Model, options: Options) -> Model:
    """Experts of the full width F."""
    return copy.child(parent, options)


def build(layer: int, dense: Dense, options: Options, others: Sequence[Dense] = ()) -> Routed:
    """One expert of each model, `dense` the first; ConfigError unless there are as many models as experts."""
    layers = [dense, *others]
    if len(layers) != options.experts:
        raise ConfigError(f"experts {options.experts} of {len(layers)} models: give one dense model for each expert")
    _check([each.gate_FD for each in layers])
    w_gate_up = torch.stack([torch.stack([each.gate_FD, each.up_FD]) for each in layers])
    return Routed(w_gate_up, torch.stack([each.down_DF for each in layers]))


def average(weights: Sequence[Tensor]) -> Tensor:
    """The mean of one weight of several models, taken in fp32, in their dtype. ConfigError if they differ in kind."""
    _check(weights)
    return torch.stack([weight.float() for weight in weights]).mean(dim=0).to(weights[0].dtype)


def preserves(options: Options) -> Preservation:
    """Of several parents."""
    return Preservation("not preserved: the experts are different models and the rest is their average")


def _check(weights: Sequence[Tensor]) -> None:
    found = {(tuple(weight.shape), str(weight.dtype)) for weight in weights}
    if len(found) > 1:
        raise ConfigError(f"the models differ: found {sorted(found)} for one weight, expected the same shape and dtype")
