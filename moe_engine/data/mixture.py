"""Which domain the next sample comes from: shares follow the weights closely, without a fixed pattern.

Each draw adds weight d to the credit of every domain d (weights sum to 1), takes the domain whose credit plus a seeded
dither in [0, 1) is largest, ties to the lowest index, and takes 1 from its credit. Credits sum to 0 and stay small, so
the counts differ from the weights by a few draws in all, however long the run; the dither keeps a domain from always
falling on the same rank. Weights may change at any time: the new ones are followed from the next draw on.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from moe_engine.data.order import hash64, permutation, stable_key
from moe_engine.errors import ConfigError


class Mixture:
    """An endless sequence of (domain, how many samples it gave before), a function of weights and seed alone."""

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        self.key = stable_key(seed, "mixture")
        self.counts = [0] * len(weights)
        self.credits = [0.0] * len(weights)
        self.weights = normalised(weights)

    def draw(self, count: int) -> list[tuple[int, int]]:
        """The next `count` draws."""
        domains = range(len(self.counts))
        first = sum(self.counts) * len(self.counts)
        dither = hash64(np.arange(first, first + count * len(self.counts), dtype=np.uint64), self.key)
        rows = ((dither >> np.uint64(11)) * 2.0**-53).reshape(count, len(self.counts)).tolist()
        drawn = []
        for row in rows:
            for d in domains:
                self.credits[d] += self.weights[d]
            chosen = max((d for d in domains if self.weights[d] > 0), key=lambda d: self.credits[d] + row[d])
            drawn.append((chosen, self.counts[chosen]))
            self.counts[chosen] += 1
            self.credits[chosen] -= 1.0
        return drawn

    def set_weights(self, weights: Sequence[float]) -> None:
        """New weights from the next draw on; what was owed under the old ones is dropped."""
        if len(weights) != len(self.counts):
            raise ValueError(f"{len(weights)} weights for {len(self.counts)} domains")
        self.weights = normalised(weights)
        self.credits = [0.0] * len(weights)

    def state(self) -> dict[str, Any]:
        """What the next draws depend on, apart from the seed; JSON-able."""
        return {"counts": list(self.counts), "credits": list(self.credits), "weights": list(self.weights)}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a `state`, with its weights. The seed has to be the same for the same draws."""
        self.counts, self.credits = [int(n) for n in state["counts"]], [float(c) for c in state["credits"]]
        self.weights = [float(w) for w in state["weights"]]


def normalised(weights: Sequence[float]) -> list[float]:
    """Weights that sum to 1; ConfigError for a negative or non-finite one, or none above 0."""
    if not weights or any(not math.isfinite(w) or w < 0 for w in weights) or sum(weights) <= 0:
        raise ConfigError(f"domain weights {list(weights)}: expected numbers >= 0, at least one above 0")
    return [w / sum(weights) for w in weights]


class Epochs:
    """Every window of every domain once an epoch, in an order of its own; a draw ends where the epoch does.

    sizes: windows of each domain. The counterpart of `Mixture` for runs that count epochs.
    """

    def __init__(self, sizes: Sequence[int], seed: int) -> None:
        self.sizes, self.seed = list(sizes), seed
        self.epoch = self.used = 0
        self.domain = np.repeat(np.arange(len(sizes)), sizes)
        self.index = np.concatenate([np.arange(size) for size in sizes])
        self._order = lru_cache(maxsize=1)(self._shuffle)

    def draw(self, count: int) -> list[tuple[int, int]]:
        """The next `count` (domain, number of its window) of the epoch, or what is left of it."""
        if self.used == len(self.domain):
            self.epoch, self.used = self.epoch + 1, 0
        chosen = self._order(self.epoch)[self.used : self.used + count]
        self.used += len(chosen)
        domains = self.domain[chosen].tolist()
        return [(d, self.epoch * self.sizes[d] + int(i)) for d, i in zip(domains, self.index[chosen])]

    def steps(self, epochs: int, global_batch: int) -> int:
        """Steps of so many epochs; the last of each may be smaller."""
        return epochs * math.ceil(len(self.domain) / global_batch)

    def state(self) -> dict[str, Any]:
        """Where the next draw begins; JSON-able."""
        return {"epoch": self.epoch, "used": self.used}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a `state`."""
        self.epoch, self.used = int(state["epoch"]), int(state["used"])

    def _shuffle(self, epoch: int) -> np.ndarray:
        return permutation(len(self.domain), stable_key(self.seed, "epochs", epoch))
