"""Reading the files a run is made of: YAML with limits, JSON, model presets and Hugging Face's config.json.

YAML is read with safe types only, under limits of size, depth and aliases (an alias bomb is refused before it
expands), with YAML 1.2's scalars: `no` is a word and 1e-4 is a number. A key written twice is refused.

A model is named by a preset (`configs/models/NAME.yaml`), by the path of such a file, or by a Hugging Face config.json
(or its folder) of type llama or mixtral, in the spelling of transformers 4 or 5. What such a config asks for and the
engine does not do is refused by name: read silently, it would be a different model.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import yaml
from pydantic import ValidationError

from moe_engine.config import Model
from moe_engine.config_report import nearest, problem_lines, refuse, shown, validation_problems
from moe_engine.errors import ConfigError

MAX_BYTES = 1 << 16
MAX_ALIASES = 16
MAX_DEPTH = 32
PRESETS = Path(__file__).resolve().parent.parent / "configs" / "models"

FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|[-+]?\.inf$|\.nan$")
INTEGER = re.compile(r"[-+]?[0-9][0-9_]*$")
HF_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"rms_norm_eps": 1e-6, "rope_theta": 1e4, "max_position_embeddings": 2048},
    "mixtral": {"rms_norm_eps": 1e-5, "rope_theta": 1e6, "max_position_embeddings": 131072, "num_key_value_heads": 8},
}
HF_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
HF_OPTIONAL = (
    *("num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "max_position_embeddings"),
    *("tie_word_embeddings", "initializer_range"),
)
HF_ROUTING = ("num_local_experts", "num_experts_per_tok", "router_jitter_noise", "router_aux_loss_coef")
HF_NO_EFFECT = frozenset(
    "architectures bos_token_id chunk_size_feed_forward dtype eos_token_id id2label is_encoder_decoder label2id "
    "max_window_layers model_type name_or_path _name_or_path output_attentions output_hidden_states "
    "output_router_logits pad_token_id pretraining_tp problem_type return_dict torch_dtype transformers_version "
    "use_cache".split()
)


class Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's scalars and no repeated keys."""

    yaml_implicit_resolvers: ClassVar[dict[str, list[tuple[str, re.Pattern[str]]]]] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"key {key.value} is written twice", problem_mark=key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"~$|null$|Null$|NULL$|$"), ["~", "n", "N", ""])
Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
Loader.add_implicit_resolver("tag:yaml.org,2002:int", INTEGER, list("-+0123456789"))
Loader.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+.0123456789"))
Loader.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile("<<$"), ["<"])
Loader.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(node.value.replace("_", "")))


def read_text(path: str | Path) -> str:
    """The text of a small configuration file. ConfigError when it is missing, unreadable, too large or not UTF-8."""
    if not Path(path).is_file():
        refuse([f"{path}: not a file: give the path of a text file"])
    try:
        with open(path, "rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        refuse([f"{path}: cannot be read: {error.strerror}"])
    if len(raw) > MAX_BYTES:
        refuse([f"{path}: larger than {MAX_BYTES} bytes, which no configuration needs"])
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        refuse([f"{path}: not UTF-8 text"])


def parse_yaml(text: str, source: str) -> Any:
    """The value of a YAML text, safe types only. ConfigError names `source`, the line and the reason."""
    try:
        check_shape(text, source)
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        reason = shown(getattr(error, "problem", None) or str(error))[1:-1]
        refuse([f"{source}{line}: not valid YAML, {reason}"])
    except ValueError:
        refuse([f"{source}: not valid YAML, a malformed value"])


def check_shape(text: str, source: str) -> None:
    """Refuse a YAML text that nests or refers too much, reading no further than the first excess."""
    depth = aliases = 0
    for event in yaml.parse(text, Loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        aliases += isinstance(event, yaml.AliasEvent)
        if depth > MAX_DEPTH:
            refuse([f"{source}: nested more than {MAX_DEPTH} deep, which no configuration needs"])
        if aliases > MAX_ALIASES:
            refuse([f"{source}: more than {MAX_ALIASES} YAML aliases: write the values out"])


def read_mapping(path: str | Path) -> dict[str, Any]:
    """The top-level mapping of a .json or YAML file (an empty YAML file is an empty mapping)."""
    text = read_text(path)
    if Path(path).suffix == ".json":
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            refuse([f"{path}: not valid JSON, {error}"])
    else:
        value = parse_yaml(text, str(path)) or {}
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        refuse([f"{path}: found {shown(value)}, expected a mapping of names to values"])
    return value


def preset_names() -> list[str]:
    """Names of the model presets in configs/models."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def read_model(name: str) -> dict[str, Any]:
    """The Model keys of a preset, of a YAML file, or of a Hugging Face config.json or its folder."""
    names = preset_names()
    if name in names:
        return read_mapping(PRESETS / f"{name}.yaml")
    path = Path(name)
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        guess = nearest(name, names)
        hint = f" (did you mean {guess}?)" if guess else ""
        raise ConfigError(
            f"model: {shown(name)} is neither a preset{hint} nor a file: "
            f"presets are {', '.join(names) or 'missing from ' + str(PRESETS)}"
        )
    if path.suffix != ".json":
        return read_mapping(path)
    try:
        return model_from_hf(read_mapping(path)).model_dump(exclude_unset=True)
    except ConfigError as error:
        refuse(f"{path}: {line}" for line in problem_lines(error))


def model_from_hf(config: Mapping[str, Any]) -> Model:
    """The Model of a Hugging Face config.json (a dict) of type llama or mixtral, transformers 4 or 5 spelling.

    A Mixtral keeps the meaning of its router_aux_loss_coef: the loss is `hf_mixtral` (layers pooled, k at uniform).
    ConfigError lists every feature that the engine does not have, by name.
    """
    family = config.get("model_type")
    if not isinstance(family, str) or family not in HF_FAMILIES:
        refuse([f"model_type: found {shown(family)}, expected llama or mixtral"])
    problems: list[str] = []
    values = dict(HF_FAMILIES[family])
    known = [*HF_SIZES, *HF_OPTIONAL, *(HF_ROUTING if family == "mixtral" else ())]
    values |= {key: config[key] for key in known if config.get(key) is not None}
    if family == "mixtral":
        values |= {"router_aux_loss": "hf_mixtral", "norm_topk_prob": True}
        values = {"num_local_experts": 8, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.001} | values
    values |= rope_from_hf(config, problems)
    problems += unsupported_in_hf(config, known)
    try:
        model = Model.model_validate(values)
    except ValidationError as error:
        found = validation_problems(error, {}, "model").values()
        refuse([*problems, *(line.replace("model.", "", 1) for lines in found for line in lines)])
    if problems:
        refuse(problems)
    return model


def rope_from_hf(config: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """rope_theta and rope_scaling from either spelling; what is not llama3 scaling goes to `problems`."""
    key = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    rope = config.get(key) or {}
    if not isinstance(rope, dict):
        problems.append(f"{key}: found {shown(rope)}, expected a mapping")
        return {}
    rope = dict(rope)
    theta = rope.pop("rope_theta", None)
    values = {} if theta is None else {"rope_theta": theta}
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    rope.pop("type", None)
    if kind == "llama3":
        values["rope_scaling"] = rope | {"rope_type": kind}
    elif kind != "default":
        problems.append(f"{key}: rope_type {shown(kind)} is not supported, expected default or llama3")
    return values


def unsupported_in_hf(config: Mapping[str, Any], known: list[str]) -> list[str]:
    """One problem line for each key that would change the model in a way the engine does not follow."""
    expected: dict[str, tuple[Any, ...]] = {
        "hidden_act": ("silu", "swish"),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "attention_dropout": (0,),
        "sliding_window": (),
        "use_sliding_window": (False,),
        "partial_rotary_factor": (1,),
    }
    problems = []
    for key, value in config.items():
        if value is None or key in known or key in HF_NO_EFFECT or key in ("rope_parameters", "rope_scaling"):
            continue
        if key not in expected:
            if value not in (False, [], {}, ""):
                problems.append(f"{shown(key)[1:-1]}: {shown(value)} is not a feature of the engine's Llama or Mixtral")
        elif value not in expected[key]:
            allowed = " or ".join(map(shown, expected[key])) or "null"
            problems.append(f"{key}: found {shown(value)}, only {allowed} is supported")
    return problems
