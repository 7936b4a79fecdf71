"""Token shards: the tokens of many documents in memory-mapped files, an index of where each document ends, a manifest.

    OUT/manifest.json              format, tokenizer, counts, sources, the shards of every domain and split
    OUT/<domain>-train-00000.bin   token ids, uint16 (vocabulary <= 65,536) or uint32, documents end to end
    OUT/<domain>-train-00000.idx   int64: documents + 1 offsets into the .bin, in tokens (both little-endian)
    OUT/<domain>-train-00000.mask  samples alone: one bit a token, first bit first: whether it is a label (version 2)
    OUT/<domain>-train-00000.COL   samples alone: int32, one a document, of the column COL that the manifest lists
    OUT/bad_rows.jsonl             what was left out and why, if anything was
    OUT/tokenizer/                 the tokenizer as a Hugging Face folder has it: it goes along with a run's weights

Every document of text ends with `eos_id`, and a sample as its template says. Each lies in one shard. A folder is
written as OUT.partial and renamed when it is whole and flushed, so that a folder with this name is a whole one. Reading
copies nothing: windows are views of np.memmap.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from moe_engine.errors import DataError
from moe_engine.host.files import size_in

FORMAT = "moe_engine.tokens"
VERSION = 2  # 1 had no masks and no columns
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer"  # the sub-folder of its files
SHARD_TOKENS = 1 << 28
SPLITS = ("train", "eval")


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 where every id fits, else uint32."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


class ShardWriter:
    """Appends documents to the shards of one domain and split; `close()` returns what the manifest says of them."""

    def __init__(self, folder: Path, stem: str, dtype: np.dtype, shard_tokens: int = SHARD_TOKENS) -> None:
        self.folder, self.stem, self.dtype, self.shard_tokens = folder, stem, dtype, shard_tokens
        self.shards: list[dict[str, Any]] = []
        self.file: BinaryIO | None = None
        self.lengths: list[np.ndarray] = []
        self.trained: list[np.ndarray] = []
        self.columns: dict[str, list[np.ndarray]] = {}
        self.tokens = self.documents = self.in_shard = 0

    def add(
        self,
        tokens: np.ndarray,
        lengths: np.ndarray,
        trained: np.ndarray | None = None,
        columns: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        """Documents end to end in `tokens`; lengths[i] of them belong to the i-th.

        trained: bool, whether a token is a label. columns: int32 values of each document. Given for all or for none.
        """
        columns = columns or {}
        start = 0
        while start < len(lengths):
            if self.file is None:
                self.file = self._path("bin").open("wb")
            ends = np.cumsum(lengths[start:])
            room = self.shard_tokens - self.in_shard
            count = max(int(np.searchsorted(ends, room, side="right")), int(self.in_shard == 0))
            if count:
                taken = int(ends[count - 1])
                self.file.write(tokens[:taken].astype(self.dtype, copy=False).data)
                self.lengths.append(lengths[start : start + count])
                if trained is not None:
                    self.trained.append(trained[:taken])
                    trained = trained[taken:]
                for name, values in columns.items():
                    self.columns.setdefault(name, []).append(values[start : start + count])
                tokens, start = tokens[taken:], start + count
                self.in_shard += taken
                self.tokens += taken
                self.documents += count
            if start < len(lengths):
                self._finish_shard()

    def cut_tail(self, count: int, eos_id: int) -> tuple[np.ndarray, np.ndarray]:
        """Takes the last `count` tokens (at most half of the open shard) back, as (tokens, lengths).

        A document that is cut ends with `eos_id` in its first part, which costs one token.
        """
        if self.file is None:
            return np.empty(0, self.dtype), np.empty(0, np.int64)
        keep = self.in_shard - min(count, self.in_shard // 2)
        self.file.flush()
        tail = np.fromfile(self._path("bin"), self.dtype, offset=keep * self.dtype.itemsize)
        ends = np.cumsum(np.concatenate(self.lengths))
        first = int(np.searchsorted(ends, keep, side="right"))  # the first document that ends after the cut
        tail_lengths = np.diff(ends[first:], prepend=keep)
        kept = np.append(ends[:first], keep) if first == 0 or ends[first - 1] < keep else ends[:first]
        self.documents += len(kept) - len(ends)
        self.tokens += keep - self.in_shard
        self.in_shard = keep
        self.lengths = [np.diff(kept, prepend=0)]
        self.file.seek((keep - 1) * self.dtype.itemsize)
        self.file.truncate()
        self.file.write(np.array([eos_id], self.dtype).data)
        return tail, tail_lengths

    def close(self) -> list[dict[str, Any]]:
        """Finish the shard that is open. The manifest's entry for each shard, in order."""
        if self.file is not None:
            self._finish_shard()
        return self.shards

    def _path(self, suffix: str) -> Path:
        return self.folder / f"{self.stem}-{len(self.shards):05d}.{suffix}"

    def _finish_shard(self) -> None:
        assert self.file is not None
        _flush(self.file)
        self.file.close()
        offsets = np.concatenate([[0], np.cumsum(np.concatenate(self.lengths))]).astype("<i8")
        beside = {"idx": offsets} | {name: np.concatenate(v).astype("<i4") for name, v in self.columns.items()}
        if self.trained:
            beside["mask"] = np.packbits(np.concatenate(self.trained))
        for suffix, values in beside.items():
            with open(self._path(suffix), "wb") as file:
                file.write(values.data)
                _flush(file)
        with open(self._path("bin"), "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        name = self._path("bin").name
        self.shards.append({"file": name, "documents": len(offsets) - 1, "tokens": int(offsets[-1]), "sha256": digest})
        if self.trained:
            self.shards[-1]["mask_sha256"] = hashlib.sha256(beside["mask"].data).hexdigest()
        self.file, self.lengths, self.in_shard, self.trained, self.columns = None, [], 0, [], {}


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def write_data_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Writes manifest.json, flushed to disk."""
    with open(folder / MANIFEST, "wb") as file:
        file.write(json.dumps({"format": FORMAT, "version": VERSION, **manifest}, indent=1).encode())
        _flush(file)


def read_data_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a prepared folder; DataError where there is none or it is not one of ours."""
    remedy = "make it with tools/prepare_data.py --input FILES --out FOLDER"
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder of prepared data; {remedy}")
    if not (folder / MANIFEST).is_file():
        raise DataError(f"{folder}: holds no {MANIFEST}, so no prepared data; {remedy}")
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{folder / MANIFEST}: cannot be read ({error}); prepare the data again") from None
    if (
        not isinstance(manifest, dict)
        or manifest.get("format") != FORMAT
        or manifest.get("version") not in (1, VERSION)
    ):
        raise DataError(f"{folder / MANIFEST}: not {FORMAT} version 1 or {VERSION}; prepare the data again")
    return manifest


class TokenDataset:
    """One split of one domain, memory-mapped. `lengths[i]` is the number of tokens of document i, its eos included.

    samples: whether tokens are masked. columns: by name, int32 [documents]; "expert_label" indexes `expert_labels`.
    """

    def __init__(self, folder: Path, domain: str, split: str, vocab_size: int | None = None) -> None:
        manifest = read_data_manifest(folder)
        if domain not in manifest["domains"]:
            raise DataError(f"{folder}: has no domain {domain!r}; it holds {', '.join(manifest['domains'])}")
        entry = manifest["domains"][domain]["splits"][split]
        self.folder, self.domain, self.split = folder, domain, split
        self.eos_id: int = manifest["eos_id"]
        self.tokenizer: dict[str, Any] = manifest["tokenizer"]
        self.vocab_size = vocab_size or manifest["vocab_size"]
        if entry["max_id"] >= self.vocab_size:
            raise DataError(
                f"{folder}: token id {entry['max_id']} of domain {domain!r} is outside the model's vocabulary of "
                f"{self.vocab_size}; prepare it with the model's tokenizer, or set model.vocab_size >= "
                f"{manifest['vocab_size']} for new weights; a Hugging Face folder gets more rows by "
                f"tools/convert_hf.py import --resize-vocab {manifest['vocab_size']}"
            )
        dtype = token_dtype(manifest["vocab_size"])
        if manifest["dtype"] != dtype.str:  # mapped as anything else, an object say, bytes of the file would act
            raise DataError(f"{folder}: tokens of type {manifest['dtype']!r}, expected {dtype.str}; prepare it again")
        self.shards = [self._map(shard, dtype) for shard in entry["shards"]]
        self.samples: bool = manifest["domains"][domain].get("samples", False)
        self.masks = [self._mask(shard) for shard in entry["shards"]] if self.samples else []
        self.expert_labels: list[str] = manifest["domains"][domain].get("expert_labels", [])
        names = manifest["domains"][domain].get("columns", [])
        self.columns = {name: self._column(name, entry["shards"]) for name in names}
        offsets = [self._offsets(shard) for shard in entry["shards"]]
        self.lengths = np.concatenate([np.diff(o) for o in offsets]) if offsets else np.empty(0, np.int64)
        self.starts = np.concatenate([o[:-1] for o in offsets]) if offsets else np.empty(0, np.int64)
        self.shard_firsts = np.cumsum([0] + [len(o) - 1 for o in offsets])
        self.tokens = int(self.lengths.sum())
        digests = (shard["sha256"] + shard.get("mask_sha256", "") for shard in entry["shards"])
        self.fingerprint = hashlib.sha256("".join(digests).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.lengths)

    def read(self, document: int, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of a document: a view, nothing is copied."""
        shard = int(np.searchsorted(self.shard_firsts, document, side="right")) - 1
        begin = int(self.starts[document])
        return self.shards[shard][begin + start : begin + stop]

    def trained(self, document: int, stop: int) -> np.ndarray:
        """Whether each of the first `stop` tokens of a document is a label, bool [stop]."""
        if not self.samples:
            return np.ones(stop, bool)
        shard = int(np.searchsorted(self.shard_firsts, document, side="right")) - 1
        begin = int(self.starts[document])
        bits = np.unpackbits(self.masks[shard][begin // 8 : (begin + stop + 7) // 8])
        return bits[begin % 8 : begin % 8 + stop].astype(bool)

    def check_ids(self, tokens: np.ndarray, document: int) -> None:
        """DataError if a token id lies outside the vocabulary: the file changed after it was written."""
        if len(tokens) and int(tokens.max()) >= self.vocab_size:
            raise DataError(
                f"{self.folder}: token id {int(tokens.max())} near document {document} of domain {self.domain!r}, "
                f"split {self.split}, is outside the vocabulary of {self.vocab_size}; it is damaged: prepare it again"
            )

    def _map(self, shard: dict[str, Any], dtype: np.dtype) -> np.ndarray:
        path = self.folder / shard["file"]
        self._check_size(path, shard["tokens"] * dtype.itemsize)
        return np.memmap(path, dtype, mode="r", shape=(shard["tokens"],))

    def _mask(self, shard: dict[str, Any]) -> np.ndarray:
        path = (self.folder / shard["file"]).with_suffix(".mask")
        size = (shard["tokens"] + 7) // 8
        self._check_size(path, size)
        return np.memmap(path, np.uint8, mode="r", shape=(size,))

    def _column(self, name: str, shards: list[dict[str, Any]]) -> np.ndarray:
        parts = []
        for shard in shards:
            path = (self.folder / shard["file"]).with_suffix(f".{name}")
            self._check_size(path, 4 * shard["documents"])
            parts.append(np.fromfile(path, "<i4"))
        return np.concatenate(parts) if parts else np.empty(0, np.int32)

    def _offsets(self, shard: dict[str, Any]) -> np.ndarray:
        path = (self.folder / shard["file"]).with_suffix(".idx")
        self._check_size(path, (shard["documents"] + 1) * 8)
        offsets = np.fromfile(path, "<i8")
        if offsets[0] != 0 or offsets[-1] != shard["tokens"] or (np.diff(offsets) <= 0).any():
            raise DataError(
                f"{path}: not an index of {shard['tokens']} tokens; the file is damaged: prepare the data again"
            )
        return offsets

    def _check_size(self, path: Path, expected: int) -> None:
        found = size_in(self.folder, path)
        if found != expected:
            what = "is missing, or no regular file of this folder" if found is None else f"has {found} bytes"
            raise DataError(f"{str(path)[:500]}: {what}, {MANIFEST} says {expected}; copy it or prepare the data again")
