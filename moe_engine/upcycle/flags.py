"""The flags that are fields of upcycle.Options, and what can be said against flags and parents before any work.

A message of the library speaks of `top_k 9`; it is repeated in the words of the command line, `--top-k 9`.
"""

import argparse
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from moe_engine.errors import ConfigError, EngineError
from moe_engine.upcycle.options import OF_FEATURES, OF_PROMPTS

if TYPE_CHECKING:
    from moe_engine.checkpoint.hf.folder import HfFolder
    from moe_engine.config import Model
    from moe_engine.upcycle.options import Options

COPIES = ("copy", "drop", "virtual", "mix")
POOLED = ("sharing_inter", "residual")
SHARING = ("sharing_inner", *POOLED)
PARTITIONS = ("random", "clustering", "gradient", "llama_moe_v2", *SHARING)


class Flag(NamedTuple):
    """kind: of the value; bool: switches the field on, None: off. methods: that read it; (): all."""

    kind: type | None
    methods: tuple[str, ...]
    text: str


OPTIONS = {
    "experts": Flag(int, (), "routed experts of a layer (default 8; mix: one for each model)"),
    "top_k": Flag(int, (), "experts of a token (default 2)"),
    "seed": Flag(int, (), "of everything that is drawn"),
    "norm_topk_prob": Flag(None, COPIES, "do not renormalise the weights of the chosen experts"),
    "dense_ends": Flag(int, (), "first and last layers that stay dense (default 0)"),
    "noise_std": Flag(float, ("copy", "half"), "noise on the experts' weights (default: copy 0, half 1e-3)"),
    "noise_share": Flag(float, ("copy", "half"), "share of the elements that get it (default 1)"),
    "scale": Flag(float, PARTITIONS, "factor on the routed output (default E/k, residual 1)"),
    "drop_ratio": Flag(float, ("drop",), "share of the neurons drawn anew (default 0.5)"),
    "granularity": Flag(int, ("virtual",), "shards of a layer (default 1)"),
    "residual_experts": Flag(int, POOLED, "widths of the expert that is always on (default 1)"),
    "share_neurons": Flag(None, POOLED, "a neuron belongs to one routed expert only"),
    "expert_width": Flag(int, SHARING, "neurons of an expert (default: all shared out evenly)"),
    "projection": Flag(str, ("clustering",), "gate (default) or up, whose rows"),
    "compat": Flag(bool, ("drop", "virtual"), "as the method's released code does, not as its paper"),
    "attention_experts": Flag(int, (), "split attention into so many experts, by KV heads"),
    "attention_top_k": Flag(int, (), "of which a token takes so many (default 2)"),
    "attention_scale": Flag(float, (), "factor on their output (default A/k)"),
}


def add_options(out: argparse.ArgumentParser) -> None:
    """The flags of OPTIONS; one that is not given is not there."""
    for name, flag in OPTIONS.items():
        text = f"{', '.join(flag.methods)}: {flag.text}" if flag.methods else flag.text
        action: dict[str, Any] = {"default": argparse.SUPPRESS, "help": text, "dest": name}
        if flag.kind in (None, bool):
            action["action"] = "store_false" if flag.kind is None else "store_true"
        else:
            action["type"] = flag.kind
        out.add_argument(spelled(name), **action)


def spelled(name: str) -> str:
    """The flag of a field."""
    return ("--no-" if OPTIONS[name].kind is None else "--") + name.replace("_", "-")


def options_of(given: argparse.Namespace) -> "Options":
    """The Options; ConfigError for what cannot work, whatever the parent is."""
    from moe_engine.upcycle import routers
    from moe_engine.upcycle.methods import METHODS
    from moe_engine.upcycle.options import Options

    if given.out.exists() or given.out.is_symlink():
        raise ConfigError(f"--out {given.out} exists; remove it or choose another name")
    if given.method not in METHODS:
        raise ConfigError(f"--method {given.method}: expected {', '.join(METHODS)}")
    known = ("normal", *routers.DRAWN, *OF_FEATURES, *OF_PROMPTS)
    if given.router_init not in known:
        raise ConfigError(f"--router-init {given.router_init}: expected {', '.join(known)}")
    if given.router_init in OF_PROMPTS and given.prompts is None:
        raise ConfigError(f"--router-init {given.router_init} takes its rows from prompts: give --prompts FILE.yaml")
    for flag, least in (("--seq-length", 2), ("--text-tokens", 2), ("--receipt-tokens", 2)):
        found = getattr(given, flag[2:].replace("-", "_"))
        if found < least and (flag, found) != ("--receipt-tokens", 0):
            more = ", or 0 for no receipt" if flag == "--receipt-tokens" else ""
            raise ConfigError(f"{flag} {found}: expected {least} or more{more}")
    values = {name: getattr(given, name) for name in OPTIONS if hasattr(given, name)}
    floats = {spelled(name): value for name, value in values.items() if isinstance(value, float)}
    for flag, value in (floats | {"--router-std": given.router_std, "--shard-gb": given.shard_gb}).items():
        if not math.isfinite(value):
            raise ConfigError(f"{flag} {value}: expected a finite number")
    if given.router_std < 0 or given.shard_gb <= 0:
        flag, value = ("--router-std", given.router_std) if given.router_std < 0 else ("--shard-gb", given.shard_gb)
        raise ConfigError(f"{flag} {value}: expected {'0 or more' if flag == '--router-std' else 'more than 0'}")
    if given.method == "mix" and not given.models:
        raise ConfigError("--method mix makes one expert of each model: give the others with --models DIR ...")
    if given.models and given.method != "mix":
        raise ConfigError(f"--models is for --method mix, found --method {given.method}: leave it out")
    if given.method == "mix" and values.setdefault("experts", 1 + len(given.models)) != 1 + len(given.models):
        raise ConfigError(
            f"--experts {values['experts']} of {1 + len(given.models)} models (--hf and --models): give one for each "
            "expert, or leave --experts out"
        )
    with in_flags():
        return Options(**values)


def idle(given: argparse.Namespace) -> Iterator[str]:
    """One line for each flag that changes nothing here."""
    from moe_engine.upcycle.methods import SCORED

    for name, flag in OPTIONS.items():
        if hasattr(given, name) and flag.methods and given.method not in flag.methods:
            yield f"{spelled(name)} has no effect on {given.method}: it is for {', '.join(flag.methods)}"
    if not getattr(given, "attention_experts", 0):
        for name in ("attention_top_k", "attention_scale"):
            if hasattr(given, name):
                yield f"{spelled(name)} has no effect without --attention-experts"
    if given.hf_version and given.format != "hf":
        yield "--hf-version has no effect on --format checkpoint: give it to tools/convert_hf.py export"
    if given.prompts and given.router_init not in OF_PROMPTS:
        yield f"--prompts has no effect on --router-init {given.router_init}: it is for {', '.join(OF_PROMPTS)}"
    if given.importance != "feature_change" and given.method not in SCORED:
        yield f"--importance has no effect on {given.method}: it is for {', '.join(SCORED)}"


def parents_of(given: argparse.Namespace) -> "list[HfFolder]":
    """The dense models: --hf, and for mix --models; ConfigError or DataError for those that do not serve."""
    named = [("--hf", given.hf), *(("--models", path) for path in given.models)]
    parents = [_opened(flag, path, given.allow_nonfinite) for flag, path in named]
    first, *others = parents
    for other in others:
        if other.model != first.model:
            raise ConfigError(
                f"--models {other.folder} is another model than {first.folder}: their config.json differ; give models "
                "of the same shape"
            )
        if unlike := [name for name in first.places if other.entries[name].dtype != first.entries[name].dtype]:
            raise ConfigError(
                f"--models {other.folder}: {unlike[0]} is {other.entries[unlike[0]].dtype} and in {first.folder} "
                f"{first.entries[unlike[0]].dtype}: save both with one dtype"
            )
    return parents


def child_of(method: str, parent: "Model", options: "Options") -> "Model":
    """The model that comes of it; ConfigError for sizes that do not divide."""
    from moe_engine.upcycle import attention
    from moe_engine.upcycle.methods import METHODS

    with in_flags():
        child = METHODS[method].child(parent, options)
        return attention.child(child, options) if options.attention_experts else child


@contextmanager
def in_flags() -> Iterator[None]:
    """A ConfigError about Options comes out in the words of the command line."""
    from moe_engine.config.messages import refuse

    try:
        yield
    except ConfigError as error:
        lines = [line.replace("share_neurons false", "--no-share-neurons") for line in str(error).split("\n")]
        names, long = "|".join(OPTIONS), "|".join(name for name in OPTIONS if "_" in name)
        pattern = rf"(?<![\w-])(?:({long})|({names})(?= [-+\d.'ni]))\b"
        refuse(re.sub(pattern, lambda found: spelled(found[1] or found[2]), line) for line in lines)


def _opened(flag: str, path: Path, allow_nonfinite: bool) -> "HfFolder":
    from moe_engine.upcycle.source import Parent

    try:
        folder = Parent(path, allow_nonfinite)
    except EngineError as error:
        text = str(error)
        raise type(error)(f"{flag} {text}" if text.startswith(str(path)) else f"{flag} {path}: {text}") from None
    if folder.model.num_local_experts:
        raise ConfigError(f"{flag} {path} has {folder.model.num_local_experts} experts already: give a dense model")
    return folder
