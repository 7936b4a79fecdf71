"""A small MoE, its batches and its engine, for the tests of training; every function runs on one rank."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_engine.config import Data, Domain, Model, Optimizer, Parallel, Run, Train
from moe_engine.data.corpus import open_corpus
from moe_engine.data.loader import Batch, plain_batch
from moe_engine.log.logger import Logger
from moe_engine.model.transformer import Transformer
from moe_engine.parallel.mesh import Mesh
from moe_engine.parallel.weight import initialise, note_of
from moe_engine.train.begin import Beginning, begin
from moe_engine.train.engine import Engine
from moe_engine.train.session import Session, build, make_engine
from moe_engine.train.step import accumulate, finish
from moe_engine.train.tally import StepReport
from moe_engine.train.terms import Term

SEQUENCES, LENGTH = 16, 8
MODEL = Model(
    vocab_size=48, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=4, moe_intermediate_size=24, moe_layers=(1,), num_local_experts=4, initializer_range=0.2,
    router_aux_loss="global_batch", router_aux_loss_coef=0.05, router_z_loss_coef=1e-3,
)  # fmt: skip


def run_of(
    dp: int = 1, ep: int = 1, tp: int = 1, *, accumulation: int = 1, model: dict[str, Any] | None = None,
    clip: float = 0.5, precision: str = "fp32", lr: float = 1e-3, recompute: str = "none", **parallel: Any,
) -> Run:  # fmt: skip
    """A run of 16 sequences a step on dp x ep x tp ranks; clipping is active.

    AdamW multiplies the rounding noise of a gradient that is as small as eps by lr / (4 eps): 1e-9 here, so both are
    chosen to keep that below 1e-6.
    """
    return Run(
        model=MODEL.model_copy(update=model or {}),
        parallel=Parallel(dp=dp, ep=ep, tp=tp, **parallel),
        optimizer=Optimizer(lr=lr, eps=1e-6, clip_grad=clip),
        train=Train(
            steps=20, seq_length=LENGTH, micro_batch=SEQUENCES // (dp * ep * accumulation), accumulation=accumulation,
            global_batch=SEQUENCES, precision=precision, recompute=recompute,
        ),
    )  # fmt: skip


def global_batch(step: int, vocab_size: int = MODEL.vocab_size) -> Batch:
    """Random tokens of two domains; sequences have very different numbers of labels."""
    draw = torch.Generator().manual_seed(1000 + step)
    tokens = torch.randint(vocab_size, (SEQUENCES, LENGTH + 1), generator=draw)
    labels = tokens[:, 1:].masked_fill(
        torch.arange(LENGTH) >= torch.randint(1, LENGTH + 1, (SEQUENCES, 1), generator=draw), -100
    )
    positions = torch.arange(LENGTH).expand(SEQUENCES, LENGTH)
    batch = plain_batch(tokens[:, :-1].contiguous(), labels, positions)
    return batch._replace(domain_B=torch.arange(SEQUENCES) % 2)


def my_batches(run: Run, mesh: Mesh, step: int) -> list[Batch]:
    """This data rank's micro-batches, in the order in which the loader deals them out."""
    size, whole = run.train.micro_batch, global_batch(step, run.model.vocab_size)
    starts = [(a * mesh.data.size + mesh.data.rank) * size for a in range(run.train.accumulation)]
    return [Batch(*(field[s : s + size] for field in whole)) for s in starts]


def transformer_of(run: Run, mesh: Mesh) -> Transformer:
    model = Transformer(run.model, mesh, run.train.recompute, run.parallel.replicate_attention_experts)
    initialise(model, 0)
    return model


def train_step(
    engine: Engine, terms: Sequence[Term], mesh: Mesh, batches: Sequence[Batch], lr: float, bias_rate: float = 0.0
) -> StepReport:
    """One step, as the loop makes it."""
    tally = accumulate(engine, terms, mesh, batches)
    return finish(engine, terms, mesh, batches, tally, lr, bias_rate)


def engine_of(run: Run, mesh: Mesh) -> Engine:
    return make_engine(transformer_of(run, mesh), run, mesh)


def parameters_of(engine: Engine) -> dict[str, Tensor]:
    """Name -> a copy of this rank's part of each weight."""
    return {name: p.detach().clone() for p, name in engine.names.items()}


def part_of(whole: Tensor, parameter: Tensor) -> Tensor:
    """The slice of a whole weight (or gradient) that this rank's parameter stands for."""
    return whole[note_of(parameter).local_slices()]


def relative(ours: Tensor, theirs: Tensor) -> float:
    """2-norm of the difference over the 2-norm of the truth."""
    size = float(theirs.double().norm())
    difference = float((ours.double() - theirs.double()).norm())
    return difference / size if size else (0.0 if difference == 0 else float("inf"))


def loop_run(
    corpus: Path, out: Path, layout: tuple[int, int, int], *, settings: dict[str, Any] | None = None, **train: Any
) -> Run:
    """A run of the loop on the corpus above; `settings` are run_of's."""
    run = run_of(*layout, **{"model": {"vocab_size": 264}} | (settings or {}))
    domains = (Domain(name="prose", path=str(corpus), weight=3), Domain(name="code", path=str(corpus), weight=1))
    changes = {"out": str(out), "steps": 10, "eval_every": 100, "save_every": 100, "eval_batches": 2} | train
    return run.model_copy(update={"data": Data(domains=domains), "train": run.train.model_copy(update=changes)})


def session_of(run: Run, mesh: Mesh) -> Session:
    """What launch/pretrain_moe.py builds, quietly."""
    log = Logger(Path(run.train.out), mesh.world.rank == 0, run.train.steps, quiet=True)
    return build(run, mesh, torch.device("cpu"), *open_corpus(run), log)


def begin_of(session: Session) -> Beginning:
    """Where the run begins, as the loop brings it there."""
    run, mesh, engine, loader, log = session.run, session.mesh, session.engine, session.loader, session.log
    return begin(run, mesh, engine, loader, log, session.heartbeat)
