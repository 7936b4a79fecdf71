"""The loss on held-out text."""

import math
from collections.abc import Callable, Iterable, Iterator

import torch

from moe_engine.config import Run
from moe_engine.data.loader import Batch, OpenDomain, eval_batches
from moe_engine.labels import IGNORE
from moe_engine.parallel.collectives import sum_
from moe_engine.parallel.mesh import Mesh
from moe_engine.train.engine import Engine


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
    engine: Engine, mesh: Mesh, batches: Iterable[Batch], stop: Callable[[], bool] = lambda: False
) -> float | None:
    """Mean loss per labelled token over held-out batches of all data ranks, in nats; None if `stop` cuts it short.

    stop: asked before each batch, with the same answer on all ranks.
    """
    engine.eval()
    total = torch.zeros(2, dtype=torch.float64, device=engine.device)
    stopped = False
    for batch in batches:
        if stopped := stop():
            break
        loss_T = engine.forward(batch.tokens_BS, batch.positions_BS, batch.labels_BS).loss_T
        total += torch.stack([loss_T.double().sum(), (batch.labels_BS != IGNORE).sum().double()])
    engine.train()
    loss, tokens = sum_(total, mesh.data).tolist()
    if stopped:
        return None
    return loss / tokens if tokens else math.nan
