"""From a command line to a Run: defaults < --config YAML < flags < --set section.key=value.

    load(argv, world_size)  ->  Loaded(run, derived, warnings, print_config, dry_run)

Every source is first read into {section: {key: value}} with a note of where each value was written, then checked in
one go, so that all problems arrive in one ConfigError. A --deepspeed JSON fills in what neither the YAML file nor the
command line says, and may not contradict them. The number of ranks comes from the launcher; nothing is read from the
environment. Paths are relative to the working directory.
"""

import argparse
import re
import textwrap
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import yaml
from pydantic import ValidationError

from moe_engine.config import Model, Run, Train
from moe_engine.config.checks import derive, layout_problems, without_effect
from moe_engine.config.deepspeed import apply_deepspeed
from moe_engine.config.files import parse_yaml, preset_names, read_mapping, read_model, whose_model
from moe_engine.config.messages import (
    KEYS,
    SECTIONS,
    edits,
    problem_lines,
    refuse,
    shown,
    unknown_setting,
    validation_problems,
)
from moe_engine.config.messages import nearest as nearest_name
from moe_engine.errors import ConfigError

DEFAULT_MODEL = "tiny"


class Loaded(NamedTuple):
    """A run, and what to tell the user about it."""

    run: Run
    derived: list[str]  # one line per value that was not given but computed
    warnings: list[str]  # settings that were changed or have no effect
    print_config: bool
    dry_run: bool


class Parser(argparse.ArgumentParser):
    """ArgumentParser whose errors are ConfigErrors, and whose flags are written out."""

    def __init__(self, **options: Any):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError, where argparse would print the usage and exit with 2."""
        raise ConfigError(f"{message} (--help lists the flags)")


def build_parser(prog: str | None = None, description: str | None = None) -> Parser:
    """The flags that every run script has. Values stay text: the sections of Run check them."""
    parser = Parser(
        prog=prog,
        description=description,
        argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="sections and keys for --config and --set:\n"
        + "\n".join(
            textwrap.fill(f"{section}: {', '.join(keys)}", 100, initial_indent="  ", subsequent_indent="    ")
            for section, keys in KEYS.items()
        ),
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with the sections below")
    presets = ", ".join(preset_names())
    parser.add_argument("--model", metavar="NAME|PATH", help=f"preset ({presets}), YAML file or HF config.json")
    parser.add_argument(
        "--data", metavar="[NAME=]PATH[:WEIGHT]", action="append", help="prepared folder; repeat to mix domains"
    )
    for flag, (_, placeholder, text) in flags_of_settings().items():
        if placeholder:
            parser.add_argument(flag, metavar=placeholder, help=text)
        else:
            parser.add_argument(flag, action="store_true", help=text)
    parser.add_argument("--deepspeed", metavar="FILE.json", help="DeepSpeed JSON; must agree with the rest")
    parser.add_argument("--set", metavar="SECTION.KEY=VALUE", action="append", help="any setting, VALUE as in YAML")
    parser.add_argument("--print-config", action="store_true", help="print the whole configuration and exit")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print sizes and shapes, and exit")
    return parser


def flags_of_settings() -> dict[str, tuple[str, str, str]]:
    """Flag -> the key that it sets, placeholder, help."""
    return {
        f"--{key.replace('_', '-')}": (f"{section}.{key}", *about.flag)
        for section, kind in SECTIONS.items()
        for key, about in kind.settings().items()
        if about.flag
    }


def load_run(argv: list[str], world_size: int | None) -> Run:
    """The Run of a command line on `world_size` ranks; see `load`."""
    return load(argv, world_size).run


def load(argv: list[str], world_size: int | None, parser: Parser | None = None) -> Loaded:
    """Read, derive and check a run. ConfigError lists everything that is wrong, one line each.

    world_size  ranks of the launch; None when there is no launch: the layout then sets it, dp 1 unless given
    parser      `build_parser(...)` of the script (its own flags, if any, are the script's to read)
    """
    parser = parser or build_parser()
    arguments, rest = parser.parse_known_args(argv)
    flags = vars(arguments)
    problems = unknown_flags(rest, parser)
    values, origin = Sources(problems).read(flags)
    unnamed = origin.pop("model.preset", None) is None
    notes: list[str] = []
    base = read_base(values, problems, notes)
    if "deepspeed" in flags:
        notes += read_json(flags["deepspeed"], values, origin, base or {}, problems)
    start = read_model(DEFAULT_MODEL) if base is None else base
    values["model"] = start | values.get("model", {})
    run = validate(values, {"model": start}, origin, problems)
    if run is None:
        refuse(problems)
    world = world_size or run.world_size
    run, derived, clamped = derive(run, world)
    if base is not None:
        reported = {key for line in problems if (key := line.partition(" ")[0].rstrip(":").partition(".")[2])}
        problems += [line for line in layout_problems(run, world) if reported.isdisjoint(re.findall(r"\w+", line))]
    if problems:
        windows = [line for line in notes if "sliding_window" in line]  # they say why max_position_embeddings is small
        refuse(problems + (windows if any("max_position_embeddings" in line for line in problems) else []))
    if unnamed:
        derived.insert(0, f"model = preset {DEFAULT_MODEL}")
    warnings = notes + clamped + without_effect(run, set(origin))
    return Loaded(run, derived, warnings, "print_config" in flags, "dry_run" in flags)


def read_json(
    path: str, values: dict[str, dict[str, Any]], origin: dict[str, str], base: dict[str, Any], problems: list[str]
) -> list[str]:
    """Add the settings of a DeepSpeed JSON to `values`; returns notes for the user."""
    defaults = {key: field.default for key, field in Model.model_fields.items() if not field.is_required()}
    try:
        found, notes = apply_deepspeed(path, values, origin, defaults | base | values.get("model", {}))
    except ConfigError as error:
        problems += problem_lines(error)
        return []
    problems += found
    return notes


def print_config(loaded: Loaded) -> str:
    """The whole configuration as YAML that --config reads back, with the derived values in a comment."""
    notes = "".join(f"# derived: {line}\n" for line in loaded.derived)
    return notes + yaml.safe_dump(loaded.run.model_dump(mode="json"), sort_keys=False, width=120)


def unknown_flags(rest: list[str], parser: Parser) -> list[str]:
    """One problem line for each argument that is no flag, with the nearest flag or the --set that is meant."""
    valid = [option for action in parser._actions for option in action.option_strings if option.startswith("--")]
    problems, expects_value = [], False
    for word in rest:
        flag = word.partition("=")[0]
        guess = nearest_name(flag, valid)
        if (word.startswith("--") and len(word) > 2) or (guess and not expects_value and edits(flag, guess) == 1):
            name = flag[2:].replace("-", "_")
            homes = [f"{section}.{key}" for section, keys in KEYS.items() for key in keys if key == name]
            remedy = f"did you mean {guess}?" if guess else "--help lists the flags"
            if homes and (guess or "")[2:].replace("-", "_") != name:
                remedy = f"use --set {homes[0]}=VALUE"
            problems.append(f"{shown(flag)[1:-1]}: unknown flag, {remedy}")
            expects_value = "=" not in word
        elif not expects_value:
            problems.append(f"{shown(word)}: not a flag, expected --flag value (--help lists the flags)")
        else:
            expects_value = False
    return problems


class Sources:
    """Collects {section: {key: value}} from YAML and flags, with where each value was written."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        self.values: dict[str, dict[str, Any]] = {}
        self.origin: dict[str, str] = {}

    def read(self, flags: dict[str, Any]) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
        """Everything the user wrote, later sources over earlier ones. `model.preset` names the model to start from."""
        if "config" in flags:
            self.read_file(flags["config"])
        if "model" in flags:
            self.values["model"] = {}
            self.origin = {key: source for key, source in self.origin.items() if not key.startswith("model.")}
            self.put("model", "preset", flags["model"], "--model")
        if "data" in flags:
            self.put("data", "domains", flags["data"], "--data")
        for flag, (dotted, _, _) in flags_of_settings().items():
            if (name := flag[2:].replace("-", "_")) in flags:
                section, _, key = dotted.partition(".")
                self.put(section, key, flags[name], flag)
        for assignment in flags.get("set", []):
            self.read_assignment(assignment)
        train = {"out": Train.model_fields["out"].default, "resume": None} | self.values.get("train", {})
        if (start := train.get("init_from")) and "preset" not in self.values.get("model", {}):
            preset = whose_model(*map(str, (start, train["resume"] or "", train["out"])))
            self.put("model", "preset", preset, "train.init_from")
        return self.values, self.origin

    def put(self, section: str, key: str, value: Any, source: str) -> None:
        """Take a value, in place of one from before; an unknown key goes to `problems` instead."""
        if key not in KEYS.get(section, ()) and (section, key) != ("model", "preset"):
            self.problems.append(unknown_setting(section, key, f" ({source})"))
            return
        self.values.setdefault(section, {})[key] = value
        self.origin[f"{section}.{key}"] = source

    def read_file(self, path: str) -> None:
        """Take the sections of a YAML file; what is wrong with them goes to `problems`. `model: NAME` stands for its
        preset, and a mapping without `preset` is the whole model."""
        try:
            content = read_mapping(path)
        except ConfigError as error:
            self.problems += problem_lines(error)
            return
        if content and content.keys() <= {*KEYS["model"]}:
            self.problems.append(f"{path}: holds the keys of a model: give it to --model")
            return
        for section, keys in content.items():
            if section == "model" and isinstance(keys, str):
                keys = {"preset": keys}
            elif section == "model" and isinstance(keys, dict):
                keys = {"preset": None, **keys}
            if section not in KEYS:
                self.problems.append(unknown_setting(section, "", f" ({path})"))
            elif keys is not None and not isinstance(keys, dict):
                self.problems.append(f"{section} ({path}): found {shown(keys)}, expected a mapping of keys to values")
            else:
                for key, value in (keys or {}).items():
                    self.put(section, str(key), value, path)

    def read_assignment(self, text: str) -> None:
        """Take the section.key=value of one --set, whose value is YAML; what is wrong with it goes to `problems`."""
        dotted, equals, value = text.partition("=")
        section, dot, key = dotted.partition(".")
        if not equals or not dot or not key:
            guess = nearest_name(dotted, [f"{name}.{key}" for name, keys in KEYS.items() for key in keys])
            near = guess and edits(dotted, guess) == 1  # a dot was lost
            remedy = f"did you mean {guess}?" if near else "such as --set optimizer.beta2=0.99"
            self.problems.append(f"--set {shown(text)}: expected section.key=value, {remedy}")
            return
        try:
            self.put(section, key, parse_yaml(value, f"--set {dotted}"), "--set")
        except ConfigError as error:
            self.problems += problem_lines(error)


def read_base(values: dict[str, dict[str, Any]], problems: list[str], notes: list[str]) -> dict[str, Any] | None:
    """The keys of the preset or file that the model starts from, None when it cannot be read.

    Without a word on the model it is the demo's; a `model` mapping without `preset` in a YAML file must be complete.
    """
    preset = values.get("model", {}).pop("preset", DEFAULT_MODEL)
    if preset is None:
        return {}
    start = values.get("train", {}).get("init_from")
    if preset == start and not any(Path(str(start), name).is_file() for name in ("config.json", "manifest.json")):
        problems.append(f"train.init_from: found {shown(start)}, expected a Hugging Face folder or a checkpoint")
        return None
    try:
        base = read_model(str(preset), notes)
    except ConfigError as error:
        problems += problem_lines(error)
        return None
    problems += [unknown_setting("model", key, f" ({preset})") for key in base if key not in KEYS["model"]]
    return {key: value for key, value in base.items() if key in KEYS["model"]}


def validate(
    values: dict[str, dict[str, Any]],
    start: dict[str, dict[str, Any]],
    origin: dict[str, str],
    problems: list[str],
) -> Run | None:
    """The Run of the collected values; what is wrong goes to `problems`.

    A wrong value gives way to the one in `start`, or to the default, so that the rest is checked too. None when that
    does not make a run either.
    """
    dropped: set[str] = set()
    for _ in range(2):
        try:
            return Run.model_validate(values)
        except ValidationError as error:
            found = validation_problems(error, origin)
            problems += [line for key, lines in found.items() if key not in dropped for line in lines]
            dropped |= found.keys()
            for section, _, key in (dotted.partition(".") for dotted in found):
                values.get(section, {}).pop(key, None)
                if key in start.get(section, {}):
                    values[section][key] = start[section][key]
    return None
