"""Samples to token shards with masks: rendered by worker processes, capped, split and written in order.

    read_samples -> Template.render, cut to length -> cap and held-out samples by a seeded order -> shards

A sample that is left without a token to train is dropped and counted. The held-out samples of a domain are
ceil(eval_fraction * samples), and the cap takes `max_samples` of them, both by the order of a hash of their tokens
under `seed`: the same for any number of workers. A domain's tokens are held in memory until it is written.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moe_engine.data.row import NO_LABEL
from moe_engine.data.shards import TOKENIZER, ShardWriter, read_data_manifest, token_dtype, write_data_manifest
from moe_engine.errors import ConfigError, DataError
from moe_engine.host.atomic_folder import atomic_folder
from moe_engine.prepare.fitting import Limits, fitted
from moe_engine.prepare.formats import BadRow
from moe_engine.prepare.pipeline import existing, keep_tokenizer, report_bad
from moe_engine.prepare.progress import Progress
from moe_engine.prepare.samples import Sample, Samples, files_of, read_samples
from moe_engine.prepare.sources import key_of, source_of
from moe_engine.prepare.template import Rendered, Template, TrainOn
from moe_engine.prepare.tokenizer.load import Tokenizer, load_tokenizer
from moe_engine.prepare.workers import in_order, worker_count

GROUP = 256  # samples that one worker call takes


@dataclass(frozen=True)
class SampleSource:
    """Where the samples of one domain come from. columns: ours -> the file's. max_samples None: all."""

    paths: tuple[str, ...]
    format: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    max_samples: int | None = None
    expert_label: str | None = None  # of every sample of the domain that names none
    weight: float = 1.0  # share of the windows of a run


@dataclass(frozen=True)
class SampleOptions:
    """What, beside the files and the tokenizer, decides the output."""

    template: str = "auto"
    train_on: TrainOn = "responses"
    max_length: int | None = None
    max_prompt: int | None = None
    max_response: int | None = None
    add_bos: bool = False
    eval_fraction: float = 0.05
    seed: int = 42
    on_bad_row: str = "stop"


class Made(NamedTuple):
    """What a worker makes of a group: of each sample its halves and label, or why it gives nothing."""

    kept: list[tuple[list[Rendered], str | None]]
    bad: list[BadRow]
    dropped: Counter[str]


def prepare_samples(
    domains: Mapping[str, SampleSource],
    out: str | Path,
    tokenizer: str,
    options: SampleOptions | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Writes the samples of each domain to `out` as tokens with masks, and returns its manifest.

    A complete `out` made from the same is returned as it is; another is refused unless `overwrite`. ConfigError when
    something asked for cannot be; DataError for the first bad row (on_bad_row "stop"), and for a domain of which
    nothing is left.
    """
    out, options = Path(out), options or SampleOptions()
    _check(options)
    model = load_tokenizer(tokenizer)
    template = Template(model, options.template)
    sources = {name: [source_of(file) for file in files_of(source.paths)] for name, source in domains.items()}
    asked = {name: {**asdict(source), "paths": []} for name, source in domains.items()}
    key = key_of(sources, [model.fingerprint, template.source], asdict(options), asked)
    if (manifest := existing(out, key, overwrite)) is not None:
        return manifest
    total = sum(source["bytes"] for found in sources.values() for source in found)
    count = worker_count(workers, total * 8, model)  # rendering costs several times what splitting text does
    make = partial(_make_in_worker, model.spec, options) if count > 1 else partial(_make, template, options)
    with atomic_folder(out) as folder, Progress(total, quiet) as progress:
        entries, written = {}, []
        for name, source in domains.items():
            samples = read_samples(source.paths, source.format, source.columns)
            domain = _Domain(name, source, options, folder, progress)
            for _, made in in_order(make, _groups(samples), count):
                domain.add(made)
            entries[name] = domain.write(folder, model, samples)
            written.append(domain)
        manifest = {
            "key": key,
            "dtype": token_dtype(model.vocab_size).str,
            "vocab_size": model.vocab_size,
            "eos_id": model.eos_id,
            "bos_id": model.bos_id if options.add_bos else None,
            "tokenizer": model.described() | {"add_bos": options.add_bos},
            "options": asdict(options),
            "tokens": sum(split["tokens"] for entry in entries.values() for split in entry["splits"].values()),
            "documents": sum(split["documents"] for entry in entries.values() for split in entry["splits"].values()),
            "domains": {name: {**entry, "sources": sources[name]} for name, entry in entries.items()},
        }
        if model.bos_id is not None and all(domain.begins == {model.bos_id} for domain in written):
            manifest["tokenizer"]["add_bos"] = True  # the template writes it
        manifest["tokenizer"] |= {"files": keep_tokenizer(folder / TOKENIZER, model), "notes": list(model.notes)}
        write_data_manifest(folder, manifest)
    return read_data_manifest(out)


def _check(options: SampleOptions) -> None:
    problems = []
    if not 0 <= options.eval_fraction < 1:
        problems.append(f"eval_fraction {options.eval_fraction}: expected 0 <= eval_fraction < 1")
    for name in ("max_length", "max_prompt", "max_response"):
        if (limit := getattr(options, name)) is not None and limit < 2:
            problems.append(f"{name} {limit}: expected at least 2")
    if problems:
        raise ConfigError("; ".join(problems))


@lru_cache(maxsize=1)
def _template(tokenizer: str, name: str) -> Template:
    return Template(load_tokenizer(tokenizer), name)


def _groups(samples: Samples) -> Iterator[list[Sample | BadRow]]:
    rest = iter(samples)
    while group := list(islice(rest, GROUP)):
        yield group


def _make_in_worker(tokenizer: str, options: SampleOptions, group: list[Sample | BadRow]) -> Made:
    return _make(_template(tokenizer, options.template), options, group)


def _make(template: Template, options: SampleOptions, group: list[Sample | BadRow]) -> Made:
    """The samples of a group as tokens; one with nothing to train in either half is dropped."""
    limits = Limits(options.max_length, options.max_prompt, options.max_response)
    made = Made([], [], Counter())
    for sample in group:
        if isinstance(sample, BadRow):
            made.bad.append(sample)
            continue
        try:
            halves = fitted(template, sample, options.train_on, limits)
        except DataError as error:
            path, _, where = sample.where.rpartition(":")
            made.bad.append(BadRow(path, where, str(error)))
            continue
        if options.add_bos:
            halves = [_with_bos(half, template.tokenizer.bos_id) for half in halves]
        if all(half.trained[1:].any() for half in halves):
            made.kept.append((halves, sample.label))
        else:
            made.dropped["no token to train" + (" within the limits" if any(limits) else "")] += 1
    return made


def _with_bos(rendered: Rendered, bos_id: int | None) -> Rendered:
    """With a begin-of-text token in front, unless the template wrote one."""
    if bos_id is None or (len(rendered.ids) and int(rendered.ids[0]) == bos_id):
        return rendered
    return Rendered(np.append(np.int32(bos_id), rendered.ids), np.append(False, rendered.trained))


class _Domain:
    """Collects the samples of one domain, then caps, splits and writes them."""

    def __init__(self, name: str, source: SampleSource, options: SampleOptions, folder: Path, progress: Progress):
        self.name, self.source, self.options, self.folder, self.progress = name, source, options, folder, progress
        self.kept: list[tuple[list[Rendered], str | None]] = []
        self.dropped: Counter[str] = Counter()
        self.bad = 0
        self.begins: set[int] = set()  # the first tokens of samples

    def add(self, made: Made) -> None:
        """Take what a group gave."""
        report_bad(self.folder, self.name, made.bad, self.options.on_bad_row, self.progress)
        self.bad += sum(row.rows for row in made.bad)
        self.dropped += made.dropped
        self.begins |= {int(half.ids[0]) for halves, _ in made.kept for half in halves}
        self.kept += [(halves, label or self.source.expert_label) for halves, label in made.kept]
        self.progress.advance(0, sum(len(half.ids) for halves, _ in made.kept for half in halves))

    def write(self, folder: Path, model: Tokenizer, samples: Samples) -> dict[str, Any]:
        """The domain's shards; its entry of the manifest. DataError when nothing is left to train on."""
        why = {**samples.left_out, **self.dropped}
        if not self.kept:
            raise DataError(
                f"domain {self.name}: none of {samples.counts['read']} rows gives a sample: "
                f"{_reasons({**why, 'bad rows': self.bad})}; look at them with tools/prepare_data.py preview"
            )
        chosen = self._in_order()
        held_out = math.ceil(self.options.eval_fraction * len(chosen)) if len(chosen) > 1 else 0
        splits = {"train": sorted(chosen[held_out:]), "eval": sorted(chosen[:held_out])}
        labels = sorted({label for i in chosen if (label := self.kept[i][1]) is not None})
        pairs = len(self.kept[0][0]) == 2
        columns = ["expert_label"] * bool(labels) + ["rejected"] * pairs
        lengths = np.array([len(half.ids) for i in chosen for half in self.kept[i][0]])
        trained = sum(int(half.trained.sum()) for i in chosen for half in self.kept[i][0])
        return {
            "samples": True,
            "format": samples.format,
            "pairs": pairs,
            "columns": columns,
            "expert_labels": labels,
            "rows_read": samples.counts["read"],
            "weight": self.source.weight,
            "asked": self.source.max_samples,
            "valid": len(chosen),
            "left_out": why,
            "bad_rows": self.bad,
            "lengths": {
                "mean": float(lengths.mean()),
                **{f"p{q}": int(np.percentile(lengths, q)) for q in (50, 95, 100)},
                "trained": trained / int(lengths.sum()),
            },
            "splits": {split: self._write(folder, split, places, model, labels) for split, places in splits.items()},
        }

    def _in_order(self) -> list[int]:
        """The samples by a seeded hash of their tokens, as many as are asked for: the first are held out."""
        seed = self.options.seed.to_bytes(8, "little")
        keys = [hashlib.blake2b(halves[0].ids.tobytes(), digest_size=16, key=seed).digest() for halves, _ in self.kept]
        return sorted(range(len(keys)), key=lambda i: keys[i])[: self.source.max_samples]

    def _write(
        self, folder: Path, split: str, places: Sequence[int], model: Tokenizer, labels: Sequence[str]
    ) -> dict[str, Any]:
        dtype, max_id = token_dtype(model.vocab_size), -1
        writer = ShardWriter(folder, f"{self.name}-{split}", dtype)
        for place in places:
            halves, label = self.kept[place]
            columns = {"expert_label": NO_LABEL if label is None else labels.index(label)} if labels else {}
            for side, half in enumerate(halves):
                sides = {"rejected": side} if len(halves) == 2 else {}
                values = {name: np.array([value], np.int32) for name, value in (columns | sides).items()}
                writer.add(half.ids.astype(dtype), np.array([len(half.ids)]), half.trained, values)
                max_id = max(max_id, int(half.ids.max()))
        shards = writer.close()
        return {"documents": writer.documents, "tokens": writer.tokens, "max_id": max_id, "shards": shards}


def _reasons(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in counts.items() if count) or "they are empty"
