"""A seeded order over documents and windows, new in every epoch: the same on every rank, layout and machine.

    documents   d3 d0 d2 ...            shuffled by (seed, domain, epoch)
    stream      ttttttttttttttttttt     their tokens end to end
    windows     |0 ... S|S ... 2S|...   S inputs and one more token as the last label; window i starts at i * S
    samples     w5 w1 w7 ...            windows shuffled by (seed, domain, epoch)

Each token of an epoch is an input at most once and a label at most once. What does not fill a window at the end of the
stream is left out, and is another part of the text in the next epoch. Shuffling sorts by a hash (splitmix64), so that
the order does not hang on a library's random generator.
"""

import hashlib
import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from moe_engine.data.row import Row, row_of
from moe_engine.data.shards import TokenDataset
from moe_engine.hashing import GAMMA, mix64


def hash64(values: np.ndarray, key: int) -> np.ndarray:
    """splitmix64 of uint64 `values` under `key`; a bijection for a fixed key."""
    signed = np.uint64(key & 0xFFFFFFFFFFFFFFFF).astype(np.int64)
    return mix64(values.astype(np.int64) * GAMMA + signed).view(np.uint64)


def stable_key(*parts: object) -> int:
    """A 64-bit key that depends on the printed parts alone."""
    text = "\x1f".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def permutation(count: int, key: int) -> np.ndarray:
    """A seeded permutation of range(count)."""
    return np.argsort(hash64(np.arange(count, dtype=np.uint64), key))


class _Epoch(NamedTuple):
    documents: np.ndarray  # in reading order
    ends: np.ndarray  # in the stream, of each of them
    windows: np.ndarray


class TextOrder:
    """Random access to the endless sequence of windows of one domain: `row(n)` is the n-th for ever.

    document_mask: attention and positions restart at each document.
    """

    def __init__(self, dataset: TokenDataset, seq_length: int, seed: int, name: str, document_mask: bool = True):
        self.dataset, self.seq_length, self.seed, self.name = dataset, seq_length, seed, name
        self.document_mask = self.restarts = document_mask
        self.per_epoch = max(dataset.tokens - 1, 0) // seq_length
        self.held_out = max(math.ceil((dataset.tokens - 1) / seq_length), 0)  # windows of `in_order`
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)  # two: a step may straddle the border

    def row(self, number: int) -> Row:
        """Window `number` of the sequence; epoch number // per_epoch."""
        number, index = divmod(number, self.per_epoch)
        epoch = self._epoch(number)
        start = int(epoch.windows[index]) * self.seq_length
        return self._row(epoch, start, start + self.seq_length + 1)

    def in_order(self, index: int) -> Row:
        """Window `index` of the text as it lies on disk; the last one may be shorter."""
        start = index * self.seq_length
        return self._row(self._epoch(-1), start, min(start + self.seq_length + 1, self.dataset.tokens))

    def _row(self, epoch: _Epoch, start: int, stop: int) -> Row:
        """Tokens start .. stop - 1 of an epoch's stream; DataError for an id outside the vocabulary."""
        tokens = np.empty(stop - start, np.int64)
        starts = np.zeros(stop - start, bool)
        at, place = start, int(np.searchsorted(epoch.ends, start, side="right"))
        while at < stop:
            document, end = int(epoch.documents[place]), int(epoch.ends[place])
            begin = end - int(self.dataset.lengths[document])
            upto = min(stop, end)
            tokens[at - start : upto - start] = self.dataset.read(document, at - begin, upto - begin)
            starts[at - start] = at == begin
            self.dataset.check_ids(tokens[at - start : upto - start], document)
            at, place = upto, place + 1
        return row_of(tokens, starts, self.document_mask)

    def _make_epoch(self, number: int) -> _Epoch:
        count = len(self.dataset)
        if number < 0:
            documents, windows = np.arange(count), np.arange(self.per_epoch)
        else:
            documents = permutation(count, stable_key(self.seed, self.name, number, "documents"))
            windows = permutation(self.per_epoch, stable_key(self.seed, self.name, number, "windows"))
        return _Epoch(documents, np.cumsum(self.dataset.lengths[documents]), windows)
