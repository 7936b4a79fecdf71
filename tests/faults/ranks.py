"""Real ranks that train a small MoE and leave a trace, so that a battered run can be compared with an untouched one.

    trace-rank-N.jsonl    [step, batch, state, random]: SHA-256 of the tokens it read, of weights, masters and moments,
                          and of the random state, after each step
    metrics.jsonl         the losses, whose decimals are exact

Ranks are forked from this process, which has torch loaded, and end with the exit codes of launch/pretrain_moe.py.
"""

import contextlib
import hashlib
import itertools
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moe_engine.config import Data, Domain, Model, Optimizer, Parallel, Run, Train
from moe_engine.data.corpus import open_corpus
from moe_engine.data.loader import Batch
from moe_engine.errors import EngineError
from moe_engine.host.lock import lock
from moe_engine.host.signals import Requests
from moe_engine.host.watch import Watch
from moe_engine.log.logger import Logger
from moe_engine.log.rows import read_rows
from moe_engine.parallel.collectives import barrier
from moe_engine.parallel.mesh import Mesh, build_mesh
from moe_engine.train.engine import Engine
from moe_engine.train.loop import fit
from moe_engine.train.session import Session, build
from moe_engine.train.step import accumulate, finish
from moe_engine.train.tally import StepReport
from moe_engine.train.terms import Term

Layout = tuple[int, int, int]  # dp, ep, tp
SEQUENCES, LENGTH = 8, 16
MODEL = Model(
    vocab_size=264, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=8,
    moe_intermediate_size=24, num_local_experts=8, expert_bias_update_rate=0.01, router_jitter_noise=0.05,
    initializer_range=0.1,
)  # fmt: skip
Before = Callable[[int, Session], None]  # called on every rank between building the session and training
Trace = dict[tuple[int, int], set[str]]  # (rank, step) -> what was written for it, once or more often


def run_of(corpus: Path, out: Path, layout: Layout, *, zero: int = 2, jitter: bool = True, **train: Any) -> Run:
    """A run of 12 steps that saves every 3; the noise of the router makes the random state matter."""
    dp, ep, tp = layout
    settings: dict[str, Any] = {
        "steps": 12, "save_every": 3, "eval_every": 5, "eval_batches": 2, "step_timeout": 8.0, "resume": "auto",
        "out": str(out), "seq_length": LENGTH, "micro_batch": SEQUENCES // (dp * ep), "global_batch": SEQUENCES,
    }  # fmt: skip
    domains = [Domain(name=name, path=str(corpus), weight=weight) for name, weight in (("prose", 3), ("code", 1))]
    return Run(
        model=MODEL
        if jitter
        else MODEL.model_copy(update={"router_jitter_noise": 0.0, "router_aux_loss": "global_batch"}),
        parallel=Parallel(dp=dp, ep=ep, tp=tp, zero=zero),
        optimizer=Optimizer(lr=1e-3, eps=1e-6, warmup_steps=2),
        data=Data(domains=tuple(domains)),
        train=Train(**settings | train),
    )


def train_step(engine: Engine, terms: Sequence[Term], mesh: Mesh, batches: Sequence[Batch], lr: float) -> StepReport:
    """One step, as the loop makes it."""
    return finish(engine, terms, mesh, batches, accumulate(engine, terms, mesh, batches), lr)


class Ranks:
    """The processes of one launch."""

    def __init__(self, run: Run, before: Before | None = None) -> None:
        self.out = Path(run.train.out)
        self.out.mkdir(exist_ok=True)
        self.meeting = tempfile.TemporaryDirectory()
        context = multiprocessing.get_context("fork")
        self.processes = [
            context.Process(target=_rank, args=(run, rank, self.meeting.name, before), daemon=True)
            for rank in range(run.world_size)
        ]
        self.began = time.monotonic()
        for process in self.processes:
            process.start()

    def signal(self, rank: int, number: int) -> None:
        """Send a signal to a rank that may have ended."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.processes[rank].pid or 0, number)

    def running(self) -> bool:
        return all(process.is_alive() for process in self.processes)

    def wait(self, seconds: float, but: int | None = None) -> list[int | None]:
        """Exit codes in rank order, minus the signal for those that one ended; None for those that did not end.

        but: a rank that is not waited for.
        """
        until = time.monotonic() + seconds
        for rank, process in enumerate(self.processes):
            if rank != but:
                process.join(max(until - time.monotonic(), 0))
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            if process.is_alive():
                process.kill()
                process.join()
        self.meeting.cleanup()
        return codes


def train_to_the_end(run: Run, seconds: float = 120) -> str | None:
    """Launch and wait; None, or what went wrong."""
    codes = Ranks(run).wait(seconds)
    return None if set(codes) == {0} else f"exit codes {codes}: {last_words(Path(run.train.out))}"


def last_words(out: Path) -> str:
    """The last line of each rank that said something."""
    said = []
    for path in sorted(out.glob("said-rank-*.txt")):
        lines = path.read_text(errors="replace").strip().splitlines()
        said += [f"{path.stem}: {lines[-1][:300]}"] if lines else []
    return " | ".join(said)


def before_each_step(session: Session, act: Callable[[int], None]) -> None:
    """From now on act(steps that this process has done) comes before each batch is read."""
    read, done = session.loader.next_step, itertools.count()

    def next_step() -> Any:
        act(next(done))
        return read()

    session.loader.next_step = next_step


def written(out: Path) -> Iterator[tuple[tuple[int, int], str]]:
    """(rank, step) and the rest of each line of the traces; a line that a kill cut short is left out."""
    for path in out.glob("trace-rank-*.jsonl"):
        rank = int(path.stem.rpartition("-")[2])
        for line in path.read_text().splitlines():
            with contextlib.suppress(ValueError):
                step, *rest = json.loads(line)
                yield (rank, step), json.dumps(rest)


def trace_of(out: Path) -> Trace:
    """What every rank wrote for every step."""
    trace: Trace = {}
    for key, text in written(out):
        trace.setdefault(key, set()).add(text)
    return trace


def times_done(out: Path, last: int) -> Counter[tuple[int, int]]:
    """How often each rank has done each step up to `last`."""
    return Counter(key for key, _ in written(out) if key[1] <= last)


def losses_of(out: Path) -> list[tuple[int, str, str]]:
    """Step, loss and gradient norm as hexadecimal numbers."""
    return [
        (row["step"], float(row["loss"]).hex(), float(row["grad_norm"]).hex())
        for row in read_rows(out / "metrics.jsonl")
    ]


def difference(out: Path, untouched: Path) -> str | None:
    """None if a battered run is the untouched one: each step, also one done twice, and the last checkpoint's files."""
    mine, theirs = trace_of(out), trace_of(untouched)
    if mine.keys() != theirs.keys():
        return f"steps {sorted(set(theirs) ^ set(mine))[:4]} are not in both"
    for key in sorted(mine):
        if mine[key] != theirs[key]:
            return f"rank {key[0]} step {key[1]}: another batch, state or random state"
    if losses_of(out) != losses_of(untouched):
        return "the losses in metrics.jsonl differ"
    ends = [max((folder / "checkpoints").glob("step-*[0-9]")) for folder in (out, untouched)]
    files = [json.loads((end / "manifest.json").read_text())["files"] for end in ends]
    return None if files[0] == files[1] else "the last checkpoints differ"


def _rank(run: Run, rank: int, meeting: str, before: Before | None) -> None:
    requests = Requests().listen()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT))
    out = Path(run.train.out)
    with (out / f"said-rank-{rank:05d}.txt").open("a") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(run.world_size))
    code = 0
    try:
        _train(run, rank, meeting, requests, before)
    except EngineError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        code = error.exit_code
    except BaseException:  # another rank is gone, or a bug: the text says which
        traceback.print_exc()
        code = EngineError.exit_code
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a forked child must not run the parent's exit handlers


def _train(run: Run, rank: int, meeting: str, requests: Requests, before: Before | None) -> None:
    out, world = Path(run.train.out), run.world_size
    held = lock(out) if rank == 0 else None
    watch = Watch(dist.FileStore(str(Path(meeting) / "watch"), world), rank, world, run.train.step_timeout, out)
    log = Logger(out, rank == 0, run.train.steps, quiet=True)
    trace = (out / f"trace-rank-{rank:05d}.jsonl").open("a")
    batches: list[str] = []

    def heartbeat(step: int, where: str) -> None:
        watch.heartbeat(step, where)
        if where == "saving":
            trace.write(json.dumps([step, batches[-1], _state(session), _random()]) + "\n")
            trace.flush()

    with watch:
        store = dist.FileStore(str(Path(meeting) / "store"), world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
        mesh = build_mesh(run.parallel.dp, run.parallel.ep, run.parallel.tp)
        session = build(run, mesh, torch.device("cpu"), *open_corpus(run), log, requests, heartbeat)
        read = session.loader.next_step

        def next_step() -> Any:
            step = read()
            batches.append(_digest(*(batch.tokens_BS for batch in step)))
            return step

        session.loader.next_step = next_step
        if before:
            before(rank, session)
        fit(session)
        barrier(mesh.world)
    log.close()
    if held:
        held.close()


def _digest(*tensors: torch.Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(bytes(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()[:32]


def _state(session: Session) -> str:
    """Weights, and the masters, moments and step counts that this rank owns."""
    owned = [tensor for part in session.engine.owned() for tensor in (part.master, *part.moments.values())]
    biases = [router.expert_bias for router in session.engine.routers if router.expert_bias is not None]
    return _digest(*(tensor.reshape(-1) for tensor in (*session.engine.names, *owned, *biases)))


def _random() -> str:
    return _digest(torch.get_rng_state())
