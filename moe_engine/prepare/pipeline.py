"""Files to token shards: read in order, tokenised by worker processes, written in order.

    list_files -> read_chunks -> groups of about 1 MiB -> workers: documents, token ids, split -> shards

Groups come back in the order they were read, so the shards are the same bytes for any number of workers. A document is
held out when the hash of its text falls below `eval_fraction`: equal texts are on one side, whatever they come with. A
domain too small for that to hold anything out gives the last `eval_fraction` of its tokens.
"""

import hashlib
import os
import sysconfig
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from moe_engine.data.shards import (
    SHARD_TOKENS,
    SPLITS,
    TOKENIZER,
    ShardWriter,
    read_data_manifest,
    token_dtype,
    write_data_manifest,
)
from moe_engine.errors import ConfigError, DataError
from moe_engine.host.atomic_folder import atomic_folder
from moe_engine.prepare.files import Listing, list_files
from moe_engine.prepare.formats import BadRow, Chunk, documents, read_chunks
from moe_engine.prepare.out_folder import existing, keep_tokenizer, report_bad
from moe_engine.prepare.progress import Progress
from moe_engine.prepare.sources import key_of, source_of
from moe_engine.prepare.tokenizer.load import Tokenizer, load_tokenizer
from moe_engine.prepare.workers import in_order, worker_count

GROUP = 1 << 20  # bytes of input that one worker call takes
COUNTS = ("rows_read", "documents_kept", "empty_documents", "bad_rows")  # the first is the sum of the others
STDLIB_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "lib2to3"}


@dataclass(frozen=True)
class PrepareOptions:
    """What, beside the files and the tokenizer, decides the output."""

    text_key: str | None = None
    per: Literal["file", "line"] = "file"
    add_bos: bool = False
    eval_fraction: float = 0.01
    on_bad_row: Literal["stop", "skip"] = "stop"
    shard_tokens: int = SHARD_TOKENS


class Encoded(NamedTuple):
    """One group's documents as tokens: for each split the tokens end to end and the length of each document."""

    splits: dict[str, tuple[np.ndarray, np.ndarray]]
    bad: list[BadRow]
    rows: int  # read: documents + empty + bad
    empty: int
    size: int  # bytes read


def stdlib_sources() -> list[Path]:
    """The running Python's own standard library sources, without tests and installed packages: on every machine."""
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in STDLIB_LEFT_OUT)
        files += [Path(folder) / name for name in sorted(names) if name.endswith(".py")]
    if not files:
        raise DataError(f"{root}: the standard library's sources are not there; give text with --input")
    return files


def prepare(
    domains: Mapping[str, Iterable[str | Path]],
    out: str | Path,
    tokenizer: str | None = None,
    options: PrepareOptions | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Tokenises the files of each domain into `out` and returns its manifest (which see, in shards.py).

    A complete `out` made of the same files, tokenizer and options is returned as it is; another one is refused unless
    `overwrite`. `workers` None chooses. DataError for the first bad row (on_bad_row "stop") or when there is no text.
    """
    out, options = Path(out), options or PrepareOptions()
    _check_options(options, workers)
    model = load_tokenizer(tokenizer)
    if options.add_bos and model.bos_id is None:
        raise ConfigError(f"tokenizer {model.spec}: has no begin-of-text token; leave out --add-bos")
    listings = {name: list_files(paths) for name, paths in domains.items()}
    files = {name: listing.files for name, listing in listings.items()}
    sources = {name: [source_of(file) for file in found] for name, found in files.items()}
    tokens = [model.fingerprint, model.bos_id if options.add_bos else None]
    key = key_of(sources, tokens, asdict(options))
    if (manifest := existing(out, key, overwrite)) is not None:
        return _with_notes(manifest, listings)
    total = sum(source["bytes"] for found in sources.values() for source in found)
    with atomic_folder(out) as folder, Progress(total, quiet) as progress:
        writer = _Writer(folder, model, options, files, progress)
        for domain, encoded in _encode_all(files, model, options, worker_count(workers, total, model)):
            writer.add(domain, encoded)
        manifest = _with_notes(writer.finish(sources, key), listings)
        manifest["tokenizer"] |= {"files": keep_tokenizer(folder / TOKENIZER, model), "notes": list(model.notes)}
        write_data_manifest(folder, manifest)
    return read_data_manifest(out)


def _check_options(options: PrepareOptions, workers: int | None) -> None:
    problems = []
    if not 0 <= options.eval_fraction < 1:
        problems.append(f"eval_fraction {options.eval_fraction}: expected 0 <= eval_fraction < 1")
    if options.shard_tokens < 1:
        problems.append(f"shard_tokens {options.shard_tokens}: expected at least 1")
    if workers is not None and workers < 1:
        problems.append(f"workers {workers}: expected at least 1")
    if problems:
        raise ConfigError("; ".join(problems))


def _with_notes(manifest: dict[str, Any], listings: Mapping[str, Listing]) -> dict[str, Any]:
    """The manifest with what its inputs hold beside the files that were read."""
    for name, (_, again, passed_over) in listings.items():
        notes = {"passed_over": dict(passed_over), "met_again": [[str(path), str(first)] for path, first in again]}
        manifest["domains"][name] |= notes
    return manifest


def _groups(files: Mapping[str, Sequence[Path]], options: PrepareOptions) -> Iterator[tuple[str, list[Chunk | BadRow]]]:
    for domain, paths in files.items():
        group, size = [], 0
        for path in paths:
            for chunk in read_chunks(path, options.per, options.text_key):
                group.append(chunk)
                size += chunk.size if isinstance(chunk, Chunk) else 0
                if size >= GROUP:
                    yield domain, group
                    group, size = [], 0
        if group:
            yield domain, group


def _encode_all(
    files: Mapping[str, Sequence[Path]], model: Tokenizer, options: PrepareOptions, workers: int
) -> Iterator[tuple[str, Encoded]]:
    encode = partial(_encode, model.spec, options)
    if workers == 1:  # the tokenizer at hand
        encode = lambda given: encode_group(given[1], model, options)  # noqa: E731
    for (domain, _), encoded in in_order(encode, _groups(files, options), workers):
        yield domain, encoded


_load_once = lru_cache(maxsize=1)(load_tokenizer)


def _encode(tokenizer: str, options: PrepareOptions, given: tuple[str, list[Chunk | BadRow]]) -> Encoded:
    return encode_group(given[1], _load_once(tokenizer), options)


def encode_group(group: list[Chunk | BadRow], model: Tokenizer, options: PrepareOptions) -> Encoded:
    """The documents of `group` as tokens, each with its eos (and bos); blank documents are counted, not kept."""
    bad: list[BadRow] = []
    texts: list[str] = []
    rows = empty = 0
    for item in group:
        for row in [item] if isinstance(item, BadRow) else documents(item, options.text_key):
            rows += row.rows if isinstance(row, BadRow) else 1
            if isinstance(row, BadRow):
                bad.append(row)
            elif row.text.isspace() or not row.text:
                empty += 1
            else:
                texts.append(row.text)
    before = np.array([model.bos_id] if options.add_bos else [], np.int32)
    after = np.array([model.eos_id], np.int32)
    arrays: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
    for text, ids in zip(texts, model.encode(texts)):
        split = "eval" if _held_out(text, options.eval_fraction) else "train"
        arrays[split].append(np.concatenate([before, ids, after]))
    dtype = token_dtype(model.vocab_size)
    splits = {split: _joined(found, dtype) for split, found in arrays.items()}
    size = sum(item.size for item in group if isinstance(item, Chunk))
    return Encoded(splits, bad, rows, empty, size)


def _joined(arrays: list[np.ndarray], dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.concatenate(arrays).astype(dtype) if arrays else np.empty(0, dtype)
    return tokens, np.array([len(array) for array in arrays], np.int64)


def _held_out(text: str, fraction: float) -> bool:
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < fraction * 2.0**64


class _Writer:
    """Takes groups in order, keeps the counts, and writes the shards and the list of bad rows."""

    def __init__(
        self, folder: Path, model: Tokenizer, options: PrepareOptions, domains: Iterable[str], progress: Progress
    ) -> None:
        self.folder, self.model, self.options, self.progress = folder, model, options, progress
        self.dtype = token_dtype(model.vocab_size)
        self.counts = {name: dict.fromkeys(COUNTS, 0) for name in domains}
        self.splits: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in domains}
        self.open: dict[str, ShardWriter] = {}
        self.max_id: dict[str, int] = {}
        self.domain: str | None = None

    def add(self, domain: str, encoded: Encoded) -> None:
        """Write one group and add up its counts. A new domain closes the one before: its groups come in a row."""
        if domain != self.domain:
            self._close_domain()
            self.domain = domain
            size = self.options.shard_tokens
            self.open = {s: ShardWriter(self.folder, f"{domain}-{s}", self.dtype, size) for s in SPLITS}
            self.max_id = dict.fromkeys(SPLITS, -1)
        report_bad(self.folder, domain, encoded.bad, self.options.on_bad_row, self.progress)
        kept = sum(len(lengths) for _, lengths in encoded.splits.values())
        for name, count in zip(COUNTS, (encoded.rows, kept, encoded.empty, sum(row.rows for row in encoded.bad))):
            self.counts[domain][name] += count
        for split, (tokens, lengths) in encoded.splits.items():
            self.open[split].add(tokens, lengths)
            self.max_id[split] = max(self.max_id[split], int(tokens.max(initial=0)))
        self.progress.advance(encoded.size, sum(len(tokens) for tokens, _ in encoded.splits.values()))

    def _close_domain(self) -> None:
        if self.domain is None:
            return
        train, held_out = self.open["train"], self.open["eval"]
        if self.options.eval_fraction and not held_out.tokens:
            tail = train.cut_tail(max(2, round(train.tokens * self.options.eval_fraction)), self.model.eos_id)
            held_out.add(*tail)
            self.max_id["eval"] = self.max_id["train"]
        for split, writer in self.open.items():
            shards = writer.close()
            self.splits[self.domain][split] = {
                "documents": writer.documents,
                "tokens": writer.tokens,
                "max_id": self.max_id[split],
                "shards": shards,
            }

    def finish(self, sources: dict[str, list[dict[str, Any]]], key: str) -> dict[str, Any]:
        """Closes the shards and returns the manifest; DataError for a domain without text."""
        self._close_domain()
        for read, *parts in (counts.values() for counts in self.counts.values()):
            assert read == sum(parts), self.counts
        for domain, splits in self.splits.items():
            if not splits or not splits["train"]["tokens"]:
                counts = self.counts[domain]
                raise DataError(
                    f"domain {domain}: no text in {len(sources[domain])} files ({counts['bad_rows']} bad rows, "
                    f"{counts['empty_documents']} empty documents); give files with text, or name its --text-key"
                )
        model = self.model
        totals = {
            name: sum(split[name] for splits in self.splits.values() for split in splits.values())
            for name in ("documents", "tokens")
        }
        return {
            "key": key,
            "dtype": self.dtype.str,
            "vocab_size": model.vocab_size,
            "eos_id": model.eos_id,
            "bos_id": model.bos_id if self.options.add_bos else None,
            "tokenizer": model.described() | {"add_bos": self.options.add_bos},
            "options": asdict(self.options),
            **totals,
            **{name: sum(counts[name] for counts in self.counts.values()) for name in COUNTS},
            "domains": {
                name: {**self.counts[name], "splits": splits, "sources": sources[name]}
                for name, splits in self.splits.items()
            },
        }
