"""A mixture of sources of samples, read from a YAML file of S0.25's shape.

    datasets:                                     processing:
      - name: alpaca                                max_seq_length: 1024
        path: data/alpaca.json                      seed: 42
        weight: 0.3                                 prompt_template: instruction
        samples: 15000

Weights are shares of the windows of a run and sum to 1, `samples` is the most that is taken of a source. A run that
counts epochs takes every sample once an epoch, whatever the weights.
"""

from typing import Any, NamedTuple

from pydantic import ValidationError

from moe_engine.config.files import read_mapping
from moe_engine.config.messages import refuse, shown, unknown_key
from moe_engine.config.samples import Samples, Source

SECTIONS = {"datasets", "processing", "training"}
PROCESSING = {"max_seq_length", "shuffle", "seed", "prompt_template"}


class Mixture(NamedTuple):
    """sources by domain name. processing: what the file says of length, seed and template. notes: for the user."""

    sources: dict[str, Source]
    processing: dict[str, Any]
    notes: list[str]


def sources_of(samples: Samples) -> Mixture:
    """The sources that a run names. ConfigError lists everything that is wrong with the file."""
    if not samples.mixture:
        common = {"format": samples.format, "columns": samples.columns, "samples": samples.max_samples}
        return Mixture({"samples": Source(name="samples", path=samples.files, **common)}, {}, [])
    mixture = read_mixture(samples.mixture)
    chosen = mixture.sources
    if samples.mode == "validation":
        name, source = next(iter(chosen.items()))
        chosen = {name: source.model_copy(update={"samples": source.samples_validation or source.samples})}
    if samples.max_samples:
        capped = {name: min(s.samples or samples.max_samples, samples.max_samples) for name, s in chosen.items()}
        chosen = {name: source.model_copy(update={"samples": capped[name]}) for name, source in chosen.items()}
    return mixture._replace(sources=chosen)


def read_mixture(path: str) -> Mixture:
    """The enabled sources of a file, with their weights. ConfigError as `sources_of` has it."""
    content, problems = read_mapping(path), list[str]()
    problems += [unknown_key(key, SECTIONS, f" ({path})") for key in content if key not in SECTIONS]
    processing = content.get("processing") or {}
    problems += [
        unknown_key(key, PROCESSING, f" of processing ({path})") for key in processing if key not in PROCESSING
    ]
    sources: dict[str, Source] = {}
    for number, given in enumerate(content.get("datasets") or [], 1):
        try:
            source = Source.model_validate(given)
        except ValidationError as error:
            for item in error.errors():
                key = ".".join(map(str, item["loc"])) or "the entry"
                if item["type"] == "extra_forbidden":
                    problems.append(unknown_key(key, Source.model_fields, f" of dataset {number} ({path})"))
                else:
                    problems.append(f"dataset {number}, {key} ({path}): found {shown(item['input'])}: {item['msg']}")
            continue
        name = source.name.rpartition("/")[2] or source.name
        if name in sources:
            name = source.name.replace("/", "--")
        if name in sources:
            problems.append(f"dataset {number} ({path}): the name {source.name} is used twice: give each its own")
        if source.enabled and source.weight > 0:
            paths = source.path or (source.name,)
            split = f":{source.split}" if source.split else ""
            sources[name] = source.model_copy(update={"path": tuple(p + split for p in paths)})
    total = sum(source.weight for source in sources.values())
    if not sources and not problems:
        problems.append(f"{path}: found no enabled entry under `datasets`, expected sources with name, path and weight")
    elif abs(total - 1) > 1e-6 and len(sources) > 1 and not problems:
        shares = ", ".join(f"{name} {source.weight:g}" for name, source in sources.items())
        problems.append(f"{path}: the weights {shares} sum to {total:g}, expected 1: they are shares of what is read")
    if problems:
        refuse(problems)
    notes = ["training (of the mixture) has no effect: give its settings as flags"] if content.get("training") else []
    return Mixture(sources, processing, [f"{path}: {note}" for note in notes])
