"""Whole samples packed into windows: no sample is cut by a border, and none sees another.

    window    a0 a1 a2 a3 b0 b1 c0 c1 c2 -      samples a, b, c; what is left over is not counted
    labels    -  a2 a3 a4 -  b2 -  c2 c3 -      a token is predicted where the sample's mask says that it is trained
    positions 0  1  2  3  0  1  0  1  2  0      attention restarts with them

Best fit, longest first: each sample goes where it leaves the least space. A domain is packed once, from an order that
depends on seed and name alone, and its windows are shuffled anew in every epoch.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from moe_engine.data.order import permutation, stable_key
from moe_engine.data.row import NO_LABEL, Row, joined
from moe_engine.data.shards import TokenDataset
from moe_engine.labels import IGNORE


def best_fit(lengths: Sequence[int], size: int) -> list[list[int]]:
    """The indices of `lengths`, all <= size, in windows that hold `size`; equal lengths in their given order."""
    windows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(size + 1)]  # windows by the space that is left, the last on top
    rooms: list[int] = []  # the spaces that some window has, ascending
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        place = bisect_left(rooms, length)
        if place < len(rooms):
            room = rooms[place]
            window = with_room[room].pop()
            if not with_room[room]:
                del rooms[place]
        else:
            room, window = size, len(windows)
            windows.append([])
        windows[window].append(index)
        left = room - length
        if left:
            if not with_room[left]:
                insort(rooms, left)
            with_room[left].append(window)
    return windows


class PackedOrder:
    """Random access to the endless sequence of windows of one domain, as order.TextOrder gives it for text.

    pack: False gives each sample a window of its own. A sample of more than seq_length + 1 tokens is cut at its end;
    `cut` counts them. One without a label, all of it or what is left of it, is left out, and so is the rejected half of
    a pair: it is no example to follow.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        seq_length: int,
        seed: int,
        name: str,
        *,
        pack: bool = True,
        shuffle: bool = True,
        expert_label: Sequence[int] = (),
    ) -> None:
        self.dataset, self.seq_length, self.seed, self.name = dataset, seq_length, seed, name
        self.restarts = True
        self.expert_label = expert_label  # of the dataset's labels, their place among the run's
        taken = np.minimum(dataset.lengths, seq_length + 1)
        self.cut = int((dataset.lengths > seq_length + 1).sum())
        order = permutation(len(dataset), stable_key(seed, name, "packing")) if shuffle else np.arange(len(dataset))
        rejected = dataset.columns.get("rejected", np.zeros(len(dataset), np.int32))
        order = order[(rejected[order] == 0) & (taken[order] > 1)]
        usable = [int(d) for d in order if dataset.trained(int(d), int(taken[d]))[1:].any()]
        lengths = [int(taken[d]) - 1 for d in usable]
        places = best_fit(lengths, seq_length) if pack else [[i] for i in range(len(usable))]
        self.windows = [[usable[i] for i in sorted(window)] for window in places]
        self.samples, self.inputs = len(usable), sum(lengths)
        self.per_epoch = self.held_out = len(self.windows)
        self._shuffled = lru_cache(maxsize=2)(self._shuffle)

    def row(self, number: int) -> Row:
        """Window `number` of the sequence; epoch number // per_epoch."""
        epoch, index = divmod(number, self.per_epoch)
        return self.in_order(int(self._shuffled(epoch)[index]))

    def in_order(self, index: int) -> Row:
        """Window `index` as it was packed."""
        return joined([self.sample(document) for document in self.windows[index]])

    def sample(self, document: int) -> Row:
        """One sample; DataError for an id outside the vocabulary."""
        count = min(int(self.dataset.lengths[document]), self.seq_length + 1)
        tokens = self.dataset.read(document, 0, count).astype(np.int64)
        self.dataset.check_ids(tokens, document)
        labels = np.where(self.dataset.trained(document, count)[1:], tokens[1:], IGNORE)
        given = self.dataset.columns.get("expert_label")
        index = NO_LABEL if given is None else int(given[document])
        label = NO_LABEL if index == NO_LABEL else self.expert_label[index]
        return Row(tokens[:-1], labels, np.arange(count - 1), np.full(count - 1, label))

    def _shuffle(self, epoch: int) -> np.ndarray:
        return permutation(self.per_epoch, stable_key(self.seed, self.name, epoch, "windows"))
