"""A model's parameters by component: in all, active for a token, on one rank, trainable; with or without LoRA.

    adapter of W[out, in]    A[r, in] and B[out, r]: r * (in + out) parameters; gate and up have one each
    q, k, v, gate, up        cut by rows over tp: A is whole on every tp rank, B is cut as W is
    o, down                  cut by columns over tp: A is cut as W is, B is whole on every tp rank
    experts                  adapters of their own each; a rank holds those of its E/ep experts, cut over tp as above
    attention experts        so too, or those of all experts where they are replicated; k and v of one kv head: whole

So the adapter of what a rank holds of W[out, in] is r * (in + out) of those local sizes. Adapters of experts are
expert parameters, reduced over dp; all others are dense, reduced over dp x ep. Arithmetic only: nothing is allocated.
"""

from collections.abc import Collection, Iterable, Iterator
from typing import NamedTuple

from moe_engine.config import Model, Parallel
from moe_engine.config_report import shown
from moe_engine.errors import ConfigError
from moe_engine.sizes import attention_experts_over_tp, heads_per_attention_expert, parameter_counts

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
WHOLE_ON_EVERY_RANK = ("routers", "attention_routers", "norms")


class Lora(NamedTuple):
    """Low-rank adapters (arXiv 2106.09685) of rank `rank` on the projections `targets`."""

    rank: int
    targets: tuple[str, ...] = TARGETS


class Projection(NamedTuple):
    """W[rows, columns] of which a model has `copies`; tp cuts `cut`, "rows", "columns" or "neither"."""

    target: str
    component: str
    copies: int
    active: int  # copies that one token visits
    rows: int
    columns: int
    cut: str


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
    parts = list(base_parts(model, parallel))
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


def base_parts(model: Model, parallel: Parallel) -> Iterator[Part]:
    """The components of `parameter_counts`; what a token does not visit in full has a count `active_<component>`."""
    counts = parameter_counts(model)._asdict()
    for name, parameters in counts.items():
        if parameters and not name.startswith("active_"):
            expert = over_ep(name, parallel)
            here = parameters // (1 if name in WHOLE_ON_EVERY_RANK else parallel.tp)
            here = attention_experts_over_tp(model, parallel.tp) if name == "attention_experts" else here
            active = counts.get(f"active_{name}", parameters)
            yield Part(name, False, parameters, active, here // (parallel.ep if expert else 1), expert, True)


def over_ep(component: str, parallel: Parallel) -> bool:
    """Whether a component is experts' weights, cut over ep and reduced over dp."""
    return component == "experts" or (component == "attention_experts" and not parallel.replicate_attention_experts)


def adapter_parts(model: Model, parallel: Parallel, lora: Lora) -> list[Part]:
    """The adapters of each component that has some."""
    if lora.rank < 1:
        raise ConfigError(f"lora rank: found {lora.rank}, expected 1 or more (leave it out for no adapters)")
    for target in lora.targets:
        if target not in TARGETS:
            raise ConfigError(f"lora targets: found {shown(target)}, expected some of {','.join(TARGETS)}")
    parts: dict[str, Part] = {}
    for weight in projections(model):
        if weight.target in lora.targets:
            expert = over_ep(weight.component, parallel)
            one = lora.rank * (weight.rows + weight.columns)
            cut = {"rows": weight.rows, "columns": weight.columns, "neither": 0}[weight.cut]
            local = one - lora.rank * (cut - cut // parallel.tp)
            here = weight.copies // parallel.ep if expert else weight.copies
            was = parts.get(weight.component, Part(weight.component, True, 0, 0, 0, expert, True))
            parts[weight.component] = was._replace(
                parameters=was.parameters + weight.copies * one,
                active=was.active + weight.active * one,
                rank=was.rank + here * local,
            )
    return list(parts.values())


def projections(model: Model) -> Iterator[Projection]:
    """Every matrix that an adapter can sit on: attention and feed-forward, not embedding, head and routers."""
    d, layers, sparse = model.hidden_size, model.num_hidden_layers, model.num_moe_layers
    queries, keys = model.num_attention_heads * model.head_dim, model.num_key_value_heads * model.head_dim
    routed = model.num_attention_moe_layers
    if dense := layers - routed:
        for target, rows in (("q", queries), ("k", keys), ("v", keys)):
            yield Projection(target, "attention", dense, dense, rows, d, "rows")
        yield Projection("o", "attention", dense, dense, d, queries, "columns")
    if routed:
        all_, chosen = routed * model.num_attention_experts, routed * model.num_attention_experts_per_tok
        queries = heads_per_attention_expert(model) * model.head_dim
        yield Projection("q", "attention_experts", all_, chosen, queries, d, "rows")
        for target in ("k", "v"):
            yield Projection(target, "attention_experts", all_, chosen, model.head_dim, d, "neither")
        yield Projection("o", "attention_experts", all_, chosen, d, queries, "columns")
    chosen = sparse * model.num_experts_per_tok
    for component, copies, active, width in (
        ("dense_mlp", layers - sparse, layers - sparse, model.intermediate_size),
        ("shared_experts", sparse, sparse, model.shared_intermediate_size),
        ("experts", sparse * model.num_local_experts, chosen, model.moe_intermediate_size),
    ):
        if copies and width:
            for target in ("gate", "up"):
                yield Projection(target, component, copies, active, width, d, "rows")
            yield Projection("down", component, copies, active, d, width, "columns")
