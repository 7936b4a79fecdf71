"""The loss on held-out text."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from moe_engine.config import Run
from moe_engine.data.loader import Batch, OpenDomain, eval_batches
from moe_engine.parallel.mesh import Mesh
from moe_engine.train.engine import Engine
from moe_engine.train.tally import Tally
from moe_engine.train.terms import LanguageModelLoss, Measure


def held_out_batches(
    run: Run, mesh: Mesh, domains: list[OpenDomain], device: torch.device, heartbeat: Callable[[], None]
) -> Iterator[Batch]:
    """The first `eval_batches` global batches of held-out text: the same text on every layout."""
    for batch in eval_batches(
        domains,
        seq_length=run.train.seq_length,
        micro_batch=run.train.micro_batch,
        data_rank=mesh.data.rank,
        data_size=mesh.data.size,
        document_mask=run.data.document_mask,
        packing=run.data.packing,
        limit=run.train.eval_batches * run.train.accumulation,
    ):
        heartbeat()
        yield batch.to(device)


@torch.no_grad()
def evaluate(
    engine: Engine,
    mesh: Mesh,
    batches: Iterable[Batch],
    stop: Callable[[], bool] = lambda: False,
    domains: Sequence[str] = (),
) -> dict[str, float] | None:
    """Mean loss per labelled token over held-out batches of all data ranks, in nats: "loss", and "domain_loss/NAME" of
    each domain that `Batch.domain_B` indexes where there are several. None if `stop` cuts it short.

    stop: asked before each batch, with the same answer on all ranks.
    """
    engine.eval()
    term, tally = LanguageModelLoss(domains if len(domains) > 1 else ()), Tally()
    stopped = True
    for batch in batches:
        if stopped := stop():
            break
        output = engine.forward(batch.tokens_BS, batch.positions_BS, batch.labels_BS)
        measures = term.measures(batch, output)
        tally.add({"loss": Measure(term.total(batch, output, None), term.count(batch)), **measures})
    engine.train()
    if stopped:
        return None
    tally.reduce(mesh.data)
    found = {name: float(value) for name, value in tally.values().items()}
    del found["labelled_tokens"]
    return found
