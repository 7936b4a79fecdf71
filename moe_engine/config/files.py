"""Reading the files a run is made of: YAML with limits, JSON, model presets.

YAML is read with safe types only, under limits of size, depth and aliases (an alias bomb is refused before it
expands), with YAML 1.2's scalars: `no` is a word and 1e-4 is a number. A key written twice is refused.

A model is named by a preset (`configs/models/NAME.yaml`), by the path of such a file, or by a Hugging Face config.json
(or its folder), see hf/.
"""

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import yaml

from moe_engine.config import Model
from moe_engine.config.hf import model_and_notes
from moe_engine.config.messages import nearest, problem_lines, refuse, shown
from moe_engine.errors import ConfigError

MAX_BYTES = 1 << 16
MAX_ALIASES = 16
MAX_DEPTH = 32
PRESETS = Path(__file__).resolve().parents[2] / "configs" / "models"

FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|[-+]?\.inf$|\.nan$")
INTEGER = re.compile(r"[-+]?[0-9][0-9_]*$")


class Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's scalars and no repeated keys."""

    yaml_implicit_resolvers: ClassVar[dict[str, list[tuple[str, re.Pattern[str]]]]] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """MarkedYAMLError for a key that is written twice, where PyYAML keeps the last value without a word."""
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


def model_of_checkpoint(manifest: Path) -> dict[str, Any]:
    """The Model keys in the manifest of a checkpoint; who takes its weights compares its checksums."""
    try:
        return dict(json.loads(manifest.read_bytes())["run"]["model"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        refuse([f"{manifest}: names no model ({type(error).__name__})"])


def whose_model(start: str, resume: str, out: str) -> str:
    """The folder that says what model a run has which starts with the weights of `start`: that one, or, once it is
    gone, the checkpoint that is resumed. resume: "auto" (in `out`), a path, or empty."""
    if resume and not Path(start).exists():
        steps = Path(out, "checkpoints").glob("step-*/manifest.json")
        for manifest in sorted(steps if resume == "auto" else [Path(resume, "manifest.json")], reverse=True):
            with suppress(ConfigError):
                model_of_checkpoint(manifest)
                return str(manifest.parent)
    return start


def read_model(name: str, notes: list[str] | None = None) -> dict[str, Any]:
    """The Model keys of a preset, of a YAML file, of a Hugging Face config.json or its folder, or of a checkpoint.

    What a config.json says without effect is added to `notes`.
    """
    names = preset_names()
    if name in names:
        return read_mapping(PRESETS / f"{name}.yaml")
    path = Path(name)
    if (path / "manifest.json").is_file():
        return model_of_checkpoint(path / "manifest.json")
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        guess = nearest(name, names)
        hint = f" (did you mean {guess}?)" if guess else ""
        raise ConfigError(
            f"model: {shown(name)} is neither a preset{hint} nor a file: "
            f"presets are {', '.join(names) or 'missing from ' + str(PRESETS)}; nothing is downloaded"
        )
    if path.suffix != ".json":
        return read_mapping(path)
    return model_in(path, read_mapping(path), [] if notes is None else notes).model_dump(exclude_unset=True)


def model_in(path: Path, config: dict[str, Any], notes: list[str]) -> Model:
    """The Model of the config.json at `path`, which is named before each problem, and each line added to `notes`."""
    try:
        model, found = model_and_notes(config)
    except ConfigError as error:
        refuse(f"{path}: {line}" for line in problem_lines(error))
    notes += [f"{path}: {line}" for line in found]
    return model
