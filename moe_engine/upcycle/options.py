"""What a user asks of an upcycling, and the Model that comes of it.

One frozen set of options serves all methods; each reads its own and `None` stands for the method's rule. Values that
cannot work are ConfigErrors which name the option, what was found and what is valid.
"""

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ValidationError

from moe_engine.config import Model, divisors
from moe_engine.errors import ConfigError

# router_init that is taken from text, and from prompts
OF_FEATURES, OF_PROMPTS = ("clusters", "random_features"), ("hidden", "hidden_avg", "cheap_embed")


@dataclass(frozen=True)
class Options:
    """experts counts routed experts. compat: as a method's released code does, where that differs from its paper."""

    experts: int = 8
    top_k: int = 2
    seed: int = 0
    norm_topk_prob: bool = True  # copy, drop, virtual, mix; half never renormalises, partitions always do
    dense_ends: int = 0  # so many first and last layers stay dense
    noise_std: float | None = None  # copy 0, half 1e-3
    noise_share: float = 1.0  # of the elements, drawn at random
    scale: float | None = None  # of the routed output of a partition; None: E/k, residual 1
    drop_ratio: float = 0.5
    granularity: int = 1  # virtual: shards of a dense layer
    residual_experts: int = 1  # sharing_inter, residual: widths of the expert that is always on
    share_neurons: bool = True  # sharing_inter, residual: routed experts may hold the same neuron
    expert_width: int | None = None  # sharing methods; None: F / (experts + residual_experts)
    projection: Literal["gate", "up"] = "gate"  # clustering: whose rows
    compat: bool = False
    attention_experts: int = 0  # 0: attention stays as it is
    attention_top_k: int = 2
    attention_scale: float | None = None  # None: A/k

    def __post_init__(self) -> None:
        problems = []
        if self.experts < 1:
            problems.append(f"experts {self.experts}: expected 1 or more")
        elif not 1 <= self.top_k <= self.experts:
            problems.append(f"top_k {self.top_k}: valid are 1 to {self.experts}, the experts")
        if self.granularity < 1 or self.experts % self.granularity or self.top_k % self.granularity:
            problems.append(
                f"granularity {self.granularity} must divide experts {self.experts} and top_k {self.top_k}, so that "
                "a token takes each shard equally often"
            )
        if self.attention_experts and not 1 <= self.attention_top_k <= self.attention_experts:
            problems.append(f"attention_top_k {self.attention_top_k}: valid are 1 to {self.attention_experts}")
        for name in ("drop_ratio", "noise_share"):
            if not 0 <= getattr(self, name) <= 1:
                problems.append(f"{name} {getattr(self, name)}: valid are 0 to 1")
        for name in ("noise_std", "dense_ends", "residual_experts", "attention_experts"):
            if (getattr(self, name) or 0) < 0:
                problems.append(f"{name} {getattr(self, name)}: expected 0 or more")
        for name in ("scale", "attention_scale", "expert_width"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                problems.append(f"{name} {value}: expected more than 0")
        if self.projection not in ("gate", "up"):
            problems.append(f"projection {self.projection!r}: valid are gate and up")
        if problems:
            raise ConfigError("\n".join(problems))


def upcycled(parent: Model, options: Options, **changes: Any) -> Model:
    """The parent with experts, and `changes`; ConfigError if it has experts already, or if nothing is left to turn."""
    layers, ends = parent.num_hidden_layers, options.dense_ends
    if parent.num_local_experts:
        raise ConfigError(f"the parent has {parent.num_local_experts} experts already: give a dense model")
    if 2 * ends >= layers:
        raise ConfigError(
            f"dense_ends {ends} leaves none of {layers} layers to turn: valid are 0 to {(layers - 1) // 2}"
        )
    routing = {
        "num_local_experts": options.experts,
        "num_experts_per_tok": options.top_k,
        "moe_layers": tuple(range(ends, layers - ends)) if ends else "all",
    }
    return changed(parent, **routing | changes)


def partitioned(parent: Model, options: Options, width: int, scale: float | None = None, **changes: Any) -> Model:
    """`upcycled` to experts of `width`; their weights are a softmax over the chosen, times s = `scale`, E/k by default.

    With equal weights the mean over all choices of k experts is (s/E) y: E/k gives y/k, and only s = E is unbiased
    (LLaMA-MoE, 2406.16554, uses E/k).
    """
    rule = options.experts / options.top_k if scale is None else scale
    return upcycled(
        parent,
        options,
        moe_intermediate_size=width,
        norm_topk_prob=True,
        routed_scaling_factor=options.scale or rule,
        **changes,
    )


def changed(model: Model, **changes: Any) -> Model:
    """The model with other values, validated; ConfigError with all that is wrong."""
    if unknown := changes.keys() - Model.model_fields.keys():
        raise ConfigError(f"the engine's Model has no {', '.join(sorted(unknown))}: this method needs it")
    try:
        return Model.model_validate(model.model_dump() | changes)
    except ValidationError as error:
        found = [": ".join([*map(str, e["loc"]), e["msg"].removeprefix("Value error, ")]) for e in error.errors()]
        raise ConfigError("\n".join(found)) from error


def part(whole: int, parts: int, name: str) -> int:
    """whole / parts; ConfigError if a dense layer of `whole` neurons does not fall into `name` parts."""
    if parts < 1 or whole % parts:
        valid = ", ".join(map(str, divisors(whole)))
        raise ConfigError(f"{name} {parts} does not divide the {whole} neurons of a layer: valid are {valid}")
    return whole // parts
