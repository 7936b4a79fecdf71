"""Why a step was skipped, the post-mortem of a loss or gradient that is not finite, and how many end a run.

A healthy step pays nothing.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_engine.data.loader import Batch
from moe_engine.errors import EngineError
from moe_engine.labels import IGNORE
from moe_engine.model.router_losses import load_share
from moe_engine.parallel.collectives import gather_rows, sum_
from moe_engine.parallel.mesh import Mesh
from moe_engine.train.engine import Engine
from moe_engine.train.terms import Term

MAX_SKIPPED = 5  # skipped steps in a row that stop a run


def too_many_skipped(step: int, why: str | None) -> EngineError:
    """What ends a run whose last MAX_SKIPPED steps, up to `step`, were skipped."""
    return EngineError(
        f"{MAX_SKIPPED} steps in a row were skipped, the last because {why}; the weights are still those of step "
        f"{step - MAX_SKIPPED}. Lower --lr, or look at the data of these steps"
    )


def why_skipped(engine: Engine, terms: Sequence[Term], mesh: Mesh, batches: Sequence[Batch], finite: bool) -> str:
    """One line that names the ranks and parameters behind a skipped step; collective over all ranks.

    finite: whether this rank's loss was. If every rank's loss is finite the micro-batches are differentiated once more,
    without touching the engine's gradients. Of several bad gradients of a rank the one nearest to the loss is named:
    backward met it first.
    """
    labelled = torch.stack([(batch.labels_BS != IGNORE).sum() for batch in batches]).sum()
    if not sum_(labelled, mesh.data):
        return "no token of the global batch has a label"
    loss_is_bad = gather_rows(torch.tensor([0 if finite else 1], device=engine.device), mesh.world).tolist()
    if any(loss_is_bad):
        return "not finite: the loss on rank " + ", ".join(str(rank) for rank, bad in enumerate(loss_is_bad) if bad)
    if not engine.whole:
        return "not finite: a gradient (ZeRO 3 keeps no whole weights to say which)"
    names = list(engine.names.values())
    bad = bad_gradients(engine, terms, batches)
    mine = torch.tensor([[bad[-1] if bad else -1, len(bad)]], device=engine.device)
    found = [
        f"the gradient of {names[first]} on rank {rank}" + (f" (and {count - 1} more)" if count > 1 else "")
        for rank, (first, count) in enumerate(gather_rows(mine, mesh.world).tolist())
        if count
    ]
    return "not finite: " + ("; ".join(found) or "the gradient norm; computed again, every gradient is finite")


def bad_gradients(engine: Engine, terms: Sequence[Term], batches: Sequence[Batch]) -> list[int]:
    """Places in `engine.names` of the parameters whose gradient on this rank, before any reduction, is not finite.

    The model runs on stand-ins of its weights, whose gradients are looked at and freed one by one: the engine sees none
    of it, and the pass needs no more memory than a step. Divisors and the global load are those of the micro-batch: the
    question is what is finite.
    """
    bad: set[int] = set()

    def stand_in(i: int, parameter: Tensor) -> Tensor:
        """A leaf on the memory of the i-th parameter, with its hooks; i goes to `bad` if its gradient is not finite."""
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
        output = torch.func.functional_call(engine.model, twins, inputs)
        load = [load_share(stats.count_NBE.sum(1)) for stats in output.stats]
        minimised = [term for term in terms if term.coefficient]
        parts = [t.coefficient * t.total(batch, output, load) / max(int(t.count(batch)), 1) for t in minimised]
        torch.stack(parts).sum().backward()
    return sorted(bad)
