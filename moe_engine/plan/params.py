"""A model's parameters by component: in all, active for a token, on one rank, trainable; with or without LoRA.

    adapter of W[out, in]    A[r, in] and B[out, r]: r * (in + out) parameters; gate and up have one each
    q, k, v, gate, up        cut by rows over tp: A is whole on every tp rank, B is cut as W is
    o, down                  cut by columns over tp: A is cut as W is, B is whole on every tp rank
    experts                  adapters of their own each; a rank holds those of its E/ep experts, cut over tp as above
    attention experts        so too, or those of all experts where they are replicated; k and v of one kv head: whole

So the adapter of what a rank holds of W[out, in] is r * (in + out) of those local sizes. Adapters of experts are
expert parameters, reduced over dp; all others are dense, reduced over dp x ep. Arithmetic only: nothing is allocated.
"""

import math
from collections.abc import Collection, Iterable
from typing import NamedTuple

from moe_engine.config import Model, Parallel
from moe_engine.config.messages import shown
from moe_engine.config.weights import COMPONENTS, Shape, Weight, active_share, weights_of
from moe_engine.errors import ConfigError

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
PROJECTIONS = {"gate_up": ("gate", "up"), "down": ("down",)} | {name: (name,) for name in "qkvo"}  # in a weight


class Lora(NamedTuple):
    """Low-rank adapters (arXiv 2106.09685) of rank `rank` on the projections `targets`."""

    rank: int
    targets: tuple[str, ...] = TARGETS


class Part(NamedTuple):
    """One component, or its adapters."""

    component: str
    adapter: bool
    parameters: int
    active: int  # parameters that one token visits
    rank: int  # parameters on one rank, before ZeRO
    expert: bool
    trains: bool

    @property
    def name(self) -> str:
        """`experts`, or `experts lora` for their adapters."""
        return f"{self.component} lora" if self.adapter else self.component


class Census(NamedTuple):
    """All parts of a model in a layout."""

    parts: tuple[Part, ...]
    parallel: Parallel

    @property
    def total(self) -> int:
        """All parameters, adapters among them."""
        return sum(part.parameters for part in self.parts)

    @property
    def trainable(self) -> int:
        """Parameters that get a gradient."""
        return sum(part.parameters for part in self.parts if part.trains)

    @property
    def held(self) -> int:
        """Parameters that one rank holds between steps: its whole part, or with ZeRO 3 its share of that."""
        parts = self.parts
        return self._share(parts) if self.parallel.zero == 3 else sum(part.rank for part in parts)

    @property
    def optimized(self) -> int:
        """Parameters whose optimizer states one rank keeps; with ZeRO >= 1 a share, rounded up as in `sizes`."""
        parts = [part for part in self.parts if part.trains]
        return self._share(parts) if self.parallel.zero else sum(part.rank for part in parts)

    def _share(self, parts: Iterable[Part]) -> int:
        dense = sum(part.rank for part in parts if not part.expert)
        expert = sum(part.rank for part in parts if part.expert)
        return -(-dense // (self.parallel.dp * self.parallel.ep)) + -(-expert // self.parallel.dp)

    def peft_line(self) -> str:
        """What PEFT's `print_trainable_parameters` prints for such a model."""
        share = 100 * self.trainable / self.total
        return f"trainable params: {self.trainable:,} || all params: {self.total:,} || trainable%: {share:.4f}"


def count(
    model: Model,
    parallel: Parallel,
    lora: Lora | None = None,
    freeze: Collection[str] = (),
    train: Collection[str] = (),
) -> Census:
    """The parts of a model that has any, in a layout that `check_layout` accepts.

    The model's own weights all train; with `lora` or `train` only those of the components in `train` do. Adapters
    train. `freeze` stops a component and its adapters, which still count. Components are named as in the table, in the
    singular if you like (`router`). ConfigError for an unknown component or target, one in both lists, and rank < 1.
    """
    parts = base_parts(model, parallel)
    names = [part.component for part in parts]
    frozen, trained = known(freeze, "freeze", names), known(train, "train", names)
    if both := frozen & trained:
        raise ConfigError(f"train, freeze: both name {', '.join(sorted(both))}: name it in one of them")
    if trained or lora:
        parts = [part._replace(trains=part.component in trained) for part in parts]
    parts += adapter_parts(model, parallel, lora) if lora else []
    parts = [part._replace(trains=part.trains and part.component not in frozen) for part in parts]
    return Census(tuple(parts), parallel)


def known(names: Collection[str], key: str, valid: list[str]) -> set[str]:
    """The components that `names` means; ConfigError names those that the model has."""
    meant = {spelling: name for name in valid for spelling in (name.removesuffix("s"), name)}
    for name in names:
        if name not in meant:
            raise ConfigError(f"{key}: found {shown(name)}, expected components of this model: {', '.join(valid)}")
    return {meant[name] for name in names}


def base_parts(model: Model, parallel: Parallel) -> list[Part]:
    """The components that a model has."""
    parts: dict[str, Part] = {}
    for weight in weights_of(model, parallel.replicate_attention_experts):
        here = math.prod(weight.on_rank(parallel))
        _add(parts, weight, model, weight.parameters, here, adapter=False)
    return [parts[component] for component in COMPONENTS if component in parts]


def adapter_parts(model: Model, parallel: Parallel, lora: Lora) -> list[Part]:
    """The adapters of each component that has some: attention and feed-forward, not embedding, head and routers."""
    if lora.rank < 1:
        raise ConfigError(f"lora rank: found {lora.rank}, expected 1 or more (leave it out for no adapters)")
    for target in lora.targets:
        if target not in TARGETS:
            raise ConfigError(f"lora targets: found {shown(target)}, expected some of {','.join(TARGETS)}")
    parts: dict[str, Part] = {}
    for weight in weights_of(model, parallel.replicate_attention_experts):
        chosen = [target for target in PROJECTIONS.get(stem(weight), ()) if target in lora.targets]
        if chosen:
            whole, here = (adapter_size(weight, shape, lora) for shape in (weight.shape, weight.on_rank(parallel)))
            _add(parts, weight, model, len(chosen) * whole, len(chosen) * here, adapter=True)
    return list(parts.values())


def stem(weight: Weight) -> str:
    """`q` of layers.0.attention.q.weight and of layers.0.attention.experts.w_q."""
    return weight.name.removesuffix(".weight").rpartition(".")[2].removeprefix("w_")


def adapter_size(weight: Weight, shape: Shape, lora: Lora) -> int:
    """Parameters of the adapters on one projection in a weight of `shape`: r * (in + out) for each expert."""
    numbered = weight.component in ("experts", "attention_experts")
    experts, sides = (shape[0], shape[1:]) if numbered else (1, shape)
    if stem(weight) == "gate_up":
        sides = sides[1:]
    inner = math.prod(sides[1:]) if stem(weight) == "o" else sides[-1]
    return experts * lora.rank * (math.prod(sides) // inner + inner)


def _add(parts: dict[str, Part], weight: Weight, model: Model, parameters: int, here: int, adapter: bool) -> None:
    """Count a weight, or its adapters, under its component."""
    chosen, of = active_share(model, weight.component)
    was = parts.get(weight.component, Part(weight.component, adapter, 0, 0, 0, weight.expert, True))
    parts[weight.component] = was._replace(
        parameters=was.parameters + parameters,
        active=was.active + parameters // of * chosen,
        rank=was.rank + here,
    )
