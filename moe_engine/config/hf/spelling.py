"""Keys that transformers 4 and 5 spell differently: read from either spelling, and written in both.

    transformers 4   rope_theta, rope_scaling {...}                  torch_dtype   num_experts (Qwen3-MoE, OLMoE)
    transformers 5   rope_parameters {rope_type, rope_theta, ...}    dtype         num_local_experts (Qwen3-MoE)

5 reads the first row too. 4.57 ignores `rope_parameters`, and the other name of the experts, without a word: it takes
the defaults of its family. Both together give both the same model, and neither warns; where the two rows disagree, each
reads another model. `make interop` compares the readers.
"""

from collections.abc import Mapping
from typing import Any

from moe_engine.config import Model, RopeScaling
from moe_engine.config.messages import shown

DTYPES = ("float32", "bfloat16", "float16", "float64")
SPELLED = frozenset({"rope_theta", "rope_scaling", "rope_parameters", "torch_dtype", "dtype"})
EXPERTS = {"num_experts": "num_local_experts", "num_local_experts": "num_experts"}  # and the other name
SCALING = frozenset(RopeScaling.model_fields) - {"rope_type"}


def rope_from_hf(config: Mapping[str, Any], problems: list[str], notes: list[str]) -> dict[str, Any]:
    """rope_theta and rope_scaling from either spelling, or from both if they agree."""
    found = {"": {"rope_theta": config.get("rope_theta")}}
    for key in ("rope_scaling", "rope_parameters"):
        rope = config.get(key) or {}
        if not isinstance(rope, dict):
            problems.append(f"{key}: found {shown(rope)}, expected a mapping")
            return {}
        found[key] = dict(rope)
    thetas = {
        f"{key}.rope_theta".lstrip("."): rope["rope_theta"]
        for key, rope in found.items()
        if rope.get("rope_theta") is not None
    }
    if any(theta != next(iter(thetas.values())) for theta in thetas.values()):
        both = " and ".join(f"{key} {shown(theta)}" for key, theta in thetas.items())
        problems.append(f"rope_theta: found {both}, and one reader takes this, another that: remove the wrong one")
    old, new = (scaling_of(key, found[key], config, problems, notes) for key in ("rope_scaling", "rope_parameters"))
    if found["rope_scaling"] and found["rope_parameters"] and old != new:
        problems.append("rope_parameters and rope_scaling are both given and differ: remove the wrong one")
    values = {"rope_theta": next(iter(thetas.values()))} if thetas else {}
    scaling = old or new or {}
    return values | ({"rope_scaling": scaling} if scaling.get("rope_type") == "llama3" else {})


def scaling_of(
    key: str, rope: dict[str, Any], config: Mapping[str, Any], problems: list[str], notes: list[str]
) -> dict[str, Any] | None:
    """The scaling that one spelling asks for, None for rotary frequencies as they are; only llama3 is supported."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        problems.append(f"{key}: rope_type {shown(kind)} is not supported, expected default or llama3")
        return {"rope_type": kind}
    scaling = {name: value for name, value in rope.items() if kind == "llama3" and name in SCALING}
    for name in rope.keys() - scaling.keys() - {"rope_type", "type", "rope_theta"}:
        value = rope[name]
        if isinstance(value, dict) or (name == "partial_rotary_factor" and value != 1):
            problems.append(f"{key}.{shown(name)[1:-1]}: {shown(value)} is not supported")
        elif name != "partial_rotary_factor":
            notes.append(f"{key}.{shown(name)[1:-1]}: {shown(value)} changes nothing: rope_type is {kind}")
    if not scaling:
        return {"rope_type": kind} if kind == "llama3" else None
    name = "original_max_position_embeddings"  # beside the scaling, 5 takes it and 4 does not
    if config.get(name) not in (None, scaling.get(name)):
        problems.append(f"{name}: found {shown(config[name])} and {key}.{name} {shown(scaling.get(name))}: remove one")
    return scaling | {"rope_type": kind}


def experts_from_hf(config: Mapping[str, Any], name: str, problems: list[str]) -> Any:
    """The number of experts: under `name`, where transformers 4 looks for it in this family, or under the other."""
    here, there = config.get(name), config.get(EXPERTS[name])
    if here is not None and there is not None and here != there:
        problems.append(f"{name}: found {shown(here)} and {EXPERTS[name]} {shown(there)}: remove the wrong one")
    return there if here is None else here


def rope_to_hf(model: Model, version: int | None) -> dict[str, Any]:
    """The keys of the rotary embedding in the spelling of transformers `version`; None: in both."""
    scaling = model.rope_scaling.model_dump() if model.rope_scaling else None
    old = {"rope_theta": model.rope_theta, "rope_scaling": scaling}
    new = {"rope_parameters": {"rope_theta": model.rope_theta} | (scaling or {"rope_type": "default"})}
    return {4: old, 5: new, None: old | new}[version]


def dtype_to_hf(dtype: str | None, version: int | None) -> dict[str, Any]:
    """The dtype, torch's name of it, in the spelling of transformers `version`; None: in both."""
    return {name: dtype for name, of in (("torch_dtype", 4), ("dtype", 5)) if version in (None, of)}


def dtype_of(config: Mapping[str, Any]) -> str | None:
    """torch's name of the dtype that a config.json gives, None if it gives none that weights may have."""
    name = config.get("dtype") or config.get("torch_dtype")
    return name if name in DTYPES else None


def seen_by_4(config: Mapping[str, Any], experts: str | None) -> dict[str, Any]:
    """What transformers 4 sees of a config.json. experts: its name for their number, if the family has any."""
    hidden = {"rope_parameters"} | ({EXPERTS[experts]} if experts else set())
    return {key: value for key, value in config.items() if key not in hidden}
