"""The first rows of a router, [E, D] fp32: drawn at random, or taken from what the layer's tokens look like.

    zeros  normal  xavier  kaiming                         N(0, std); Glorot's and Kaiming's uniform, a = sqrt 5
    random  uniform_random                                 N(0, 1); U(-1, 1) / sqrt D             (mergekit)
    uniform  uniform_centred  normal_002  normal_02887  uniform_scaled           (drop-upcycling's released code)
        U(0, 1); less its mean; N(0, .02); N(0, .2887); centred and scaled to a deviation of .02
    clusters                                               centroids of balanced k-means of the layer's inputs
    random_features                                        E tokens' inputs                       (LLaMA-MoE-v2)

Rows made from prompts: `prompts.py`; inputs of a layer: `features.mlp_inputs`.
"""

import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from moe_engine.errors import ConfigError, DataError
from moe_engine.parallel.weight import key_of
from moe_engine.upcycle.kmeans import kmeans

Draw = Callable[[torch.Generator, int, int], Tensor]


def _normal(std: float) -> Draw:
    return lambda draw, experts, hidden: torch.randn(experts, hidden, generator=draw) * std


def _uniform(draw: torch.Generator, experts: int, hidden: int) -> Tensor:
    return torch.rand(experts, hidden, generator=draw)


def _symmetric(bound: Callable[[int, int], float]) -> Draw:
    return lambda draw, experts, hidden: (2 * _uniform(draw, experts, hidden) - 1) * bound(experts, hidden)


def _centred(draw: torch.Generator, experts: int, hidden: int) -> Tensor:
    rows = _uniform(draw, experts, hidden)
    return rows - rows.mean()


def _scaled(draw: torch.Generator, experts: int, hidden: int) -> Tensor:
    rows = _centred(draw, experts, hidden)
    return rows * (0.02 / rows.std())


DRAWN: dict[str, Draw] = {
    "zeros": lambda draw, experts, hidden: torch.zeros(experts, hidden),
    "xavier": _symmetric(lambda experts, hidden: math.sqrt(6 / (experts + hidden))),
    "kaiming": _symmetric(lambda experts, hidden: math.sqrt(1 / hidden)),
    "random": _normal(1.0),
    "uniform_random": _symmetric(lambda experts, hidden: math.sqrt(1 / hidden)),
    "uniform": _uniform,
    "uniform_centred": _centred,
    "normal_002": _normal(0.02),
    "normal_02887": _normal(0.2887),
    "uniform_scaled": _scaled,
}


def drawn(kind: str, experts: int, hidden: int, layer: int, seed: int, std: float = 0.02) -> Tensor:
    """Rows of a kind that needs no data; std is that of "normal". ConfigError for another kind."""
    table = DRAWN | {"normal": _normal(std)}
    if kind not in table:
        raise ConfigError(f"router_init {kind!r}: drawn at random are {', '.join(sorted(table))}")
    return table[kind](_generator(kind, layer, seed), experts, hidden)


def clusters(x_TD: Tensor, experts: int, layer: int, seed: int, jitter: float = 0.1) -> Tensor:
    """The centroids, not normalised, of T/E (1 -/+ jitter) inputs x[T, D] each. DataError if T < E."""
    tokens = _enough(x_TD, experts)
    low, high = math.floor(tokens / experts * (1 - jitter)), math.ceil(tokens / experts * (1 + jitter))
    return kmeans(x_TD, experts, _generator("clusters", layer, seed), low, high, rounds=100).centroid_KD


def random_features(x_TD: Tensor, experts: int, layer: int, seed: int) -> Tensor:
    """The inputs of E random tokens. DataError if T < E."""
    order_T = torch.randperm(_enough(x_TD, experts), generator=_generator("random_features", layer, seed))
    return x_TD[order_T[:experts].to(x_TD.device)].float()


def warn_if_alike(router_ED: Tensor, layer: int) -> float:
    """The condition number of the rows; warns past 5, where some experts are chosen by nearly the same direction."""
    condition = float(torch.linalg.cond(router_ED.float()))
    if not condition <= 5:
        warnings.warn(
            f"layer {layer}: the router's rows are alike (condition number {condition:.3g}, good is up to 5): some "
            "experts will be chosen together; give prompts that differ more, or another router_init",
            stacklevel=2,
        )
    return condition


def _generator(kind: str, layer: int, seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(key_of(seed, f"upcycle/router/{kind}/{layer}"))


def _enough(x_TD: Tensor, experts: int) -> int:
    if x_TD.shape[0] < experts:
        raise DataError(f"{x_TD.shape[0]} tokens for {experts} router rows: give more text")
    return x_TD.shape[0]
