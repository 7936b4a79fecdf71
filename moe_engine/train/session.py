"""A run, built: what this rank trains, reads and writes, each part made from its own section of `Run`.

`fit` (loop.py) puts the parts to work; nothing else takes them all.
"""

from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from moe_engine.checkpoint.save import Saver
from moe_engine.config import Run
from moe_engine.data.corpus import loader_of, packing_lines, with_epochs
from moe_engine.data.loader import Loader, OpenDomain
from moe_engine.host.memory import keep_freed_memory
from moe_engine.host.signals import Requests
from moe_engine.host.watch import Heartbeat
from moe_engine.log.logger import Logger
from moe_engine.model.transformer import Transformer
from moe_engine.parallel.mesh import Mesh
from moe_engine.parallel.weight import initialise, key_of
from moe_engine.train.engine import Engine, OneRank
from moe_engine.train.supervision import supervision_terms
from moe_engine.train.terms import Term, pretraining_terms


class Session(NamedTuple):
    """The parts of one run on this rank. held_out: domains to evaluate on; requests: what signals ask for."""

    run: Run
    mesh: Mesh
    device: torch.device
    engine: Engine
    terms: tuple[Term, ...]
    loader: Loader
    held_out: list[OpenDomain]
    saver: Saver
    log: Logger
    requests: Requests
    heartbeat: Heartbeat


def build(
    run: Run,
    mesh: Mesh,
    device: torch.device,
    train: list[OpenDomain],
    held_out: list[OpenDomain],
    log: Logger,
    requests: Requests | None = None,
    heartbeat: Heartbeat = lambda step, where: None,
) -> Session:
    """Model with random weights, engine, loader and saver of a run; collective over all ranks."""
    heartbeat(0, "building the model")
    if device.type == "cpu":
        keep_freed_memory()
    with device:
        model = Transformer(run.model, mesh, run.train.recompute, run.parallel.replicate_attention_experts)
    initialise(model, run.train.seed)
    # router jitter alone draws from it, for this rank's tokens
    torch.manual_seed(key_of(run.train.seed, f"noise of rank {mesh.world.rank}"))
    loader = loader_of(run, train, mesh.data.rank)
    run = with_epochs(run, loader)
    log.total_steps = run.train.steps
    log.info(*packing_lines(loader))
    saver = Saver(
        Path(run.train.out) / "checkpoints",
        mesh.world,
        keep_last=run.train.keep_last,
        keep_every=run.train.keep_every,
        background=run.train.async_save,
        heartbeat=partial(heartbeat, 0, "writing a checkpoint"),
    )
    taught = supervision_terms(run, model, loader.expert_labels, loader.domains, mesh.tp)
    engine, terms = make_engine(model, run, mesh), (*pretraining_terms(run.model, loader.domains), *taught)
    requests = requests or Requests()
    return Session(run, mesh, device, engine, terms, loader, held_out, saver, log, requests, heartbeat)


def make_engine(model: torch.nn.Module, run: Run, mesh: Mesh) -> Engine:
    """The engine of a run: DeepSpeed's where data ranks share the work, or where it offloads the optimizer."""
    if mesh.data.size == 1 and not run.parallel.offload_optimizer:
        return OneRank(model, run, mesh)
    from moe_engine.train.deepspeed_engine import DeepSpeedEngine  # here: one data rank does not load DeepSpeed

    return DeepSpeedEngine(model, run, mesh)
