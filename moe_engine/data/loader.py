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

from moe_engine.data.mixture import Epochs, Mixture, normalised
from moe_engine.data.order import TextOrder
from moe_engine.data.packing import PackedOrder
from moe_engine.data.row import EMPTY, NO_LABEL, Row, stacked
from moe_engine.data.shards import TokenDataset, read_data_manifest
from moe_engine.errors import ConfigError, DataError


class Batch(NamedTuple):
    """One micro-batch on this data rank, int64 on the CPU. Labels are shifted already; -100 is not counted."""

    tokens_BS: torch.Tensor
    labels_BS: torch.Tensor
    positions_BS: torch.Tensor
    domain_B: torch.Tensor
    expert_label_BS: torch.Tensor  # what supervised routing reads; -1: none

    def to(self, device: torch.device) -> "Batch":
        """The same batch on `device`."""
        return Batch(*(field.to(device, non_blocking=True) for field in self))


def plain_batch(tokens_BS: torch.Tensor, labels_BS: torch.Tensor, positions_BS: torch.Tensor) -> Batch:
    """A batch of one domain, without expert labels."""
    none = torch.full_like(labels_BS, NO_LABEL)
    return Batch(tokens_BS, labels_BS, positions_BS, labels_BS.new_zeros(len(labels_BS)), none)


Order = TextOrder | PackedOrder
ROUTING_LABELS = ("factual_lookup", "numerical_reasoning", "multi_hop_reasoning", "commonsense_reasoning")


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

    A folder with several domains gives the one called `name`, or all of them if none is, sharing `weight` as the folder
    says or else by their tokens. DataError if a folder holds ids >= `vocab_size`.
    """
    opened = []
    for name, path, weight in domains:
        folder = Path(path)
        manifest = read_data_manifest(folder)
        inside = list(manifest["domains"])
        if name in inside or len(inside) == 1:
            inside = [name if name in inside else inside[0]]
        total = sum(manifest["domains"][d]["splits"]["train"]["tokens"] for d in inside)
        weighed = all("weight" in manifest["domains"][d] for d in inside)
        for domain in inside:
            entry = manifest["domains"][domain]
            share = entry["weight"] if weighed else entry["splits"]["train"]["tokens"] / total
            share = share if len(inside) > 1 else 1.0
            called = domain if len(inside) > 1 else name
            opened.append(OpenDomain(called, weight * share, TokenDataset(folder, domain, split, vocab_size)))
    names = [domain.name for domain in opened]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"data domains: the name {', '.join(repeated)} is used twice; give each domain its own name")
    return opened


def orders_of(
    domains: Sequence[OpenDomain], seq_length: int, seed: int, document_mask: bool, packing: str, shuffle: bool = True
) -> list[Order]:
    """The windows of each domain: of text, cut from its stream; of samples, whole ones packed together, or each alone
    with `packing` "none". ConfigError for "windows" on samples, whose masks it would not see, and the reverse."""
    names = expert_labels(domains)
    orders: list[Order] = []
    for name, _, dataset in domains:
        if packing == "auto" or (packing == "windows") != dataset.samples:
            options = {"pack": packing != "none", "shuffle": shuffle}
            places = [names.index(label) for label in dataset.expert_labels]
            if dataset.samples:
                orders.append(PackedOrder(dataset, seq_length, seed, name, **options, expert_label=places))
            else:
                orders.append(TextOrder(dataset, seq_length, seed, name, document_mask))
        else:
            kind, right = ("samples", "samples or none") if dataset.samples else ("text", "windows")
            raise ConfigError(f"data.packing: found {packing}, expected auto or {right}: domain {name} holds {kind}")
    return orders


def expert_labels(domains: Sequence[OpenDomain]) -> list[str]:
    """The labels that samples of any domain carry, which `Batch.expert_label_BS` indexes: sorted, but that the four of
    supervised Mixtral keep their order there (S1.23)."""
    found = {name for domain in domains for name in domain.dataset.expert_labels}
    return [name for name in ROUTING_LABELS if name in found] if found <= {*ROUTING_LABELS} else sorted(found)


class Loader:
    """Iterating gives, for each step, the list of `accumulation` Batches of this data rank; it never ends.

    `domains` lists the names that `domain_B` indexes, `expert_labels` those of `expert_label_BS`. epochs: every window
    of every domain once an epoch, whatever the weights; the last batch of an epoch may be smaller. `state()` is
    JSON-able; `load_state()` goes on with the next step, also within an epoch, on another layout or, without `epochs`,
    with another global batch. DataError where the text is too short.
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
        packing: str = "auto",
        epochs: bool = False,
        start_step: int = 0,
    ) -> None:
        self.domains = [domain.name for domain in domains]
        self.seed, self.seq_length, self.document_mask = seed, seq_length, document_mask
        self.packing = packing
        self.micro_batch, self.accumulation = micro_batch, accumulation
        self.data_rank, self.data_size = data_rank, data_size
        self.global_batch = micro_batch * accumulation * data_size
        self.orders = orders_of(domains, seq_length, seed, document_mask, packing)
        weights, sizes = [domain.weight for domain in domains], [order.per_epoch for order in self.orders]
        self.expert_labels = expert_labels(domains)
        self._check_sizes(None if epochs else normalised(weights))
        self.draws = Epochs(sizes, seed) if epochs else Mixture(weights, seed)
        self.step = start_step
        self.draws.draw(start_step * self.global_batch)

    def __iter__(self) -> Iterator[list[Batch]]:
        while True:
            yield self.next_step()

    def next_step(self) -> list[Batch]:
        """The micro-batches of the next step."""
        drawn = self.draws.draw(self.global_batch)
        self.step += 1
        batches = []
        for a in range(self.accumulation):
            first = (a * self.data_size + self.data_rank) * self.micro_batch
            mine = drawn[first : first + self.micro_batch]
            rows = [self.orders[domain].row(number) for domain, number in mine]
            batches.append(self._batch(rows, [domain for domain, _ in mine]))
        return batches

    def set_weights(self, weights: Sequence[float]) -> None:
        """Changes the shares of the domains from the next step on (all ranks alike)."""
        assert isinstance(self.draws, Mixture), "a run that counts epochs has no weights"
        self.draws.set_weights(weights)

    def _batch(self, rows: list[Row], domains: list[int]) -> Batch:
        missing = self.micro_batch - len(rows)
        return batch_of(rows + [EMPTY] * missing, domains + [0] * missing, self.orders, self.seq_length)

    def state(self) -> dict[str, Any]:
        """Everything that decides the following steps."""
        datasets = [order.dataset.fingerprint for order in self.orders]
        identity = {"seed": self.seed, "seq_length": self.seq_length, "domains": self.domains, "datasets": datasets}
        kind = {"packing": self.packing} if any(isinstance(o, PackedOrder) for o in self.orders) else {}
        if isinstance(self.draws, Mixture):
            return {"step": self.step, **identity, **kind, "mixture": self.draws.state()}
        return {"step": self.step, **identity, **kind, "global_batch": self.global_batch, "epochs": self.draws.state()}

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
        self.draws.load_state(state["mixture" if isinstance(self.draws, Mixture) else "epochs"])

    def _check_sizes(self, weights: Sequence[float] | None) -> None:
        for name, order, weight in zip(self.domains, self.orders, weights or [0.0] * len(self.orders)):
            if order.per_epoch == 0 and isinstance(order, PackedOrder):
                raise DataError(
                    f"domain {name}: none of its {len(order.dataset)} samples has a label among its first "
                    f"{self.seq_length} tokens; raise --seq-length, or look at it with tools/prepare_data.py preview"
                )
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
    kinds = ["epochs" if "epochs" in state else "steps" for state in (saved, here)]
    saved, here = ({"packing": "auto", **state, "length": kind} for state, kind in zip((saved, here), kinds))
    names = {"domains": "data.domains", "packing": "data.packing", "length": "what the run counts"}
    for key in ("seed", "seq_length", "domains", "packing", "length", "global_batch"):
        if saved.get(key) != here.get(key):
            name = names.get(key, f"train.{key}")
            raise ConfigError(
                f"{name}: found {here.get(key)}, and {saved.get(key)} in the checkpoint; resume with the same, or give "
                "--init-from CHECKPOINT with another --out"
            )


def batch_of(rows: Sequence[Row], domains: Sequence[int], orders: Sequence[Order], seq_length: int) -> Batch:
    """Rows stacked as row.stacked says, with the domain of each."""
    *text, expert_label = stacked(rows, seq_length, [orders[d].restarts for d in domains])
    return Batch(*map(torch.from_numpy, (*text, np.asarray(domains, np.int64), expert_label)))


def eval_batches(
    domains: Sequence[OpenDomain],
    *,
    seq_length: int,
    micro_batch: int,
    data_rank: int = 0,
    data_size: int = 1,
    document_mask: bool = True,
    packing: str = "auto",
    limit: int | None = None,
) -> Iterator[Batch]:
    """The held-out text once, in a fixed order that mixes the domains evenly, cut over the data ranks.

    Every token but the first of a domain is a label at most once. All ranks get the same number of batches (`limit` at
    most): where samples run out the rows are filled with labels of -100, which count nothing.
    """
    orders = orders_of(domains, seq_length, 0, document_mask, packing, shuffle=False)
    sizes = [order.held_out for order in orders]
    places = [((i + 0.5) / size, d, i) for d, size in enumerate(sizes) for i in range(size)]
    samples = [(d, i) for _, d, i in sorted(places)]
    per_batch = micro_batch * data_size
    count = math.ceil(len(samples) / per_batch)
    for batch in range(count if limit is None else min(count, limit)):
        first = batch * per_batch + data_rank * micro_batch
        mine = samples[first : first + micro_batch]
        missing = micro_batch - len(mine)
        rows = [orders[d].in_order(i) for d, i in mine] + [EMPTY] * missing
        yield batch_of(rows, [d for d, _ in mine] + [0] * missing, orders, seq_length)
