"""Numbers that go wrong while a run trains: gradients that are not finite, and experts at the ends of their load.

D1    a good step, one to four spoiled ones, a good one, five spoiled ones. On every rank alike the spoiled steps leave
      weights, masters and moments as they were, and say which rank and parameter it was; the fifth in a row ends it.
D3    the engine on several ranks against one process whose experts are a loop over tokens: every gradient.
"""

import itertools
import math
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_engine.config import Run
from moe_engine.data.corpus import open_corpus
from moe_engine.data.loader import Batch, plain_batch
from moe_engine.errors import EngineError
from moe_engine.log.logger import Logger
from moe_engine.model.moe import MoE
from moe_engine.model.router import Router
from moe_engine.model.transformer import Transformer
from moe_engine.parallel.local_ranks import run_on_ranks
from moe_engine.parallel.mesh import Mesh, build_mesh
from moe_engine.parallel.weight import initialise, note_of
from moe_engine.train.engine import Engine
from moe_engine.train.loop import fit
from moe_engine.train.session import build, make_engine
from moe_engine.train.skipped import MAX_SKIPPED
from moe_engine.train.step import accumulate, finish
from moe_engine.train.terms import pretraining_terms
from tests.faults.arena import Arena, Fault, Injections
from tests.faults.ranks import LENGTH, Layout, run_of

PATIENCE = 60.0  # seconds after which ranks that do not answer hang
LIMIT = 1e-5  # relative error of a gradient, as for every layout
LAYOUTS: list[Layout] = [(1, 2, 1), (2, 1, 1), (1, 1, 2), (2, 2, 1), (1, 4, 1), (1, 2, 2)]
ZERO = [(2, "fp32"), (0, "fp32"), (1, "fp32"), (2, "bf16"), (1, "bf16")]
WEIGHTS = {
    "dense": ["layers.0.attention.q.weight", "layers.1.ffn_norm.weight", "embedding.weight", "head.weight"],
    "router": ["layers.0.ffn.router.weight", "layers.1.ffn.router.weight"],
    "expert": ["layers.0.ffn.experts.w_down", "layers.1.ffn.experts.w_gate_up"],
}


class Listener(Logger):
    """A Logger that keeps what this rank, main or not, has to say, and prints nothing."""

    def __init__(self, out: Path, is_main: bool, steps: int) -> None:
        super().__init__(out, is_main, steps, quiet=True)
        self.said: list[str] = []

    def warn(self, *texts: str) -> None:
        self.said += texts


def on_ranks(check, world: int, *args: object) -> list | str:
    """What `check` returned on every rank, or one line on how a rank failed."""
    try:
        return run_on_ranks(check, world, *args, timeout=PATIENCE)
    except RuntimeError as error:
        return str(error).strip().splitlines()[-1]


# --- D1


class Poison(NamedTuple):
    """One gradient of one rank that is not finite: where, what, and in which steps."""

    rank: int
    weight: str
    value: float
    plan: list[bool]  # whether a step is spoiled

    def expected(self) -> list[str]:
        """A line for each spoiled step."""
        lines, row = [], 0
        for step, spoiled in enumerate(self.plan, 1):
            row = row + 1 if spoiled else 0
            why = f"not finite: the gradient of {self.weight} on rank {self.rank}"
            lines += [f"step {step} skipped ({row} in a row), {why}"] * spoiled
        return lines


def gradients_are_spoiled(arena: Arena, count: int) -> Injections:
    """D1: each kind of weight in turn, with NaN and Inf, on all layouts and ZeRO stages."""
    draw, kinds = arena.draw, list(WEIGHTS)
    for i in range(count):
        layout, (zero, precision) = LAYOUTS[i % len(LAYOUTS)], ZERO[i % len(ZERO)]
        out = arena.folder("spoiled")
        run = run_of(arena.corpus(), out, layout, zero=zero, precision=precision, save_every=100, eval_every=100)
        plan = [False, *[True] * draw.randrange(1, MAX_SKIPPED), False, *[True] * MAX_SKIPPED]
        weight = draw.choice(WEIGHTS[kinds[i % len(kinds)]])
        poison = Poison(draw.randrange(run.world_size), weight, (math.nan, math.inf)[i // len(kinds) % 2], plan)
        answers = on_ranks(train_spoiled, run.world_size, run, poison)
        found = answers if isinstance(answers, str) else spoiled_well(answers, poison)
        yield found and f"{poison.value} in {weight} of rank {poison.rank}, {layout}, ZeRO {zero} {precision}: {found}"


def spoiled_well(answers: list[tuple[list[str], list[bool], int]], poison: Poison) -> str | None:
    """None if every rank said the same, stood still in the same steps, and stopped with code 70."""
    for rank, (said, moved, code) in enumerate(answers):
        still = [not moves for moves in moved]
        if still != poison.plan:
            return f"rank {rank} stood still in steps {numbers_of(still)}, spoiled were {numbers_of(poison.plan)}"
        if said != poison.expected():
            return f"rank {rank} said {said}"
        if code != EngineError.exit_code:
            return f"rank {rank} ended with code {code}"
    return None


def numbers_of(flags: list[bool]) -> list[int]:
    return [step for step, flag in enumerate(flags, 1) if flag]


def train_spoiled(rank: int, run: Run, poison: Poison) -> tuple[list[str], list[bool], int]:
    """What a rank said of skipped steps, whether its state moved in each step, and the exit code of the run."""
    mesh = build_mesh(run.parallel.dp, run.parallel.ep, run.parallel.tp)
    log = Listener(Path(run.train.out), rank == 0, run.train.steps)
    states: list[dict[str, bytes]] = []

    def heartbeat(step: int, where: str) -> None:
        if where == "training":
            states.append(state_of(session.engine))

    def spoil(grad: Tensor) -> Tensor | None:
        if not poison.plan[len(states) - 1]:
            return None
        spoiled = grad.clone()
        spoiled.view(-1)[-1] = poison.value
        return spoiled

    session = build(run, mesh, torch.device("cpu"), *open_corpus(run), log, heartbeat=heartbeat)
    if rank == poison.rank:
        next(p for p, name in session.engine.names.items() if name == poison.weight).register_hook(spoil)
    code = 0
    try:
        fit(session)
    except EngineError as error:
        code = error.exit_code
    states.append(state_of(session.engine))
    moved = [before != after for before, after in itertools.pairwise(states)]
    return [line for line in log.said if "skipped" in line], moved, code


def state_of(engine: Engine) -> dict[str, bytes]:
    """Weights, masters, moments, step counts and expert biases of this rank, byte by byte."""
    state = {name: p for p, name in engine.names.items()}
    for part in engine.owned():
        state |= {f"{kind} of {part.name}": x for kind, x in ({"master": part.master} | part.moments).items()}
    state |= {f"bias {i}": r.expert_bias for i, r in enumerate(engine.routers) if r.expert_bias is not None}
    return {name: x.detach().reshape(-1).view(torch.uint8).numpy().tobytes() for name, x in state.items()}


# --- D3


class Load(NamedTuple):
    """How tokens are spread over experts."""

    title: str
    first: float  # added to the score of the first expert: 10 makes every token choose it
    last: float  # added to that of the last one: -10 keeps every token away
    capacity: float | None
    length: int | None  # tokens of a rank; None: several sequences of the usual length


LOADS = [
    Load("no token", 0.0, -10.0, None, None),
    Load("all tokens", 10.0, 0.0, None, None),
    Load("one token", 0.0, 0.0, None, 1),
    Load("overflow", 10.0, 0.0, 0.5, None),
]


def experts_at_their_ends(arena: Arena, count: int) -> Injections:
    """D3: each load in turn; after all four, the next layouts and ZeRO stage."""
    for i in range(count):
        load, turn = LOADS[i % len(LOADS)], i // len(LOADS)
        layout, zero = LAYOUTS[(i + 3 * turn) % len(LAYOUTS)], (2, 0, 1)[turn % 3]
        seed = arena.draw.randrange(1 << 30)
        run = loaded_run(arena, layout, zero, load)
        answers = on_ranks(check_load, run.world_size, run, load, seed)
        found = answers if isinstance(answers, str) else None
        yield found and f"an expert gets {load.title}, {layout}, ZeRO {zero}: {found}"


def loaded_run(arena: Arena, layout: Layout, zero: int, load: Load) -> Run:
    """Trained on the token losses alone: the reference has no statistics."""
    run = run_of(arena.root, arena.root, layout, zero=zero, jitter=False)
    model = run.model.model_copy(update={"router_aux_loss": "none", "capacity_factor": load.capacity})
    return run.model_copy(update={"model": model})


def check_load(rank: int, run: Run, load: Load, seed: int) -> None:
    """One step of the engine; AssertionError unless the load came about and each gradient is the reference's."""
    torch.set_num_threads(1)
    mesh = build_mesh(run.parallel.dp, run.parallel.ep, run.parallel.tp)
    transformer = Transformer(run.model, mesh)
    initialise(transformer, 0)
    engine = make_engine(transformer, run, mesh)
    tilt(engine.routers, load)
    whole = random_batch(run, load, seed)
    rows = mesh.data.cut(len(whole.tokens_BS))
    mine = [Batch(*(field[rows] for field in whole))]
    terms = pretraining_terms(run.model)
    tally = accumulate(engine, terms, mesh, mine)
    gradients = engine.gradients()
    for name, truth in truth_of(run, load, whole).items():
        part = truth[note_of(dict(transformer.named_parameters())[name]).local_slices()]
        error = relative(gradients[name], part)
        assert error <= LIMIT, f"rank {rank}: the gradient of {name} is off by {error:.1e} of its norm"
    report = finish(engine, terms, mesh, mine, tally, 1e-3)
    assert report.skipped is None and math.isfinite(report.grad_norm) and math.isfinite(report.loss), f"{report}"
    assert all(p.isfinite().all() for p in engine.names), "a weight is not finite after the step"
    assert came_about(load, report.measures, 1 / run.model.num_experts_per_tok), f"no such load: {report}"


def came_about(load: Load, measures: dict[str, Tensor], most: float) -> bool:
    """Whether the step had the load that it was to have, in every layer."""
    load_NE, dropped_N = measures["expert_load"], measures["dropped"]
    kept_away, crowded = (load_NE[:, -1] == 0).all(), torch.allclose(load_NE[:, 0], load_NE.new_tensor(most))
    return bool(
        (kept_away or load.last == 0)
        and (crowded or load.first == 0)
        and ((dropped_N > 0).all() if load.capacity else (dropped_N == 0).all())
    )


def tilt(routers: list[Router], load: Load) -> None:
    """Biases steer the choice of experts and never their weights."""
    for router in routers:
        assert router.expert_bias is not None
        router.expert_bias[0], router.expert_bias[-1] = load.first, load.last


def random_batch(run: Run, load: Load, seed: int) -> Batch:
    """The tokens of all data ranks; every tp rank gets a token, and every token has a label."""
    draw = torch.Generator().manual_seed(seed)
    sequences, length = run.train.global_batch, LENGTH
    if load.length:
        sequences, length = run.data_ranks, load.length * run.parallel.tp
    tokens = torch.randint(run.model.vocab_size, (sequences, length + 1), generator=draw)
    at = torch.arange(length).expand(sequences, length)
    return plain_batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), at)


def truth_of(run: Run, load: Load, whole: Batch) -> dict[str, Tensor]:
    """Gradients of the mean token loss, in one process, micro-batch by micro-batch, experts by a loop."""
    transformer = Transformer(run.model, Mesh())
    initialise(transformer, 0)
    tilt([module for module in transformer.modules() if isinstance(module, Router)], load)
    for layer in transformer.layers:
        assert isinstance(layer.ffn, MoE)
        layer.ffn = LoopedExperts(layer.ffn, run.parallel.tp)
    size = len(whole.tokens_BS) // run.data_ranks
    for i in range(run.data_ranks):
        tokens_BS, labels_BS, positions_BS, *_ = (field[i * size : (i + 1) * size] for field in whole)
        loss_T = transformer(tokens_BS, positions_BS, labels_BS).loss_T
        (loss_T.sum() / whole.labels_BS.numel()).backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in transformer.named_parameters()}


class LoopedExperts(nn.Module):
    """A MoE layer as a loop over tokens and their experts; tp parts of the tokens have capacities of their own."""

    def __init__(self, moe: MoE, tp: int) -> None:
        super().__init__()
        self.router, self.experts, self.tp = moe.router, moe.experts, tp

    def forward(self, x_TD: Tensor) -> Tensor:
        return torch.cat([self.part(part_TD) for part_TD in x_TD.chunk(self.tp)])

    def part(self, x_TD: Tensor) -> Tensor:
        router, bias_E = self.router, self.router.expert_bias
        assert bias_E is not None
        experts, k, factor = router.experts, router.top_k, router.capacity_factor
        room = math.ceil(factor * len(x_TD) * k / experts) if factor else math.inf
        probs_TE = F.linear(x_TD, self.router.weight).softmax(-1)
        score_TE = (probs_TE + bias_E).tolist()
        taken, y = [0] * experts, []
        for x_D, probs_E, score_E in zip(x_TD, probs_TE, score_TE):
            best = sorted(range(experts), key=lambda e, score_E=score_E: (-score_E[e], e))[:k]
            y_D = torch.zeros_like(x_D)
            for e in best:
                taken[e] += 1
                if taken[e] <= room:
                    gate_FD, up_FD = self.experts.w_gate_up[e]
                    hidden_F = F.silu(gate_FD @ x_D) * (up_FD @ x_D)
                    y_D = y_D + probs_E[e] / probs_E[best].sum() * (self.experts.w_down[e] @ hidden_F)
            y.append(y_D)
        return torch.stack(y)


def relative(ours: Tensor, theirs: Tensor) -> float:
    """2-norm of the difference over that of the truth; infinite where it is no number or the truth alone is 0."""
    difference, size = float((ours - theirs).double().norm()), float(theirs.double().norm())
    error = difference / size if size else (math.inf if difference else 0.0)
    return error if math.isfinite(error) else math.inf


NUMBERS: dict[str, Fault] = {
    "D1": Fault("NaN or Inf in one gradient of one rank", gradients_are_spoiled, ci=6, nightly=24),
    "D3": Fault("an expert gets no, all or too many tokens; one token", experts_at_their_ends, ci=4, nightly=12),
}
