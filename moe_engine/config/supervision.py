"""`Supervision`: routers that are taught which experts a sample's label prefers."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from moe_engine.config.idle import map_not_read, no_supervision
from moe_engine.config.section import Count, Section, setting


def _names(value: Any) -> Any:
    return tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else value


def _weight(value: float) -> float:
    """S1.13."""
    if value and not 0.05 <= value <= 0.5:
        raise ValueError("expected 0 (off), or 0.05 to 0.5")
    return value


class Supervision(Section):
    """A term of the objective: routing_weight * KL(target of the label || router), mean over the labelled tokens."""

    routing_weight: Annotated[float, AfterValidator(_weight)] = setting(
        0.0,
        "weight of the routing loss, 0.05 to 0.5; 0: off",
        flag=("X", "weight of the routing loss, 0.05 to 0.5 (default: 0, off)"),
    )
    by: Literal["expert_label", "domain"] = setting(
        "expert_label",
        "what labels a token: its sample's `expert_label`, or the domain that it is of",
        idle=(no_supervision,),
    )
    labels: Annotated[tuple[str, ...], BeforeValidator(_names)] = setting(
        (), "labels in their order; null: those of the data", idle=(no_supervision,)
    )
    unknown_label_as: str | None = setting(
        None,
        "label that stands for those which `labels` does not list; null: they are refused",
        idle=(no_supervision,),
    )
    target: Literal["learned", "drawn", "fixed"] = setting(
        "learned",
        "`learned` with the routers, `drawn` once and kept, or `fixed` by `map`",
        idle=(no_supervision,),
    )
    map: str | None = setting(
        None, "YAML file of `label: [experts]` for target `fixed`, experts from 0", idle=(no_supervision, map_not_read)
    )
    aggregation: Literal["per_layer", "mean", "sum", "last"] = setting(
        "per_layer",
        "routers that are compared: each (`per_layer`), or the mean, sum or last of their logits",
        idle=(no_supervision,),
    )
    temperature: Annotated[float, Field(ge=0.5, le=2)] = setting(
        1.0, "divides the preferences of a label, 0.5 to 2", idle=(no_supervision,)
    )
    warmup_steps: Count = setting(0, "steps over which the weight grows to its value", idle=(no_supervision,))
    anneal_steps: Count = setting(
        0, "last steps of the run, over which the weight falls towards 0", idle=(no_supervision,)
    )
