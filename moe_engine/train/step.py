"""One optimizer step: `accumulate` (counts, micro-batches forward and backward), then `finish` (AdamW, measures).

Each term of the objective (objective.py) has one divisor for the whole global batch. Dense and expert gradients
therefore share one divisor too, and a step does not depend on how its samples are spread over ranks and micro-batches.
"""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from moe_engine.data.loader import Batch
from moe_engine.model.router import Router
from moe_engine.model.router_losses import load_share
from moe_engine.model.transformer import Output
from moe_engine.parallel.collectives import sum_
from moe_engine.parallel.mesh import Mesh
from moe_engine.train.engine import Engine
from moe_engine.train.objective import global_counts, objective
from moe_engine.train.skipped import why_skipped
from moe_engine.train.tally import StepReport, Tally
from moe_engine.train.terms import Measure, Term


def accumulate(engine: Engine, terms: Sequence[Term], mesh: Mesh, batches: Sequence[Batch]) -> Tally:
    """Forward and backward of this data rank's micro-batches, which are on the device; collective over all ranks.

    The gradients are then complete, the weights untouched.
    """
    counts = global_counts(terms, batches, mesh.data)
    needs_load = any(term.needs_load for term in terms)
    load = global_load(engine, mesh, batches) if needs_load and len(batches) > 1 else None
    tally = Tally()
    for i, batch in enumerate(batches):
        output: Output = engine.forward(batch.tokens_BS, batch.positions_BS, batch.labels_BS)
        if needs_load and load is None:
            load = load_of([stats.count_NBE.sum(1) for stats in output.stats], mesh)
        loss, totals = objective(terms, counts, batch, output, load)
        engine.backward(poison_if_not_finite(loss), last=i == len(batches) - 1)
        with torch.no_grad():
            tally.add({"loss": Measure(loss.detach())})
            tally.add({term.name: Measure(totals[term.name], term.count(batch)) for term in terms})
            for term in terms:
                tally.add(term.measures(batch, output))
    return tally


def finish(
    engine: Engine,
    terms: Sequence[Term],
    mesh: Mesh,
    batches: Sequence[Batch],
    tally: Tally,
    lr: float,
    bias_rate: float = 0.0,
) -> StepReport:
    """Clip and step, or skip on all ranks; reduce and report what was measured.

    bias_rate: of the routers' expert biases, `expert_bias_update_rate`.
    """
    finite = bool(tally.sums["loss"].isfinite())
    tally.reduce(mesh.data)
    outcome = engine.step(lr)
    skipped = why_skipped(engine, terms, mesh, batches, finite) if outcome.skipped else None
    if bias_rate and not skipped:
        move_expert_biases(engine.routers, tally.sums["expert_load"], bias_rate)
    measures = tally.values()
    return StepReport(float(measures.pop("loss")), outcome.grad_norm, measures, skipped)


@torch.no_grad()
def global_load(engine: Engine, mesh: Mesh, batches: Iterable[Batch]) -> list[Tensor]:
    """f_NE of the whole global batch, by a forward pass of every micro-batch before the first backward.

    With accumulation the exact global balancing loss needs the counts of micro-batches that have not run yet; the pass
    costs about a third of a step. The random state is put back, so that router jitter draws the same noise twice.
    """
    with torch.random.fork_rng(devices=[engine.device] if engine.device.type == "cuda" else []):
        outputs = (engine.forward(b.tokens_BS, b.positions_BS, b.labels_BS) for b in batches)
        counts = [[stats.count_NBE.sum(1) for stats in output.stats] for output in outputs]
    return load_of([torch.stack(count).sum(0) for count in zip(*counts)], mesh)


def load_of(counts: Sequence[Tensor], mesh: Mesh) -> list[Tensor]:
    """Assignments of each kind of router on this data rank -> shares of those of all; collective."""
    return [load_share(sum_(count_NE, mesh.data)) for count_NE in counts]


def poison_if_not_finite(loss: Tensor) -> Tensor:
    """A loss that is not finite makes all of its gradients nan, so that every rank skips the step."""
    return loss * torch.where(loss.detach().isfinite(), 1.0, math.nan)


@torch.no_grad()
def move_expert_biases(routers: list[Router], count_NE: Tensor, rate: float) -> None:
    """b_e += rate * sign(mean count - count_e), once per step, from the global counts (arXiv 2408.15664)."""
    for router, count_E in zip(routers, count_NE, strict=True):
        assert router.expert_bias is not None
        short_E = torch.sign(count_E.sum() - len(count_E) * count_E)  # whole numbers: exactly 0 when balanced
        router.expert_bias += rate * short_E.to(router.expert_bias)
