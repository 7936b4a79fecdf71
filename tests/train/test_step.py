"""One step and its report against plain PyTorch in one process, without ranks, micro-batches and DeepSpeed."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_engine.config import Run
from moe_engine.data.loader import Batch
from moe_engine.model.router_losses import balance_loss, load_share, z_loss
from moe_engine.parallel.local_ranks import run_on_ranks
from moe_engine.parallel.mesh import Mesh, build_mesh
from moe_engine.train.evaluation import evaluate
from moe_engine.train.step import accumulate, finish
from moe_engine.train.tally import StepReport
from moe_engine.train.terms import pretraining_terms
from tests.train.small import (
    MODEL,
    engine_of,
    global_batch,
    my_batches,
    parameters_of,
    part_of,
    relative,
    run_of,
    train_step,
    transformer_of,
)

DENSE = {"num_local_experts": 0, "moe_layers": "all"}
DOMAINS = ("even", "odd")


class Truth(NamedTuple):
    """What plain PyTorch computes in a step."""

    loss: float
    lm_loss: float
    aux_loss: float
    norm: float
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]


def plain_steps(run: Run, steps: int) -> Iterator[Truth]:
    """The whole batch at once (or micro-batch by micro-batch for a loss that is defined on them), clip, AdamW."""
    model = transformer_of(run, Mesh())
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": run.optimizer.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=run.optimizer.lr, betas=(0.9, 0.95), eps=run.optimizer.eps)
    size = run.train.micro_batch if run.model.router_aux_loss == "micro_batch" else run.train.global_batch
    for step in range(steps):
        batch = global_batch(step, run.model.vocab_size)
        parts = [Batch(*(x[i : i + size] for x in batch)) for i in range(0, len(batch.tokens_BS), size)]
        outputs = [model(b.tokens_BS, b.positions_BS, b.labels_BS) for b in parts]
        logits = torch.cat([model.logits(b.tokens_BS, b.positions_BS) for b in parts])
        lm = F.cross_entropy(logits, batch.labels_BS.flatten())
        loss, aux = lm, torch.zeros(())
        if run.model.num_moe_layers + run.model.num_attention_moe_layers:
            kinds = zip(*(output.stats for output in outputs))
            load = [load_share(torch.stack([stats.count_NBE.sum(1) for stats in kind]).sum(0)) for kind in kinds]
            balance = [balance_loss(run.model.router_aux_loss, output.stats, load) for output in outputs]
            aux, z = torch.stack(balance).mean(), torch.stack([z_loss(output.stats) for output in outputs]).mean()
            loss = lm + run.model.router_aux_loss_coef * aux + run.model.router_z_loss_coef * z
        optimizer.zero_grad()
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        norm = nn.utils.clip_grad_norm_(model.parameters(), run.optimizer.clip_grad or float("inf"))
        optimizer.step()
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        yield Truth(float(loss), float(lm), float(aux), float(norm), gradients, weights)


def step_of(run: Run, mesh: Mesh) -> StepReport:
    """The first step of a run."""
    terms = pretraining_terms(run.model, DOMAINS)
    return train_step(engine_of(run, mesh), terms, mesh, my_batches(run, mesh, 0), 1e-2)


def compare(run: Run, mesh: Mesh, steps: int = 3) -> None:
    """The engine's steps equal plain PyTorch's: losses, norm, every gradient (before clipping) and every weight."""
    engine, terms = engine_of(run, mesh), pretraining_terms(run.model, DOMAINS)
    for step, truth in enumerate(plain_steps(run, steps)):
        micros = my_batches(run, mesh, step)
        tally = accumulate(engine, terms, mesh, micros)
        for name, gradient in engine.gradients().items():
            parameter = next(p for p, n in engine.names.items() if n == name)
            assert relative(gradient, part_of(truth.gradients[name], parameter)) < 1e-5, (step, name)
        report = finish(engine, terms, mesh, micros, tally, run.optimizer.lr)
        assert report.skipped is None
        assert report.loss == pytest.approx(truth.loss, rel=1e-5)
        assert float(report.measures["lm_loss"]) == pytest.approx(truth.lm_loss, rel=1e-5)
        assert float(report.measures.get("aux_loss", torch.zeros(()))) == pytest.approx(truth.aux_loss, rel=1e-5)
        assert report.grad_norm == pytest.approx(truth.norm, rel=1e-5)
        for parameter, name in engine.names.items():
            assert relative(parameter.detach(), part_of(truth.weights[name], parameter)) < 1e-5, (step, name)
    engine.close()


CASES: list[tuple[tuple[int, int, int], dict[str, Any]]] = [
    ((1, 1, 1), {"zero": 0}),
    ((1, 1, 1), {"zero": 2, "accumulation": 4}),
    ((1, 1, 1), {"zero": 1, "accumulation": 2, "model": {"router_aux_loss": "micro_batch"}}),
    ((1, 1, 1), {"zero": 2, "clip": 0.0}),
    ((1, 1, 1), {"zero": 0, "clip": 0.0}),
    ((1, 1, 1), {"zero": 2, "clip": 1e4}),
    ((1, 1, 1), {"zero": 1, "model": {"tie_word_embeddings": True}}),
    ((2, 1, 1), {"zero": 2}),
    ((2, 1, 1), {"zero": 0, "accumulation": 2}),
    ((1, 2, 1), {"zero": 2, "accumulation": 2}),
    ((1, 1, 2), {"zero": 1, "model": {"tie_word_embeddings": True}}),
    ((2, 2, 1), {"zero": 0}),
    ((2, 2, 1), {"zero": 2, "accumulation": 2}),
    ((2, 2, 1), {"zero": 1, "model": {"router_aux_loss": "micro_batch"}}),
    ((1, 2, 2), {"zero": 2, "accumulation": 2}),
    ((1, 4, 1), {"zero": 2, "model": {"router_aux_loss": "sequence"}}),
]


@pytest.mark.parametrize(("layout", "settings"), CASES)
def test_equals_plain_pytorch(layout: tuple[int, int, int], settings: dict[str, Any]):
    """Expert gradients included: with dp 2, ep 2 dividing them by dp instead of by all data ranks would double them."""
    run = run_of(*layout, **settings)
    run_on_ranks(lambda rank: compare(run, build_mesh(*layout)), layout[0] * layout[1] * layout[2])


ROUTED: dict[str, Any] = {
    "num_attention_experts": 4, "num_attention_heads": 8, "head_dim": 4, "attention_moe_layers": (0, 1),
    "shared_intermediate_size": 16, "qk_norm": "head", "attention_scaling_factor": 2.0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("layout", "settings"),
    [
        ((1, 1, 1), {"zero": 2, "accumulation": 2, "recompute": "selective"}),
        ((1, 4, 1), {"zero": 2, "recompute": "full"}),
        ((1, 2, 2), {"zero": 2, "accumulation": 2, "recompute": "selective"}),
        ((1, 2, 2), {"zero": 0, "recompute": "full"}),
        ((2, 2, 1), {"zero": 1, "replicate_attention_experts": True}),
        ((1, 2, 2), {"zero": 1, "replicate_attention_experts": True}),
        ((1, 2, 1), {"zero": 2, "model": {"num_local_experts": 0, "moe_layers": "all"}}),
        ((2, 1, 1), {"zero": 3, "model": {"num_local_experts": 0, "moe_layers": "all"}}),
    ],
)
def test_attention_experts_train(layout: tuple[int, int, int], settings: dict[str, Any]):
    """Beside feed-forward experts and without them; the gradient norm counts w_k and w_v once for all of tp."""
    run = run_of(*layout, **settings | {"model": ROUTED | settings.get("model", {})})
    run_on_ranks(lambda rank: compare(run, build_mesh(*layout)), layout[0] * layout[1] * layout[2])


@pytest.mark.parametrize("layout", [(1, 1, 1), (2, 1, 1), (1, 1, 2)])
def test_dense_model_trains(layout: tuple[int, int, int]):
    run = run_of(*layout, zero=1, model=DENSE)
    run_on_ranks(lambda rank: compare(run, build_mesh(*layout)), layout[0] * layout[1] * layout[2])


def test_report_is_the_same_on_all_ranks_and_counts_everything():
    run = run_of(2, 2, 1, model={"capacity_factor": 0.5})

    def on_rank(rank: int) -> dict[str, Any]:
        mesh = build_mesh(2, 2, 1)
        engine = engine_of(run, mesh)
        terms = pretraining_terms(run.model, [*DOMAINS, "silent"])
        report = train_step(engine, terms, mesh, my_batches(run, mesh, 0), 1e-2)
        return {name: value.tolist() for name, value in report.measures.items()} | {"norm": report.grad_norm}

    reports = run_on_ranks(on_rank, 4)
    assert all(str(report) == str(reports[0]) for report in reports)  # str: a domain without tokens is nan
    report, batch = reports[0], global_batch(0)
    assert report["labelled_tokens"] == int((batch.labels_BS != -100).sum())
    assert sum(report["expert_load"][0]) == pytest.approx(1.0)
    assert 0 < report["dropped"][0] < batch.tokens_BS.numel() * 2
    silent, per_domain = report["domain_loss/silent"], [report[f"domain_loss/{name}"] for name in DOMAINS]
    assert silent != silent and per_domain[0] != per_domain[1]
    counts = [(batch.labels_BS[d::2] != -100).sum().item() for d in (0, 1)]
    assert sum(n * x for n, x in zip(counts, per_domain)) / sum(counts) == pytest.approx(report["lm_loss"])


def test_domain_losses_are_means_over_their_own_tokens():
    run = run_of(2, 1, 1)
    batch = global_batch(0)
    loss_T = transformer_of(run, Mesh())(batch.tokens_BS, batch.positions_BS, batch.labels_BS).loss_T
    per_row = loss_T.view(batch.labels_BS.shape).sum(1)
    wanted = [float(per_row[d::2].sum() / (batch.labels_BS[d::2] != -100).sum()) for d in (0, 1)]

    def on_rank(rank: int) -> list[float]:
        mesh = build_mesh(2, 1, 1)
        report = step_of(run, mesh)
        return [float(report.measures[f"domain_loss/{name}"]) for name in DOMAINS]

    for losses in run_on_ranks(on_rank, 2):
        assert losses == pytest.approx(wanted, rel=1e-5)


def test_expert_bias_moves_once_per_step_towards_the_mean():
    """From the counts of all micro-batches and data ranks together; sign of the shortfall; nothing when off."""
    run = run_of(2, 2, 1, accumulation=2, model={"expert_bias_update_rate": 0.01, "router_aux_loss": "none"})

    def on_rank(rank: int) -> tuple[list[float], list[float], list[float]]:
        mesh = build_mesh(2, 2, 1)
        engine = engine_of(run, mesh)
        terms = pretraining_terms(run.model)
        report = train_step(engine, terms, mesh, my_batches(run, mesh, 0), 1e-2, bias_rate=0.01)
        first = report.measures["expert_load"][0]
        after = engine.routers[0].expert_bias.clone()
        evaluate(engine, mesh, my_batches(run, mesh, 1))  # looks at no bias
        return first.tolist(), after.tolist(), engine.routers[0].expert_bias.tolist()

    for load, bias, later in run_on_ranks(on_rank, 4):
        wanted = [0.01 * ((x < 0.25) - (x > 0.25)) for x in load]
        assert bias == pytest.approx(wanted) and any(wanted) and later == bias


def test_evaluate_is_the_mean_over_all_tokens():
    """Also of each domain."""
    run = run_of(2, 2, 1, model={"router_jitter_noise": 0.3})
    model = transformer_of(run, Mesh()).eval()
    total = torch.zeros(2, 2, dtype=torch.float64)  # domain; loss, labels
    for step in (5, 6):
        batch = global_batch(step)
        loss_BS = model(batch.tokens_BS, batch.positions_BS, batch.labels_BS).loss_T.double().view_as(batch.tokens_BS)
        rows = torch.stack([loss_BS.sum(1), (batch.labels_BS != -100).sum(1).double()], 1)
        total.index_add_(0, batch.domain_B, rows)

    def on_rank(rank: int) -> tuple[dict[str, float], bool, bool]:
        mesh = build_mesh(2, 2, 1)
        engine = engine_of(run, mesh)
        before = parameters_of(engine)
        found = evaluate(engine, mesh, (b for step in (5, 6) for b in my_batches(run, mesh, step)), domains=["a", "b"])
        assert found is not None
        return found, engine.routers[0].training, all(torch.equal(p, before[n]) for p, n in engine.names.items())

    mean = total.sum(0)
    wanted = [float(loss / labels) for loss, labels in (mean, *total)]
    for found, training, untouched in run_on_ranks(on_rank, 4):
        assert found == pytest.approx(dict(zip(["loss", "domain_loss/a", "domain_loss/b"], wanted)), rel=1e-6)
        assert training and untouched


def test_global_balance_needs_no_second_truth():
    """Accumulation 4 equals accumulation 1 for the global loss; the loss per micro-batch is another number."""

    def on_rank(rank: int) -> dict[str, list[float]]:
        values: dict[str, list[float]] = {}
        for name in ("global_batch", "micro_batch"):
            for accumulation in (1, 4):
                run = run_of(accumulation=accumulation, model={"router_aux_loss": name})
                values.setdefault(name, []).append(float(step_of(run, Mesh()).measures["aux_loss"]))
        return values

    (values,) = run_on_ranks(on_rank, 1)
    assert values["global_batch"][0] == pytest.approx(values["global_batch"][1], rel=1e-6)
    assert values["micro_batch"][0] != pytest.approx(values["micro_batch"][1], rel=1e-3)


def test_model_of_the_tests_routes_unevenly():
    """The comparisons above would prove little with one expert's worth of routing."""
    batch = global_batch(0)
    (stats,) = transformer_of(run_of(), Mesh())(batch.tokens_BS, batch.positions_BS, batch.labels_BS).stats
    count = stats.count_NBE.sum((0, 1))
    assert len(count) == MODEL.num_local_experts and count.max() > 1.1 * count.min() > 0


def test_case_23_the_norm_of_a_gradient_of_millions_is_exact():
    """torch's own on CPU is off by 1e-4 with four million elements, and by percents with those of Llama-3."""
    engine = engine_of(run_of(model={"vocab_size": 1 << 17}), Mesh())
    for number, parameter in enumerate(engine.names):
        draw = torch.Generator().manual_seed(number)
        parameter.grad = torch.randn(parameter.shape, generator=draw) * 1e-3
    truth = sum(float(p.grad.double().square().sum()) for p in engine.names if p.grad is not None) ** 0.5
    assert engine.step(0.0).grad_norm == pytest.approx(truth, rel=1e-7)


@pytest.mark.parametrize("layout", [(1, 1, 1), (2, 2, 1)])
def test_routers_and_experts_may_learn_at_rates_of_their_own(layout: tuple[int, int, int]):
    """Adam's first step moves each weight by its rate, where its gradient is not small."""
    run = run_of(*layout, zero=2 if layout != (1, 1, 1) else 0)
    optimizer = run.optimizer.model_copy(update={"router_lr_factor": 4.0, "expert_lr_factor": 0.5, "weight_decay": 0.0})
    run = run.model_copy(update={"optimizer": optimizer})

    def on_rank(rank: int) -> dict[str, float]:
        mesh = build_mesh(*layout)
        engine = engine_of(run, mesh)
        before = parameters_of(engine)
        train_step(engine, pretraining_terms(run.model), mesh, my_batches(run, mesh, 0), 1e-3)
        return {name: float((p.detach() - before[name]).abs().max()) for p, name in engine.names.items()}

    for moved in run_on_ranks(on_rank, layout[0] * layout[1]):
        for name, most in moved.items():
            rate = 4e-3 if "router" in name else 5e-4 if ".experts." in name else 1e-3
            assert most == pytest.approx(rate, rel=1e-2), name
