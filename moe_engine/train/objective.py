"""The objective is a sum of terms (terms.py):

    L = sum over terms of  coefficient * (sum over the global batch) / (count over the global batch)

A term's count is known from the batch before any forward pass, so each micro-batch of each rank adds its own part and
nothing depends on how samples are spread over them: ragged micro-batches weigh as much as they hold.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_engine.data.loader import Batch
from moe_engine.model.transformer import Output
from moe_engine.parallel.collectives import sum_
from moe_engine.parallel.mesh import Axis
from moe_engine.train.terms import Term


def global_counts(terms: Sequence[Term], batches: Sequence[Batch], data: Axis) -> list[int]:
    """The divisor of each term: its count over all micro-batches of all data ranks. Collective, one all-reduce."""
    counts = torch.stack([torch.stack([term.count(batch) for term in terms]) for batch in batches])
    return sum_(counts.sum(0), data).tolist()


def objective(
    terms: Sequence[Term], counts: Sequence[int], batch: Batch, output: Output, load: Sequence[Tensor] | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """What one micro-batch adds to the objective, a scalar, and the total of each term by name, detached.

    A count of 0, such as a global batch without labels, makes it nan, which skips the step; of a term that may be
    without labels (`optional`) it adds nothing.
    """
    loss, totals = output.loss_T.new_zeros(()), {}
    for term, count in zip(terms, counts, strict=True):
        total = term.total(batch, output, load)
        totals[term.name] = total.detach()
        if term.coefficient:
            loss = loss + term.coefficient * (total / (max(count, 1) if term.optional else count))
    return loss, totals
