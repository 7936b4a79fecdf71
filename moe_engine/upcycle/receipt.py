"""An upcycled model against its parent on the same tokens: how far the logits are apart, and what theory says of it."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import NamedTuple

import torch
from torch import Tensor

from moe_engine.model.transformer import Transformer
from moe_engine.upcycle.preservation import Preservation

UNSTATED = Preservation("nothing is known of this method")


class Receipt(NamedTuple):
    """max, mean: of |difference| of the logits; largest: |logit| of the parent; argmax_agreement: share of tokens."""

    max: float
    mean: float
    argmax_agreement: float
    largest: float
    expected: str
    bound: float | None = None

    @property
    def holds(self) -> bool:
        """False if theory gives a bound, relative to the largest logit, and the model misses it."""
        return self.bound is None or self.max <= self.bound * self.largest


@torch.no_grad()
def receipt(parent: Transformer, child: Transformer, tokens_BS: Tensor, expected: Preservation = UNSTATED) -> Receipt:
    """Both on tokens_BS (int64) in fp32 and without router noise, on one rank: one pass of each over all layers, then
    the logits of one sequence at a time."""
    positions_BS = torch.arange(tokens_BS.shape[1], device=tokens_BS.device).expand_as(tokens_BS)
    worst, largest = torch.zeros(()), torch.zeros(())  # torch's maximum keeps a NaN, Python's loses it
    total, agree, elements = 0.0, 0, 0
    with _still(parent) as before, _still(child) as after:
        theirs_TD, ours_TD = (model.hidden(tokens_BS, positions_BS)[0] for model in (before, after))
        for theirs_SD, ours_SD in zip(theirs_TD.split(tokens_BS.shape[1]), ours_TD.split(tokens_BS.shape[1])):
            theirs, ours = before.head(theirs_SD), after.head(ours_SD)
            difference = (ours - theirs).abs()
            worst = worst.maximum(difference.max().cpu())
            largest = largest.maximum(theirs.abs().max().cpu())
            total, elements = total + float(difference.double().sum()), elements + difference.numel()
            agree += int((ours.argmax(dim=1) == theirs.argmax(dim=1)).sum())
    return Receipt(float(worst), total / elements, agree / tokens_BS.numel(), float(largest), *expected)


@contextmanager
def _still(model: Transformer) -> Iterator[Transformer]:
    """The model in evaluation mode and fp32: itself, put back afterwards, or a copy if it has another dtype."""
    trains = model.training
    wide = model if all(p.dtype == torch.float32 for p in model.parameters()) else deepcopy(model).float()
    wide.eval()
    try:
        yield wide
    finally:
        wide.train(trains)
