"""Sums of everything that a step measures: over its micro-batches, then over data ranks; fp64, so that the layout does
not show."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from moe_engine.parallel.collectives import sum_
from moe_engine.parallel.mesh import Axis
from moe_engine.train.terms import Measure


class StepReport(NamedTuple):
    """What one step measured, equal on all ranks. loss: the objective. grad_norm: before clipping, nan if skipped.

    measures: of every term by name, fp64 (sums in their own dtype). skipped: why the step was, with rank and parameter.
    """

    loss: float
    grad_norm: float
    measures: dict[str, Tensor]
    skipped: str | None


class Tally:
    """Measures by name. All data ranks add the same names and shapes in the same order."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor] = {}
        self.kinds: dict[str, torch.dtype] = {}  # of measures that are sums

    @torch.no_grad()
    def add(self, measures: Mapping[str, Measure]) -> None:
        """Those of one micro-batch."""
        for name, (total, count) in measures.items():
            self.sums[name] = self.sums.get(name, 0) + total.double()
            if count is None:
                self.kinds[name] = total.dtype
            else:
                self.counts[name] = self.counts.get(name, 0) + count.double()

    def reduce(self, data: Axis) -> None:
        """Add those of the other data ranks; collective, one all-reduce."""
        parts = [*self.sums.values(), *self.counts.values()]
        flat = sum_(torch.cat([part.flatten() for part in parts]), data)
        reduced = iter(part.view(old.shape) for old, part in zip(parts, flat.split([p.numel() for p in parts])))
        self.sums = {name: next(reduced) for name in self.sums}
        self.counts = {name: next(reduced) for name in self.counts}

    def values(self) -> dict[str, Tensor]:
        """The number or tensor of each measure, on the host; nan where nothing was counted."""
        out = {}
        for name, total in self.sums.items():
            count = self.counts.get(name)
            out[name] = (total.to(self.kinds[name]) if count is None else total / count).cpu()
        return out
