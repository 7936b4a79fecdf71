"""Hugging Face's config.json <-> Model.

    families/      one file each: what a model_type implies, and its tensors
    spelling.py    the keys that transformers 4 and 5 spell differently
    keys.py        all other keys: which change nothing, and which would change the model

What a config asks for and the engine does not do is refused by name: read silently, it would be a different model. What
changes nothing is named to the user. What is written is read back, and has to give the same function. A router's
balancing loss keeps the meaning of its coefficient: `hf_mixtral` (layers pooled, k at uniform).
"""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from moe_engine.config import Model
from moe_engine.config.hf.families import FAMILIES
from moe_engine.config.hf.families.llama_moe_v2 import ENDS
from moe_engine.config.hf.keys import NO_EFFECT, judge, window_of
from moe_engine.config.hf.spelling import (
    EXPERTS,
    SPELLED,
    dtype_to_hf,
    experts_from_hf,
    rope_from_hf,
    rope_to_hf,
    seen_by_4,
)
from moe_engine.config.messages import refuse, shown, validation_problems

SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
OPTIONAL = (
    *("num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings"),
    *("tie_word_embeddings", "initializer_range"),
)
# of routed_scaling_factor: it is folded into the experts where weights are written
IN_TRAINING_ONLY = frozenset(key for key, about in Model.settings().items() if about.in_training_only)


def family_in(config: Mapping[str, Any]) -> str:
    """The one of FAMILIES that a config.json is of. LLaMA-MoE-v2 calls itself mixtral, and has keys of its own."""
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        refuse([f"model_type: found {shown(kind)}, expected {', '.join(FAMILIES)}"])
    return "llama_moe_v2" if kind == "mixtral" and ("use_attn_moe" in config or ENDS in config) else kind


def came_as(config: Mapping[str, Any]) -> str | None:
    """family_in, or None for a config.json that names no family of ours."""
    return family_in(config) if config.get("model_type") in FAMILIES else None


def model_from_hf(config: Mapping[str, Any]) -> Model:
    """The Model of a config.json (a dict) of one of FAMILIES; ConfigError lists every feature the engine lacks."""
    return model_and_notes(config)[0]


def model_and_notes(config: Mapping[str, Any]) -> tuple[Model, list[str]]:
    """`model_from_hf`, and one line for the user on each thing that a config.json says without effect."""
    kind = family_in(config)
    family = FAMILIES[kind]
    problems: list[str] = []
    notes: list[str] = []
    names = {key: key for key in SIZES + OPTIONAL} | family.routing
    experts = family.routing.get("num_local_experts")
    if experts:
        number = experts_from_hf(config, experts, problems)
        config = {key: value for key, value in config.items() if key != EXPERTS[experts]} | {experts: number}
    values = family.defaults | {k: config[theirs] for k, theirs in names.items() if config.get(theirs) is not None}
    try:
        values |= family.read(config)
    except (KeyError, TypeError, ArithmeticError) as error:
        problems.append(f"{kind}: {error} is missing, 0 or no number")
    values |= family.implied | ({"router_aux_loss": "hf_mixtral"} if family.routing else {})
    values |= rope_from_hf(config, problems, notes)
    window, positions = window_of(config, kind, problems), values["max_position_embeddings"]
    if window is not None and isinstance(positions, int) and window < positions:
        values["max_position_embeddings"] = window
        notes.append(
            f"sliding_window: {window} is full attention up to {window} tokens: max_position_embeddings is {window} "
            f"here, not {positions}"
        )
    judge(config, kind, {*names.values(), *family.more}, problems, notes)
    try:
        model = Model.model_validate(values)
    except ValidationError as error:
        found = validation_problems(error, {}, "model").values()
        refuse([*problems, *(line.replace("model.", "", 1) for lines in found for line in lines)])
    if problems:
        refuse(problems)
    return model, notes


def model_to_hf(
    model: Model, kind: str, dtype: str | None, version: int | None, carried: Mapping[str, Any]
) -> dict[str, Any]:
    """The config.json of a model as `kind`, one of FAMILIES.

    dtype: torch's name of it, "bfloat16". version: of transformers, 4 or 5, in whose spelling; None: in both.
    carried: the config.json that the weights came with, whose other keys (token ids) stay. ConfigError names what
    another family would be needed for.
    """
    gone = SPELLED | ({"transformers_version"} if version else set())
    if came_as(carried) != kind:  # of the dense parent, say
        gone |= set(carried) - NO_EFFECT
    if experts := FAMILIES[kind].routing.get("num_local_experts"):
        gone |= {EXPERTS[experts]}
    config = {key: value for key, value in carried.items() if key not in gone}
    config |= keys_of(model, kind, version) | dtype_to_hf(dtype, version)
    if lost := differences(model, model_from_hf(config)):
        refuse(
            f"{key}: {shown(ours)} cannot be written as {kind}, which has {shown(theirs)}"
            for key, (ours, theirs) in lost.items()
        )
    return config


def both_readers_agree(config: Mapping[str, Any]) -> bool:
    """Whether transformers 4 reads the same model from a config.json of one of FAMILIES as 5 does."""
    experts = FAMILIES[family_in(config)].routing.get("num_local_experts")
    return model_from_hf(seen_by_4(config, experts)) == model_from_hf(config)


def keys_of(model: Model, kind: str, version: int | None) -> dict[str, Any]:
    """What the config.json of a family says of a model, in the spelling of transformers `version`; None: in both."""
    family = FAMILIES[kind]
    config: dict[str, Any] = {"architectures": [family.architecture], "hidden_act": "silu"}
    config |= {key: getattr(model, key) for key in SIZES + OPTIONAL}
    config |= {theirs: getattr(model, key) for key, theirs in family.routing.items()}
    config |= family.write(model) | {"model_type": "mixtral" if kind == "llama_moe_v2" else kind}
    if config["model_type"] == "mixtral":
        config["sliding_window"] = None
    return config | rope_to_hf(model, version)


def differences(ours: Model, theirs: Model) -> dict[str, tuple[Any, Any]]:
    """Keys in which two models are different functions of the same weights, with both values."""
    layers, idle = range(ours.num_hidden_layers), set[str](IN_TRAINING_ONLY)
    if ours.num_moe_layers == len(layers):
        idle.add("intermediate_size")
    if not ours.num_moe_layers:
        idle |= {"num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob", "num_local_experts"}
        idle |= {"shared_intermediate_size"}
    if not ours.num_attention_moe_layers:
        idle |= {"num_attention_experts", "num_attention_experts_per_tok", "attention_scaling_factor"}
    for key, has in (("moe_layers", Model.is_moe), ("attention_moe_layers", Model.is_attention_moe)):
        if [has(ours, i) for i in layers] == [has(theirs, i) for i in range(theirs.num_hidden_layers)]:
            idle.add(key)
    pairs = {key: (getattr(ours, key), getattr(theirs, key)) for key in Model.model_fields if key not in idle}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def family_of(model: Model) -> str:
    """The model_type that holds a model; ConfigError when none does, with what stands against the nearest.

    Never llama_moe_v2, which has to be asked for: transformers' own Mixtral would load it and be wrong.
    """
    problems: dict[str, dict[str, tuple[Any, Any]]] = {}
    for kind in (kind for kind in FAMILIES if kind != "llama_moe_v2"):
        problems[kind] = differences(model, model_from_hf(keys_of(model, kind, None)))
        if not problems[kind]:
            return kind
    kind, lost = min(problems.items(), key=lambda item: len(item[1]))
    refuse(
        f"model.{key}: no Hugging Face family of {', '.join(problems)} holds {shown(ours)}; {kind} has {shown(theirs)}"
        for key, (ours, theirs) in lost.items()
    )
