"""One optimizer step: micro-batches forward and backward, one normaliser for all of them, then AdamW.

The objective of a step does not depend on how its samples are spread over ranks and micro-batches m:

    L = sum_m [ sum of token losses of m ] / N  +  sum_m (n_m / n) * [ aux_coef * balance_m + z_coef * z_m ]

N counts the labelled tokens and n the routed tokens of the whole global batch. Dense and expert gradients therefore
share one divisor, and ragged micro-batches weigh as much as they hold.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from moe_engine.config import Model
from moe_engine.data.loader import Batch
from moe_engine.model.loss import IGNORE
from moe_engine.model.moe import Router
from moe_engine.model.router_losses import RouterStats, router_loss, total_balance, total_z, unpack_stats
from moe_engine.parallel.collectives import gather_rows, sum_
from moe_engine.parallel.mesh import Mesh
from moe_engine.train.engine import Engine, StepOutcome


class StepReport(NamedTuple):
    """What one step measured, equal on all ranks. Losses in nats; loads are shares of assignments, per MoE layer,
    and per attention MoE layer in attention_load_NE.

    aux_loss follows its own name's convention, aux_loss_hf is transformers' (top-k at uniform routing, layers pooled);
    both, like z_loss, are logged before their coefficients. domain_loss_D is nan for a domain without tokens.
    """

    loss: float
    lm_loss: float
    aux_loss: float
    aux_loss_hf: float
    z_loss: float
    grad_norm: float
    tokens: int
    load_NE: Tensor
    attention_load_NE: Tensor
    dropped_N: Tensor
    domain_loss_D: Tensor
    skipped: str | None  # why the step was skipped: rank and parameter


class Tally:
    """Sums over the micro-batches of one step, then over data ranks; fp64, so that the layout does not show."""

    def __init__(self, config: Model, domains: int, device: torch.device):
        self.config = config
        routers = config.num_moe_layers + config.num_attention_moe_layers
        self.shapes = [(4,), (domains, 2), (routers, config.router_columns), (routers,)]
        sizes = [math.prod(shape) for shape in self.shapes]
        self.flat = torch.zeros(sum(sizes), dtype=torch.float64, device=device)
        parts = (part.view(shape) for part, shape in zip(self.flat.split(sizes), self.shapes, strict=True))
        self.scalars, self.domain_D2, self.count_NE, self.dropped_N = parts

    @torch.no_grad()
    def add(self, batch: Batch, loss: Tensor, loss_T: Tensor, stats: RouterStats, share: float, load: Tensor | None):
        """One micro-batch: its part of the objective, token losses, router statistics, share of the routed tokens."""
        config = self.config
        per_sequence = torch.stack([loss_T.view(batch.labels_BS.shape).sum(1), (batch.labels_BS != IGNORE).sum(1)], 1)
        self.domain_D2.index_add_(0, batch.domain_B, per_sequence.double())
        self.scalars[0] += loss.detach()
        if not len(self.count_NE):
            return
        name = "micro_batch" if config.router_aux_loss == "none" else config.router_aux_loss
        values = (
            total_balance(config, name, stats, load),
            total_balance(config, "hf_mixtral", stats),
            total_z(config, stats),
        )
        self.scalars[1:] += share * torch.stack(values).double()
        self.count_NE += stats.count_NBE.sum(1)
        self.dropped_N += stats.dropped_NB.sum(1)

    def report(self, outcome: StepOutcome, skipped: str | None) -> StepReport:
        """The reduced sums as plain numbers; one transfer to the host."""
        parts = self.flat.cpu().split([math.prod(shape) for shape in self.shapes])
        scalars, domain_D2, count_NE, dropped_N = (p.view(s) for p, s in zip(parts, self.shapes, strict=True))
        loss, aux, aux_hf, z = scalars.tolist()
        lm_sum, tokens = domain_D2.sum(0).tolist()
        domain_loss_D = domain_D2[:, 0] / domain_D2[:, 1]
        norm = outcome.grad_norm
        lm_loss = lm_sum / tokens if tokens else math.nan
        losses, loads = (loss, lm_loss, aux, aux_hf, z, norm, int(tokens)), self.by_kind(load_share(count_NE))
        return StepReport(*losses, *loads, dropped_N[: self.config.num_moe_layers], domain_loss_D, skipped)

    def by_kind(self, x_NE: Tensor) -> tuple[Tensor, Tensor]:
        """The rows of the feed-forward routers and of the attention routers, each as wide as its experts."""
        config, first = self.config, self.config.num_moe_layers
        return x_NE[:first, : config.num_local_experts], x_NE[first:, : config.num_attention_experts]


def train_step(
    engine: Engine, config: Model, mesh: Mesh, batches: list[Batch], lr: float, domains: int = 1
) -> StepReport:
    """One step on this data rank's micro-batches (already on the device); collective over all ranks."""
    tally = accumulate(engine, config, mesh, batches, domains)
    return finish(engine, config, mesh, batches, tally, lr)


def accumulate(engine: Engine, config: Model, mesh: Mesh, batches: list[Batch], domains: int = 1) -> Tally:
    """Forward and backward of every micro-batch; the gradients are then complete, the weights untouched."""
    device = batches[0].tokens_BS.device
    counts = [
        torch.stack([(b.labels_BS != IGNORE).sum(), torch.tensor(b.tokens_BS.numel(), device=device)]) for b in batches
    ]
    labelled, routed = sum_(torch.stack(counts).sum(0), mesh.data).tolist()
    by_global_load = config.router_aux_loss == "global_batch"
    load_NE = global_load(engine, mesh, batches) if by_global_load and len(batches) > 1 else None
    tally = Tally(config, domains, device)
    for i, batch in enumerate(batches):
        loss_T, packed = engine.forward(batch.tokens_BS, batch.positions_BS, batch.labels_BS)
        stats = unpack_stats(packed)
        if by_global_load and load_NE is None:
            load_NE = load_share(sum_(stats.count_NBE.sum(1), mesh.data))
        share = batch.tokens_BS.numel() / routed
        loss = loss_T.sum() / labelled + share * router_loss(config, stats, load_NE)
        tally.add(batch, loss, loss_T, stats, share, load_NE)
        engine.backward(poison_if_not_finite(loss), last=i == len(batches) - 1)
    return tally


def finish(engine: Engine, config: Model, mesh: Mesh, batches: list[Batch], tally: Tally, lr: float) -> StepReport:
    """Clip and step, or skip on all ranks; reduce and report what was measured."""
    finite = bool(tally.flat[0].isfinite())
    sum_(tally.flat, mesh.data)
    outcome = engine.step(lr)
    why = why_skipped(engine, config, mesh, batches, tally, finite) if outcome.skipped else None
    report = tally.report(outcome, why)
    if config.expert_bias_update_rate and not outcome.skipped:
        move_expert_biases(engine.routers, tally.by_kind(tally.count_NE)[0], config.expert_bias_update_rate)
    return report


@torch.no_grad()
def global_load(engine: Engine, mesh: Mesh, batches: Iterable[Batch]) -> Tensor:
    """f_NE of the whole global batch, by a forward pass of every micro-batch before the first backward.

    With accumulation the exact global balancing loss needs the counts of micro-batches that have not run yet; the pass
    costs about a third of a step. The random state is put back, so that router jitter draws the same noise twice.
    """
    with torch.random.fork_rng(devices=[engine.device] if engine.device.type == "cuda" else []):
        counts = sum(
            unpack_stats(engine.forward(b.tokens_BS, b.positions_BS, b.labels_BS)[1]).count_NBE.sum(1) for b in batches
        )
    assert isinstance(counts, Tensor)
    return load_share(sum_(counts, mesh.data))


def load_share(count_NE: Tensor) -> Tensor:
    """Assignment counts -> shares that sum to 1 in every layer."""
    return count_NE / count_NE.sum(1, keepdim=True).clamp(min=1)


def poison_if_not_finite(loss: Tensor) -> Tensor:
    """A loss that is not finite makes all of its gradients nan, so that every rank skips the step."""
    return loss * torch.where(loss.detach().isfinite(), 1.0, math.nan)


def why_skipped(engine: Engine, config: Model, mesh: Mesh, batches: list[Batch], tally: Tally, finite: bool) -> str:
    """One line that names the ranks and parameters behind a skipped step; collective over all ranks.

    finite: whether this rank's loss was. If every rank's loss is finite the micro-batches are differentiated once more,
    without touching the engine's gradients: a healthy step pays nothing for the names. Of several bad gradients of a
    rank the one nearest to the loss is named: backward met it first.
    """
    if not tally.domain_D2[:, 1].sum():
        return "no token of the global batch has a label"
    loss_is_bad = gather_rows(torch.tensor([0 if finite else 1], device=engine.device), mesh.world).tolist()
    if any(loss_is_bad):
        return "not finite: the loss on rank " + ", ".join(str(rank) for rank, bad in enumerate(loss_is_bad) if bad)
    if not engine.whole:
        return "not finite: a gradient (ZeRO 3 keeps no whole weights to say which)"
    names = list(engine.names.values())
    bad = bad_gradients(engine, config, batches, load_share(tally.count_NE).float())
    mine = torch.tensor([[bad[-1] if bad else -1, len(bad)]], device=engine.device)
    found = [
        f"the gradient of {names[first]} on rank {rank}" + (f" (and {count - 1} more)" if count > 1 else "")
        for rank, (first, count) in enumerate(gather_rows(mine, mesh.world).tolist())
        if count
    ]
    return "not finite: " + ("; ".join(found) or "the gradient norm; computed again, every gradient is finite")


def bad_gradients(engine: Engine, config: Model, batches: list[Batch], load_NE: Tensor) -> list[int]:
    """Places in `engine.names` of the parameters whose gradient on this rank, before any reduction, is not finite.

    The model runs on stand-ins of its weights, whose gradients are looked at and freed one by one: DeepSpeed sees none
    of it, and the pass needs no more memory than a step.
    """
    bad: set[int] = set()

    def stand_in(i: int, parameter: Tensor) -> Tensor:
        twin = parameter.detach().requires_grad_()
        for hook in (parameter._backward_hooks or {}).values():  # what acts on the weight's gradient acts here too
            twin.register_hook(hook)

        def look(twin: Tensor) -> None:
            if twin.grad is not None and not bool(twin.grad.isfinite().all()):
                bad.add(i)
            twin.grad = None

        twin.register_post_accumulate_grad_hook(look)
        return twin

    for batch in batches:
        twins = {name: stand_in(i, p) for i, (p, name) in enumerate(engine.names.items())}
        inputs = (batch.tokens_BS, batch.positions_BS, batch.labels_BS)
        loss_T, packed = torch.func.functional_call(engine.model, twins, inputs)
        (loss_T.sum() + router_loss(config, unpack_stats(packed), load_NE)).backward()
    return sorted(bad)


@torch.no_grad()
def move_expert_biases(routers: list[Router], count_NE: Tensor, rate: float) -> None:
    """b_e += rate * sign(mean count - count_e), once per step, from the global counts (arXiv 2408.15664)."""
    for router, count_E in zip(routers, count_NE, strict=True):
        assert router.expert_bias is not None
        short_E = torch.sign(count_E.sum() - len(count_E) * count_E)  # whole numbers: exactly 0 when balanced
        router.expert_bias += rate * short_E.to(router.expert_bias)


@torch.no_grad()
def evaluate(engine: Engine, mesh: Mesh, batches: Iterable[Batch]) -> float:
    """Mean loss per labelled token over held-out batches of all data ranks, in nats."""
    engine.eval()
    total = torch.zeros(2, dtype=torch.float64, device=engine.device)
    for batch in batches:
        loss_T, _ = engine.forward(batch.tokens_BS, batch.positions_BS, batch.labels_BS)
        total += torch.stack([loss_T.double().sum(), (batch.labels_BS != IGNORE).sum().double()])
    engine.train()
    loss, tokens = sum_(total, mesh.data).tolist()
    return loss / tokens if tokens else math.nan
