"""The pre-training loop: eight rooms in order, then a line and a row.

    batch -> step -> row -> (evaluate) -> (save)        until `steps`, a signal, or five skipped steps in a row

Everything that a run needs is built here from its own section of `Run`. Every rank executes the same lines; the main
rank alone writes logs.
"""

import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from moe_engine.checkpoint.agreement import together
from moe_engine.checkpoint.compare import differences
from moe_engine.checkpoint.folders import folder_of, set_aside
from moe_engine.checkpoint.hf.carried import keep_for_run
from moe_engine.checkpoint.hf.first import check_finite, open_weights
from moe_engine.checkpoint.hf.folder import HfFolder
from moe_engine.checkpoint.manifest import NAME, read_manifest
from moe_engine.checkpoint.reader import Reader, agreed_steps, check_resume, choose, verify
from moe_engine.checkpoint.saver import Saver
from moe_engine.config import Run
from moe_engine.data.corpus import loader_of
from moe_engine.data.loader import Batch, Loader, OpenDomain, eval_batches
from moe_engine.data.shards import TOKENIZER
from moe_engine.errors import ConfigError, DataError, EngineError, Preempted, StorageError
from moe_engine.host.memory import keep_freed_memory
from moe_engine.host.signals import Requests
from moe_engine.log import Logger
from moe_engine.model.flops import step_flops_per_token
from moe_engine.model.transformer import Transformer
from moe_engine.parallel.collectives import gather_bytes, max_
from moe_engine.parallel.mesh import Mesh
from moe_engine.parallel.weight import initialise, key_of
from moe_engine.train.engine import Engine, OneRank
from moe_engine.train.peak import peak_flops
from moe_engine.train.schedule import learning_rate
from moe_engine.train.state import load_state, load_weights, save_state
from moe_engine.train.step import StepReport, evaluate, train_step
from moe_engine.train.terms import Term, pretraining_terms

MAX_SKIPPED = 5  # skipped steps in a row that stop a run


class Trainer(NamedTuple):
    """What one run is made of, on this rank."""

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
    beat: Callable[[int, str], None]


def build(
    run: Run,
    mesh: Mesh,
    device: torch.device,
    train: list[OpenDomain],
    held_out: list[OpenDomain],
    log: Logger,
    requests: Requests | None = None,
    beat: Callable[[int, str], None] = lambda step, where: None,
) -> Trainer:
    """Model, ZeRO engine and loader of a run; collective over all ranks.

    requests: what signals ask for, if the process listens. beat: told of progress, see host/watch.py.
    """
    beat(0, "building the model")
    if device.type == "cpu":
        keep_freed_memory()
    with device:
        model = Transformer(run.model, mesh, run.train.recompute, run.parallel.replicate_attention_experts)
    initialise(model, run.train.seed)
    torch.manual_seed(
        key_of(run.train.seed, f"noise of rank {mesh.world.rank}")
    )  # router jitter alone draws from it, for this rank's tokens
    loader = loader_of(run, train, mesh.data.rank)
    saver = Saver(
        Path(run.train.out) / "checkpoints",
        mesh.world,
        keep_last=run.train.keep_last,
        keep_every=run.train.keep_every,
        background=run.train.async_save,
        beat=partial(beat, 0, "writing a checkpoint"),
    )
    engine, terms = make_engine(model, run, mesh), pretraining_terms(run.model, loader.domains)
    return Trainer(run, mesh, device, engine, terms, loader, held_out, saver, log, requests or Requests(), beat)


def make_engine(model: torch.nn.Module, run: Run, mesh: Mesh) -> Engine:
    """The engine of a run: DeepSpeed's where data ranks share the work, or where it offloads the optimizer."""
    if mesh.data.size == 1 and not run.parallel.offload_optimizer:
        return OneRank(model, run, mesh)
    from moe_engine.train.zero import ZeroEngine  # here: one data rank does not load DeepSpeed

    return ZeroEngine(model, run, mesh)


def fit(trainer: Trainer) -> None:
    """Train to the last step, evaluating and saving on the way.

    EngineError after five skipped steps in a row; Preempted, when all is saved, after a signal to stop.
    """
    run, log = trainer.run, trainer.log
    trainer.beat(0, "looking for a checkpoint")
    start, tokens_seen = resume(trainer)
    trainer.beat(start, "starting")
    if start >= run.train.steps:
        log.info(f"nothing to train: the checkpoint is at step {start} of {run.train.steps}")
    log.truncate_after(start)
    if not run.evaluates:
        log.info("no evaluation: train.eval_every or train.eval_batches is 0")
    elif not trainer.held_out:
        log.warn("no held-out text: nothing is evaluated (prepare_data --eval-fraction sets some aside)")
    dtype = torch.bfloat16 if run.train.precision == "bf16" else torch.float32
    peak = peak_flops(trainer.device, dtype, trainer.mesh)
    if wishes(trainer).stop:
        raise Preempted("told to stop before the first step; nothing was to be saved")
    minimised = [term.name for term in trainer.terms if term.coefficient]
    skipped, start_time = 0, time.perf_counter()
    for step in range(start, run.train.steps):
        trainer.beat(step + 1, "training")
        began = time.perf_counter()
        batches = [to_device(batch, trainer.device) for batch in trainer.loader.next_step()]
        lr = learning_rate(step, run.train.steps, run.optimizer)
        bias_rate = run.model.expert_bias_update_rate
        report = train_step(trainer.engine, trainer.terms, trainer.mesh, batches, lr, bias_rate)
        seconds = time.perf_counter() - began
        tokens_seen += run.train.global_batch * run.train.seq_length
        log.step(row(trainer, step + 1, report, lr, seconds, peak, tokens_seen), minimised)
        skipped = skipped + 1 if report.skipped else 0
        if report.skipped:
            log.warn(f"step {step + 1} skipped ({skipped} in a row), {report.skipped}")
        if skipped == MAX_SKIPPED:
            trainer.saver.finish()
            raise EngineError(
                f"{MAX_SKIPPED} steps in a row were skipped, the last because {report.skipped}; the weights are still "
                f"those of step {step + 1 - MAX_SKIPPED}. Lower --lr, or look at the data of these steps"
            )
        last = step + 1 == run.train.steps
        if trainer.held_out and (last or (step + 1) % run.train.eval_every == 0):
            evaluate_and_log(trainer, step + 1)
        wish = wishes(trainer)
        save(trainer, step + 1, tokens_seen, wish, last)
        if wish.stop and not last:
            raise Preempted(f"told to stop: step {step + 1} is saved, --resume auto goes on from there")
    waited = trainer.saver.stalled / max(time.perf_counter() - start_time, 1e-9)
    log.info(f"training waited for checkpoints in {100 * waited:.1f} % of the time")


class Wishes(NamedTuple):
    """What the signals of any rank ask of all of them."""

    stop: bool
    save: bool


def wishes(trainer: Trainer) -> Wishes:
    """The same on all ranks; collective. A wish to save is granted once."""
    stop, save = trainer.requests.stop, trainer.requests.save
    if save:
        trainer.requests.save = False
    mine = torch.tensor([stop, save], dtype=torch.int32)
    return Wishes(*map(bool, max_(mine, trainer.mesh.world).tolist()))


def row(
    trainer: Trainer, step: int, report: StepReport, lr: float, seconds: float, peak: float, tokens_seen: int
) -> dict[str, Any]:
    """One row of metrics.jsonl; docs/metrics.md says what each field means."""
    run = trainer.run
    tokens = run.train.global_batch * run.train.seq_length
    flops = tokens * step_flops_per_token(run.model, run.train.seq_length)
    layers = range(run.model.num_hidden_layers)
    kinds = {
        "moe_layers": [i for i in layers if run.model.is_moe(i)],
        "attention_moe_layers": [i for i in layers if run.model.is_attention_moe(i)],
    }
    return {
        "step": step,
        "loss": report.loss,
        **nested({name: value.tolist() for name, value in report.measures.items()}),
        "grad_norm": report.grad_norm,
        "lr": lr,
        "tokens": tokens_seen,
        "tokens_per_s": tokens / seconds,
        "mfu": flops / seconds / (peak * trainer.mesh.world.size),
        "step_s": seconds,
        **{name: found for name, found in kinds.items() if found},
        **({"skipped": report.skipped} if report.skipped else {}),
    }


def nested(measures: dict[str, Any]) -> dict[str, Any]:
    """Measures called NAME/KEY as mappings NAME; an entry of which nothing was counted, which is nan, is left out."""
    out: dict[str, Any] = {}
    for name, value in measures.items():
        name, slash, key = name.partition("/")
        if not slash:
            out[name] = value
        elif not math.isnan(value):
            out.setdefault(name, {})[key] = value
    return out


def resume(trainer: Trainer) -> tuple[int, int]:
    """Continue from the checkpoint that the run asks for; returns the steps done and the tokens seen."""
    wanted, root, log, world = trainer.run.train.resume, trainer.saver.root, trainer.log, trainer.mesh.world
    there = agreed_steps(root, world)
    check_resume(trainer.run, there)
    beat = partial(trainer.beat, 0, "reading a checkpoint")
    folder = choose(wanted, root, world, log.warn, beat) if wanted else None
    if folder is None:
        if trainer.run.train.init_from:
            start_from(trainer, Path(trainer.run.train.init_from))
        else:
            together(lambda: keep_side_files(trainer, None), world, everywhere=False)
        return 0, 0
    manifest = read_manifest(folder)
    if "hf" in manifest:
        raise ConfigError(f"{folder} holds weights without a training state: start from them with --init-from")
    log.warn(*differences(manifest["run"], trainer.run.model_dump(mode="json")))
    trainer.loader.load_state(manifest["data"])
    load_state(trainer.engine, trainer.mesh, folder, beat)
    if folder.parent.resolve() != root.resolve():  # of another run, whose files go along
        together(lambda: keep_side_files(trainer, Reader(folder)), world, everywhere=False)
    log.info(f"resumed from {folder}: {manifest['step']} steps done")
    later = [step for step in there if step > manifest["step"]]  # damaged, or of a past that the run leaves now
    together(lambda: leave(trainer, later), world, everywhere=False)
    return int(manifest["step"]), int(manifest["tokens"])


def start_from(trainer: Trainer, path: Path) -> None:
    """A new run takes the weights of a Hugging Face folder or a checkpoint, and their side files; collective."""
    world, beat = trainer.mesh.world, partial(trainer.beat, 0, "reading the first weights")
    ours = bytes([(path / NAME).is_file()])
    if len(set(gather_bytes(ours, world))) > 1:
        raise DataError(f"--init-from {path}: the ranks do not see the same; it must be shared by all nodes")
    if ours[0] and (problems := verify(path, world, beat)):
        raise DataError("; ".join(problems))
    opened: list[HfFolder | Reader] = []
    together(lambda: opened.append(open_weights(path)), world)
    found: list[str] = []
    together(lambda: found.extend(load_weights(trainer.engine, opened[0], beat)), world)
    check_finite(opened[0], found, world)
    trainer.engine.weights_from_masters()
    together(lambda: keep_side_files(trainer, opened[0]), world, everywhere=False)
    trainer.log.info(f"started with the weights of {opened[0]}")


def keep_side_files(trainer: Trainer, source: HfFolder | Reader | None) -> None:
    """What an export of this run will need beside weights: of the folder that they came from, and of the data."""
    run, data = trainer.run, trainer.loader.orders[0].dataset
    keep_for_run(source, Path(run.train.out), data.folder / TOKENIZER, run.data.allow_other_tokenizer)


def leave(trainer: Trainer, steps: list[int]) -> None:
    """Put checkpoints out of the way, the latest first, so that what is left is always one history."""
    for step in reversed(steps):
        aside = set_aside(folder_of(trainer.saver.root, step))
        trainer.log.warn(f"what was step {step} is kept as {aside.name}, and not read again")


def save(trainer: Trainer, step: int, tokens_seen: int, wish: Wishes, last: bool) -> None:
    """Save `step` if it is time or wished for, and complete what the background has written; collective.

    A disk that refuses ends the run, or is warned about, on all ranks alike.
    """
    completed = []
    trainer.beat(step, "saving")
    try:
        every = trainer.run.train.save_every
        if last or wish.stop or wish.save or (every and step % every == 0):
            run = trainer.run.model_dump(mode="json")
            tokenizer = trainer.loader.orders[0].dataset.tokenizer
            tokenizer = {key: value for key, value in tokenizer.items() if key not in ("files", "notes")}
            manifest = {"tokens": tokens_seen, "data": trainer.loader.state(), "run": run, "tokenizer": tokenizer}
            completed.append(save_state(trainer.engine, trainer.mesh, trainer.saver, step, manifest))
        completed.append(trainer.saver.finish() if last or wish.stop else trainer.saver.poll())
    except StorageError as error:
        if trainer.run.train.on_save_error == "stop" or wish.stop or last:
            raise
        trainer.log.warn(f"no checkpoint: {error}")
    trainer.log.warn(*trainer.saver.notes)
    trainer.saver.notes.clear()
    trainer.log.info(*(f"saved {folder}" for folder in completed if folder))


def evaluate_and_log(trainer: Trainer, step: int) -> None:
    """Log the held-out loss of `step`, unless a signal cuts the evaluation short; collective."""
    stopped = False

    def batches() -> Iterator[Batch]:
        nonlocal stopped
        for batch in held_out_batches(trainer):
            stopped = wishes_to_stop(trainer)
            if stopped:
                return
            trainer.beat(step, "evaluating")
            yield to_device(batch, trainer.device)

    loss = evaluate(trainer.engine, trainer.mesh, batches())
    if not stopped:
        trainer.log.eval({"step": step, "loss": loss})


def wishes_to_stop(trainer: Trainer) -> bool:
    """Whether any rank was told to stop; collective, and a wish to save stays."""
    return bool(max_(torch.tensor(int(trainer.requests.stop)), trainer.mesh.world))


def held_out_batches(trainer: Trainer) -> Iterator[Batch]:
    """The first `eval_batches` global batches of held-out text: the same text on every layout."""
    train = trainer.run.train
    return eval_batches(
        trainer.held_out,
        seq_length=train.seq_length,
        micro_batch=train.micro_batch,
        data_rank=trainer.mesh.data.rank,
        data_size=trainer.mesh.data.size,
        document_mask=trainer.run.data.document_mask,
        limit=train.eval_batches * train.accumulation,
    )


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The same batch on `device`."""
    return Batch(*(field.to(device, non_blocking=True) for field in batch))
