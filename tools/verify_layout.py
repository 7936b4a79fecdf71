"""Does every layout give the numbers of one process? `python tools/verify_layout.py [--fast] [--config FILE]`

Trains a small MoE on every (dp, ep, tp) of up to 8 local ranks, for ZeRO 0, 1, 2, accumulation 1 and 4, and a balancing
loss per micro-batch and per global batch, with clipping active, ragged labels and one expert that never gets a token.
Each is compared with one process of plain PyTorch (no DeepSpeed, no collectives, torch.optim.AdamW) in fp32:

    the gradient of every parameter, the gradient norm, the balancing loss and all weights after 20 AdamW steps

Relative errors are 2-norms of differences over 2-norms, per parameter. AdamW runs with eps 1e-6: with 1e-8 one element
whose gradient is itself rounding noise steps by +-lr on the sign of that noise. The last line is
`layouts N, worst relative error X`; the exit code is 1 when X > 1e-5.
"""

import argparse
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from moe_engine.config import Model, Optimizer, Parallel, Run, Train
from moe_engine.config.command_line import load_run
from moe_engine.data.loader import Batch, plain_batch
from moe_engine.errors import ConfigError
from moe_engine.host.console import failed, run_program
from moe_engine.model.router_losses import balance_loss, load_share, z_loss
from moe_engine.model.transformer import Transformer
from moe_engine.parallel.local_ranks import run_on_ranks
from moe_engine.parallel.mesh import Mesh, build_mesh
from moe_engine.parallel.weight import initialise, note_of

STEPS, SEQUENCES, LENGTH, LIMIT = 20, 32, 16, 1e-5
SMALL = Model(
    vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=8,
    num_key_value_heads=8, moe_intermediate_size=48, moe_layers=(0, 2), num_local_experts=8, num_experts_per_tok=2,
    router_aux_loss_coef=0.05, router_z_loss_coef=1e-3, expert_bias_update_rate=1e-9, initializer_range=0.1,
)  # fmt: skip


class Case(NamedTuple):
    """One way of running the same training."""

    dp: int
    ep: int
    tp: int
    zero: int
    accumulation: int
    aux: str
    replicate: bool = False

    @property
    def world(self) -> int:
        return self.dp * self.ep * self.tp

    @property
    def micro_batch(self) -> int:
        return SEQUENCES // (self.dp * self.ep * self.accumulation)


class Errors(NamedTuple):
    """Worst relative errors of one case."""

    gradient: float
    norm: float
    aux: float
    weights: float


class Trace(NamedTuple):
    """What one process computed: gradients of the first step, norms and balancing losses, weights at the end."""

    gradients: dict[str, Tensor]
    norms: list[float]
    aux: list[float]
    weights: dict[str, Tensor]


def run_of(model: Model, case: Case) -> Run:
    """The engine's configuration of a case; clipping at 0.5 is active in every step."""
    return Run(
        model=model.model_copy(update={"router_aux_loss": case.aux}),
        parallel=Parallel(
            dp=case.dp, ep=case.ep, tp=case.tp, zero=case.zero, replicate_attention_experts=case.replicate
        ),
        optimizer=Optimizer(lr=1e-3, eps=1e-6, clip_grad=0.5),
        train=Train(
            steps=STEPS, seq_length=LENGTH, micro_batch=case.micro_batch, accumulation=case.accumulation,
            global_batch=SEQUENCES,
        ),
    )  # fmt: skip


def global_batch(model: Model, step: int) -> Batch:
    """Random tokens; about a third of the labels is missing, unevenly so, and documents start at random places."""
    draw = torch.Generator().manual_seed(step)
    tokens = torch.randint(model.vocab_size, (SEQUENCES, LENGTH + 1), generator=draw)
    missing = torch.rand(SEQUENCES, LENGTH, generator=draw) < torch.rand(SEQUENCES, 1, generator=draw) * 0.7
    starts = (torch.rand(SEQUENCES, LENGTH, generator=draw) < 0.1).index_fill(1, torch.tensor([0]), True)
    place = torch.arange(LENGTH).expand(SEQUENCES, LENGTH)
    positions = place - torch.where(starts, place, 0).cummax(1).values
    labels = tokens[:, 1:].masked_fill(missing, -100)
    return plain_batch(tokens[:, :-1].contiguous(), labels, positions)


def cut(batch: Batch, start: int, count: int) -> Batch:
    return Batch(*(field[start : start + count] for field in batch))


def build(model: Model, mesh: Mesh, replicate: bool = False) -> Transformer:
    """The model from seed 0, with one expert that is never chosen."""
    transformer = Transformer(model, mesh, replicate_attention_experts=replicate)
    initialise(transformer, seed=0)
    return transformer


def starve_one_expert(routers: Iterator[nn.Module]) -> None:
    for module in routers:
        if isinstance(bias := getattr(module, "expert_bias", None), Tensor):
            bias[-1] = -10.0


def reference(model: Model, case: Case) -> Trace:
    """Plain PyTorch on one process: every micro-batch in turn, one loss, clip_grad_norm_, AdamW."""
    config, run = model.model_copy(update={"router_aux_loss": case.aux}), run_of(model, case)
    transformer = build(config, Mesh())
    starve_one_expert(transformer.modules())
    parameters = dict(transformer.named_parameters())
    matrices = [p for p in parameters.values() if p.dim() > 1]
    vectors = [p for p in parameters.values() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": run.optimizer.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=run.optimizer.lr, betas=(run.optimizer.beta1, run.optimizer.beta2), eps=run.optimizer.eps,
    )  # fmt: skip
    gradients, norms, aux_values = {}, [], []
    for step in range(STEPS):
        batch = global_batch(config, step)
        micros = [cut(batch, i, case.micro_batch) for i in range(0, SEQUENCES, case.micro_batch)]
        outputs = [transformer(m.tokens_BS, m.positions_BS, m.labels_BS) for m in micros]
        loss = sum((output.loss_T.sum() for output in outputs), torch.zeros(())) / (batch.labels_BS != -100).sum()
        aux_values.append(0.0)
        if outputs[0].stats:
            kinds = zip(*(output.stats for output in outputs))
            load = [load_share(torch.stack([stats.count_NBE.sum(1) for stats in kind]).sum(0)) for kind in kinds]
            balance = torch.stack([balance_loss(case.aux, output.stats, load) for output in outputs]).mean()
            z = torch.stack([z_loss(output.stats) for output in outputs]).mean()
            loss = loss + config.router_aux_loss_coef * balance + config.router_z_loss_coef * z
            aux_values[-1] = float(balance.detach())
        loss.backward()
        if step == 0:
            gradients = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}
        norms.append(float(nn.utils.clip_grad_norm_(parameters.values(), run.optimizer.clip_grad)))
        optimizer.step()
        optimizer.zero_grad()
    return Trace(gradients, norms, aux_values, {name: p.detach().clone() for name, p in parameters.items()})


def relative(ours: Tensor, theirs: Tensor) -> float:
    """2-norm of the difference over 2-norm; where the truth is all zero, any other value is infinitely wrong."""
    difference, size = float((ours - theirs).double().norm()), float(theirs.double().norm())
    return finite(difference / size if size else (math.inf if difference else 0.0))


def finite(error: float) -> float:
    """An error that is not a number is the largest of all: max() would pass over it."""
    return abs(error) if math.isfinite(error) else math.inf


def check_rank(rank: int, run: Run, case: Case, truth: Trace) -> Errors:
    """The engine itself, as launch/pretrain_moe.py runs it, against this rank's slices of the truth."""
    from moe_engine.train.session import make_engine
    from moe_engine.train.step import accumulate, finish
    from moe_engine.train.terms import pretraining_terms

    mesh = build_mesh(case.dp, case.ep, case.tp)
    transformer = build(run.model, mesh, run.parallel.replicate_attention_experts)
    engine, terms = make_engine(transformer, run, mesh), pretraining_terms(run.model)
    starve_one_expert(iter(engine.routers))
    mine = {name: (p, note_of(p).local_slices()) for name, p in transformer.named_parameters()}
    gradient_error, norm_error, aux_error = 0.0, 0.0, 0.0
    for step in range(STEPS):
        batch, size = global_batch(run.model, step), case.micro_batch
        order = [(a * mesh.data.size + mesh.data.rank) * size for a in range(case.accumulation)]
        micros = [cut(batch, i, size) for i in order]
        tally = accumulate(engine, terms, mesh, micros)
        gradients = engine.gradients() if step == 0 else {}
        assert step > 0 or gradients.keys() == truth.gradients.keys()
        for name, gradient in gradients.items():
            gradient_error = max(gradient_error, relative(gradient, truth.gradients[name][mine[name][1]]))
        report = finish(engine, terms, mesh, micros, tally, run.optimizer.lr)
        assert report.skipped is None, report.skipped
        norm_error = max(norm_error, finite(report.grad_norm / truth.norms[step] - 1))
        aux, truth_aux = float(report.measures.get("aux_loss", 0.0)), truth.aux[step]
        aux_error = max(aux_error, finite((aux - truth_aux) / (truth_aux or 1.0)))
    weights_error = max(relative(p.detach(), truth.weights[name][at]) for name, (p, at) in mine.items())
    engine.close()
    return Errors(gradient_error, norm_error, aux_error, weights_error)


def all_cases(max_world: int) -> list[Case]:
    """Every layout of {1, 2, 4, 8}^3 on max_world ranks or fewer x ZeRO x accumulation x balancing loss."""
    sizes = [n for n in (1, 2, 4, 8) if n <= max_world]
    layouts = [(d, e, t) for d in sizes for e in sizes for t in sizes if d * e * t <= max_world]
    return [
        Case(*layout, zero, accumulation, aux)
        for layout in layouts
        for zero in (0, 1, 2)
        for accumulation in (1, 4)
        for aux in ("micro_batch", "global_batch")
    ]


FAST = [
    Case(1, 1, 1, 2, 4, "global_batch"), Case(2, 1, 1, 1, 1, "micro_batch"), Case(1, 1, 2, 2, 4, "micro_batch"),
    Case(1, 2, 1, 0, 4, "global_batch"), Case(2, 2, 1, 2, 1, "global_batch"), Case(1, 2, 2, 1, 4, "global_batch"),
    Case(1, 4, 1, 2, 4, "micro_batch"), Case(2, 1, 2, 0, 1, "micro_batch"),
]  # fmt: skip


def verify(model: Model, cases: list[Case]) -> float:
    """Run the cases, print a row each, return the worst relative error."""
    import moe_engine.train.deepspeed_engine  # noqa: F401 (imported once here, inherited by the forked ranks)

    truths: dict[tuple[str, int], Trace] = {}
    print(f"{'dp':>3} {'ep':>3} {'tp':>3} {'zero':>4} {'accum':>5}  {'aux':12}  gradient  grad norm  aux loss  weights")
    worst = 0.0
    for case in sorted(cases, key=lambda case: case.world):
        # a global loss does not depend on micro-batches, so its one truth is the whole batch at once
        size = SEQUENCES if case.aux == "global_batch" else case.micro_batch
        if (case.aux, size) not in truths:
            truths[case.aux, size] = reference(model, Case(1, 1, 1, 0, SEQUENCES // size, case.aux))
        per_rank = run_on_ranks(check_rank, case.world, run_of(model, case), case, truths[case.aux, size])
        errors = Errors(*(max(column) for column in zip(*per_rank, strict=True)))
        worst = max(worst, *errors)
        layout = f"{case.dp:3} {case.ep:3} {case.tp:3} {case.zero:4} {case.accumulation:5}  {case.aux:12}"
        print(layout, *(f"{error:8.1e}" for error in errors), sep="  ", flush=True)
    print(f"layouts {len(cases)}, worst relative error {worst:.1e}")
    return worst


ROUTING = (
    "num_local_experts", "num_experts_per_tok", "norm_topk_prob", "routed_scaling_factor", "router_aux_loss",
    "router_aux_loss_coef", "router_z_loss_coef", "tie_word_embeddings", "rope_scaling", "rope_theta",
    "qk_norm",
)  # fmt: skip


def shrunk(run: Run) -> tuple[Model, list[Case]]:
    """The user's run on at most 8 local ranks: routing, losses and layout kept, sizes small, dp cut to what fits."""
    parallel = run.parallel
    if parallel.ep * parallel.tp > 8 or parallel.zero == 3:
        raise ConfigError(
            f"ep {parallel.ep} x tp {parallel.tp}, ZeRO {parallel.zero}: verified are ep * tp <= 8, ZeRO 0 to 2"
        )
    dp = min(parallel.dp, 8 // (parallel.ep * parallel.tp))
    most = SEQUENCES // (dp * parallel.ep)
    aux = "micro_batch" if run.model.router_aux_loss == "none" else run.model.router_aux_loss
    accumulation = max(a for a in range(1, min(run.train.accumulation, most) + 1) if most % a == 0)
    model = SMALL.model_copy(update={name: getattr(run.model, name) for name in ROUTING})
    if run.model.shared_intermediate_size:
        model = model.model_copy(update={"shared_intermediate_size": 40})
    if run.model.num_attention_moe_layers:
        model = model.model_copy(update=attention_experts(run))
    left_out = {"capacity_factor": None, "router_jitter_noise": 0.0, "expert_bias_update_rate": 0.0}
    for key in [key for key, default in left_out.items() if getattr(run.model, key) != default]:
        print(f"not verified: model.{key} {getattr(run.model, key)}, which depends on the layout or on chance")
    replicate = parallel.replicate_attention_experts
    return model, [Case(dp, parallel.ep, parallel.tp, parallel.zero, accumulation, aux, replicate)]


def attention_experts(run: Run) -> dict[str, object]:
    """As few and narrow as ep and tp can cut; one layer keeps dense attention."""
    experts, tp = 8 * run.parallel.ep, run.parallel.tp
    return {
        "num_attention_experts": experts, "num_attention_heads": experts * tp, "num_key_value_heads": experts,
        "num_attention_experts_per_tok": min(run.model.num_attention_experts_per_tok, experts), "head_dim": 4,
        "attention_scaling_factor": run.model.attention_scaling_factor, "attention_moe_layers": (1, 2),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help=f"{len(FAST)} layouts of up to 4 ranks")
    parser.add_argument("--world", type=int, default=8, help="largest number of ranks")
    parser.add_argument("--config", help="your run: its layout and routing at small sizes; other flags as in launch/")
    options, rest = parser.parse_known_args()
    torch.set_num_threads(1)
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # forked ranks on gloo, on a machine with GPUs too
    try:
        if options.config or rest:
            config = ["--config", options.config] if options.config else []
            model, cases = shrunk(load_run(config + rest, None))
        else:
            model, cases = SMALL, FAST if options.fast else all_cases(options.world)
    except ConfigError as error:
        return failed(error)
    return int(not verify(model, cases) <= LIMIT)


if __name__ == "__main__":
    run_program(main)
