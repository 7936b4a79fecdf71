"""Windows of text, mixed over domains and cut for this data rank: the batches of every step.

Sample n of the run is one window of one domain (mixture.py says which, order.py what it holds). Step s takes samples
[s*G, (s+1)*G), G = data_size * accumulation * micro_batch; micro-batch a of data rank r takes the samples
s*G + (a*data_size + r)*micro_batch + j. So the layout cuts the sequence and never changes it: no sample is read twice.

    tokens      t0 t1 E  u0 u1      E ends a document and is predicted (label of t1)
    labels      t1 E  -  u1 ...     with document_mask the label of E is -100: u0 is not predicted across the border
    positions   0  1  2  0  1       with document_mask they restart at each document, and at the window's start
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from moe_engine.data.mixture import Mixture
from moe_engine.data.order import SampleOrder, Window
from moe_engine.data.shards import TokenDataset, read_data_manifest
from moe_engine.errors import ConfigError, DataError
from moe_engine.labels import IGNORE


class Batch(NamedTuple):
    """One micro-batch on this data rank, int64 on the CPU. Labels are shifted already; -100 is not counted."""

    tokens_BS: torch.Tensor
    labels_BS: torch.Tensor
    positions_BS: torch.Tensor
    domain_B: torch.Tensor

    def to(self, device: torch.device) -> "Batch":
        """The same batch on `device`."""
        return Batch(*(field.to(device, non_blocking=True) for field in self))


class OpenDomain(NamedTuple):
    """A domain ready to be read; `weight` is as given, not normalised."""

    name: str
    weight: float
    dataset: TokenDataset


def open_domains(
    domains: Sequence[tuple[str, str, float]],
    split: str = "train",
    vocab_size: int | None = None,
) -> list[OpenDomain]:
    """Opens (name, path, weight) triples, `path` a folder made by prepare_data.

    A folder with several domains gives the one called `name`, or all of them, sharing `weight` by their tokens, if none
    is. DataError if a folder holds ids >= `vocab_size`.
    """
    opened = []
    for name, path, weight in domains:
        folder = Path(path)
        manifest = read_data_manifest(folder)
        inside = list(manifest["domains"])
        if name in inside or len(inside) == 1:
            inside = [name if name in inside else inside[0]]
        total = sum(manifest["domains"][d]["splits"]["train"]["tokens"] for d in inside)
        for domain in inside:
            share = manifest["domains"][domain]["splits"]["train"]["tokens"] / total if len(inside) > 1 else 1.0
            called = domain if len(inside) > 1 else name
            opened.append(OpenDomain(called, weight * share, TokenDataset(folder, domain, split, vocab_size)))
    names = [domain.name for domain in opened]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"data domains: the name {', '.join(repeated)} is used twice; give each domain its own name")
    return opened


class Loader:
    """Iterating gives, for each step, the list of `accumulation` Batches of this data rank; it never ends.

    `domains` lists the names that `domain_B` indexes. `state()` is JSON-able; `load_state()` goes on with the next
    step, also within an epoch, on another layout or with another global batch. DataError where the text is too short.
    """

    def __init__(
        self,
        domains: Sequence[OpenDomain],
        *,
        seed: int,
        seq_length: int,
        micro_batch: int,
        accumulation: int = 1,
        data_rank: int = 0,
        data_size: int = 1,
        document_mask: bool = True,
        start_step: int = 0,
    ) -> None:
        self.domains = [domain.name for domain in domains]
        self.seed, self.seq_length, self.document_mask = seed, seq_length, document_mask
        self.micro_batch, self.accumulation = micro_batch, accumulation
        self.data_rank, self.data_size = data_rank, data_size
        self.global_batch = micro_batch * accumulation * data_size
        self.orders = [SampleOrder(domain.dataset, seq_length, seed, domain.name) for domain in domains]
        self.mixture = Mixture([domain.weight for domain in domains], seed)
        self._check_sizes()
        self.step = start_step
        self.mixture.draw(start_step * self.global_batch)

    def __iter__(self) -> Iterator[list[Batch]]:
        while True:
            yield self.next_step()

    def next_step(self) -> list[Batch]:
        """The micro-batches of the next step."""
        drawn = self.mixture.draw(self.global_batch)
        self.step += 1
        batches = []
        for a in range(self.accumulation):
            first = (a * self.data_size + self.data_rank) * self.micro_batch
            mine = drawn[first : first + self.micro_batch]
            windows = [self.orders[domain].window(sample) for domain, sample in mine]
            batches.append(_batch(windows, [domain for domain, _ in mine], self.seq_length, self.document_mask))
        return batches

    def set_weights(self, weights: Sequence[float]) -> None:
        """Changes the shares of the domains from the next step on (all ranks alike)."""
        self.mixture.set_weights(weights)

    def state(self) -> dict[str, Any]:
        """Everything that decides the following steps."""
        datasets = [order.dataset.fingerprint for order in self.orders]
        identity = {"seed": self.seed, "seq_length": self.seq_length, "domains": self.domains, "datasets": datasets}
        return {"step": self.step, **identity, "mixture": self.mixture.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continues after the step that `state` was taken at; ConfigError or DataError if that cannot be exact."""
        here = self.state()
        check_order(state, here)
        for name, was, now in zip(self.domains, state["datasets"], here["datasets"]):
            if was != now:
                raise DataError(
                    f"domain {name}: not the tokens the checkpoint was trained on; use the same prepared data"
                )
        self.step = int(state["step"])
        self.mixture.load_state(state["mixture"])

    def _check_sizes(self) -> None:
        for name, order, weight in zip(self.domains, self.orders, self.mixture.weights):
            if order.per_epoch == 0:
                raise DataError(
                    f"domain {name}: {order.dataset.tokens} tokens do not fill one window of {self.seq_length} + 1; "
                    "give it more text or lower --seq-length"
                )
            needed = math.ceil(weight * self.global_batch - 1e-9)
            if order.per_epoch < needed:
                raise DataError(
                    f"domain {name}: has {order.per_epoch} windows of {self.seq_length} tokens, and a step of "
                    f"{self.global_batch} sequences takes {needed} of them; give it more text, or lower "
                    "--global-batch, --seq-length or its weight"
                )


def check_order(saved: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """ConfigError when the samples would come in another order than a checkpoint's: of two states of loaders."""
    for key in ("seed", "seq_length", "domains"):
        if saved[key] != here[key]:
            name = "data.domains" if key == "domains" else f"train.{key}"
            raise ConfigError(
                f"{name}: found {here[key]}, and {saved[key]} in the checkpoint; resume with the same, or give "
                "--init-from CHECKPOINT with another --out"
            )


def _batch(windows: Sequence[Window], domains: Sequence[int], seq_length: int, document_mask: bool) -> Batch:
    """Stacks windows of up to seq_length + 1 tokens; a shorter one is filled up with token 0 that is not counted."""
    size = len(windows), seq_length
    tokens, labels = np.zeros(size, np.int64), np.full(size, IGNORE, np.int64)
    positions = np.tile(np.arange(seq_length), (len(windows), 1))
    for row, (window, starts) in enumerate(windows):
        count = max(len(window) - 1, 0)
        tokens[row, :count] = window[:-1]
        labels[row, :count] = window[1:]
        if document_mask:
            labels[row, :count][starts[1:]] = IGNORE
            begins = np.zeros(seq_length, np.int64)
            begins[:count] = np.where(starts[:-1], np.arange(count), 0)
            if count < seq_length:
                begins[count] = count  # what is filled up is a document of its own
            positions[row] -= np.maximum.accumulate(begins)
    arrays = tokens, labels, positions, np.asarray(domains, np.int64)
    return Batch(*(torch.from_numpy(array) for array in arrays))


def eval_batches(
    domains: Sequence[OpenDomain],
    *,
    seq_length: int,
    micro_batch: int,
    data_rank: int = 0,
    data_size: int = 1,
    document_mask: bool = True,
    limit: int | None = None,
) -> Iterator[Batch]:
    """The held-out text once, in a fixed order that mixes the domains evenly, cut over the data ranks.

    Every token but the first of a domain is a label at most once. All ranks get the same number of batches (`limit` at
    most): where samples run out the rows are filled with labels of -100, which count nothing.
    """
    orders = [SampleOrder(domain.dataset, seq_length, 0, domain.name) for domain in domains]
    sizes = [max(math.ceil((order.dataset.tokens - 1) / seq_length), 0) for order in orders]
    places = [((i + 0.5) / size, d, i) for d, size in enumerate(sizes) for i in range(size)]
    samples = [(d, i) for _, d, i in sorted(places)]
    per_batch = micro_batch * data_size
    count = math.ceil(len(samples) / per_batch)
    nothing = Window(np.empty(0, np.int64), np.empty(0, bool))
    for batch in range(count if limit is None else min(count, limit)):
        first = batch * per_batch + data_rank * micro_batch
        mine = samples[first : first + micro_batch]
        windows = [orders[d].in_order(i) for d, i in mine] + [nothing] * (micro_batch - len(mine))
        yield _batch(windows, [d for d, _ in mine] + [0] * (micro_batch - len(mine)), seq_length, document_mask)
