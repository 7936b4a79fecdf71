"""Supervised routing (S1.21 to S1.24): goldens, gradients, the same on every layout, and off without a trace."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import moe_engine
from moe_engine import ExpertLabelEmbedding, compute_routing_supervision_loss, get_expert_utilization_stats
from moe_engine.config.supervision import Supervision
from moe_engine.data.loader import Batch
from moe_engine.errors import ConfigError
from moe_engine.labels import LABEL_EMBEDDING
from moe_engine.model.supervision import label_kl
from moe_engine.parallel.local_ranks import run_on_ranks
from moe_engine.parallel.mesh import Mesh, build_mesh
from moe_engine.train.session import make_engine
from moe_engine.train.step import accumulate
from moe_engine.train.supervised_wrapper import SupervisedMoEWrapper
from moe_engine.train.supervision import labels_of, supervision_terms
from moe_engine.train.terms import pretraining_terms
from tests.train.small import global_batch, part_of, relative, run_of, train_step, transformer_of

Layout = tuple[int, int, int]
NAMES = ("a", "b", "c")


def labelled(batch: Batch) -> Batch:
    """Every third token has no label."""
    place = torch.arange(batch.tokens_BS.shape[1]).expand_as(batch.tokens_BS)
    label_BS = (batch.tokens_BS[:, :1] + torch.arange(len(batch.tokens_BS)).unsqueeze(1)) % 3
    return batch._replace(expert_label_BS=torch.where(place % 3 == 2, -1, label_BS.expand_as(place)))


def supervised(run: Any, **changes: Any) -> Any:
    return run.model_copy(update={"supervision": Supervision(**{"routing_weight": 0.2} | changes)})


def test_goldens() -> None:
    logits, prefs = torch.tensor([[2.0, 0, 0, 0]]), torch.tensor([[0.0, 1, 0, 3]])
    label = torch.zeros(1, dtype=torch.int64)
    assert float(label_kl(prefs, [logits], label, "mean")) == pytest.approx(1.5880420, abs=1e-5)
    assert float(label_kl(logits, [prefs], label, "mean")) == pytest.approx(1.9076929, abs=1e-5)


@pytest.mark.parametrize("aggregation", ["per_layer", "mean", "sum", "last"])
def test_the_formula_in_fp64(aggregation: Any) -> None:
    torch.manual_seed(0)
    table, layers = torch.randn(3, 8), [torch.randn(7, 8, requires_grad=True) for _ in range(4)]
    label = torch.tensor([0, 2, -1, 1, 1, -1, 0])
    (label_kl(table, layers, label, aggregation).sum()).backward()
    found = [layer.grad.double() for layer in layers if layer.grad is not None]
    doubles = [layer.detach().double().requires_grad_() for layer in layers]
    stacked = torch.stack(doubles)
    kinds = {"mean": [stacked.mean(0)], "sum": [stacked.sum(0)], "last": [doubles[-1]]}
    p = table.double().softmax(-1)
    total = torch.zeros((), dtype=torch.float64)
    chosen = kinds.get(aggregation, doubles)
    for logits in chosen:
        for t, c in enumerate(label.tolist()):
            if c >= 0:
                total = total + F.kl_div(logits[t].log_softmax(-1), p[c], reduction="sum") / len(chosen)
    total.backward()
    assert float(label_kl(table, layers, label, aggregation).sum()) == pytest.approx(float(total), rel=1e-6)
    for ours, leaf in zip(found, [d for d in doubles if d.grad is not None], strict=aggregation != "last"):
        torch.testing.assert_close(ours, leaf.grad, rtol=1e-5, atol=1e-7)


def test_large_logits_stay_finite() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0, 5.0]], requires_grad=True)
    embedding = ExpertLabelEmbedding(2, 4)
    loss = compute_routing_supervision_loss([logits.unsqueeze(0)], torch.tensor([1]), embedding)
    loss.backward()
    assert math.isfinite(float(loss)) and logits.grad is not None and logits.grad.isfinite().all()


def test_the_embedding_starts_as_its_source_does() -> None:
    embedding = ExpertLabelEmbedding(4, 8)
    bound = math.sqrt(6 / 12)
    assert float(embedding.weight.abs().max()) <= bound and float(embedding.weight.abs().max()) > 0.9 * bound
    assert float(embedding.weight.std()) == pytest.approx(bound / math.sqrt(3), rel=0.3)
    assert (embedding.bias == 0.1).all() and embedding(torch.tensor([[1, 3]])).shape == (1, 2, 8)


def test_the_loss_of_sequences_masks_padding() -> None:
    torch.manual_seed(1)
    embedding, logits = ExpertLabelEmbedding(4, 8), [torch.randn(2, 5, 8) for _ in range(3)]
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    whole = compute_routing_supervision_loss([(x, None) for x in logits], torch.tensor([2, -1]), embedding, mask)  # type: ignore[list-item]
    alone = compute_routing_supervision_loss([x[:1, :3] for x in logits], torch.tensor([2]), embedding)
    assert float(whole) == pytest.approx(float(alone), rel=1e-6)
    none = compute_routing_supervision_loss(logits, torch.tensor([-1, -1]), embedding)
    assert float(none) == 0.0


def test_utilisation() -> None:
    logits = [torch.tensor([[[3.0, 2, 1, 0], [0, 1, 2, 3], [3, 0, 2, 1]]])]
    found = get_expert_utilization_stats(logits, top_k=2)
    assert found["percent"].tolist() == pytest.approx([100 / 3, 100 / 6, 100 / 3, 100 / 6])  # type: ignore[union-attr]
    tokens = get_expert_utilization_stats(logits, top_k=2, basis="tokens", attention_mask=torch.tensor([[1, 1, 0]]))
    assert tokens["percent"].tolist() == [50.0] * 4 and tokens["variance"] == 0.0  # type: ignore[union-attr]
    assert found["counts_per_layer"].tolist() == [[2, 1, 2, 1]]  # type: ignore[union-attr]
    assert moe_engine.SupervisedMoEWrapper is SupervisedMoEWrapper
    with pytest.raises(AttributeError):
        moe_engine.nothing  # noqa: B018


@pytest.mark.parametrize("aggregation", ["per_layer", "mean"])
@pytest.mark.parametrize("layout", [(2, 1, 1), (1, 2, 1), (1, 1, 2), (1, 2, 2)])
def test_every_layout_gives_the_gradients_of_one_process(layout: Layout, aggregation: Any) -> None:
    """Of every weight, the label embedding's too; with two micro-batches."""
    small = {"num_hidden_layers": 2, "moe_layers": (0, 1)}
    run = supervised(run_of(*layout, accumulation=2, model=small), aggregation=aggregation)
    alone = run_of(model=small)
    model = transformer_of(alone, Mesh())
    wrapper = SupervisedMoEWrapper(model, NAMES, 0.2, seed=run.train.seed)
    wrapper.terms[-1].settings = run.supervision  # type: ignore[attr-defined]
    batch = labelled(global_batch(0))
    loss = wrapper(batch)
    loss.backward()
    truth = {name.removeprefix("model."): p.grad for name, p in wrapper.named_parameters()}

    def on_rank(rank: int) -> None:
        mesh = build_mesh(*layout)
        ours = transformer_of(run, mesh)
        taught = supervision_terms(run, ours, NAMES, (), mesh.tp)
        engine = make_engine(ours, run, mesh)
        size, dp = run.train.micro_batch, mesh.data.size
        whole = labelled(global_batch(0))
        starts = [(a * dp + mesh.data.rank) * size for a in range(2)]
        batches = [Batch(*(field[s : s + size] for field in whole)) for s in starts]
        tally = accumulate(engine, (*pretraining_terms(run.model), *taught), mesh, batches)
        tally.reduce(mesh.data)
        assert float(tally.sums["loss"]) == pytest.approx(float(loss.detach()), rel=1e-6)
        gradients = engine.gradients()
        assert any(name.startswith(LABEL_EMBEDDING) for name in gradients)
        for parameter, name in engine.names.items():
            wanted = truth[name]
            assert wanted is not None
            assert relative(gradients[name], part_of(wanted, parameter)) < 1e-5, name

    run_on_ranks(on_rank, math.prod(layout))


def test_a_fixed_target_moves_routers_alone(tmp_path: Path) -> None:
    """And what feeds them; the accuracy rises to 1 and the loss falls under half."""
    (tmp_path / "map.yaml").write_text("a: [0, 1]\nb: [2, 3]\nc: [1, 2]\n")
    fixed = {"target": "fixed", "map": str(tmp_path / "map.yaml"), "routing_weight": 0.5}
    run = supervised(run_of(model={"num_hidden_layers": 2, "moe_layers": (0, 1), "router_aux_loss_coef": 0.0}), **fixed)

    def on_rank(rank: int) -> None:
        model = transformer_of(run, Mesh())
        terms = supervision_terms(run, model, NAMES, (), Mesh().tp)
        assert not hasattr(model, LABEL_EMBEDDING)
        engine = make_engine(model, run, Mesh())
        batch = labelled(global_batch(0))
        accumulate(engine, terms, Mesh(), [batch])
        moved = {name for p, name in engine.names.items() if p.grad is not None and bool((p.grad != 0).any())}
        assert {name for name in moved if "router" in name} == {f"layers.{i}.ffn.router.weight" for i in range(2)}
        assert not any(
            "head" in name or name == "norm.weight" or name.startswith("layers.1.ffn.experts") for name in moved
        )
        engine.optimizer.zero_grad()
        reports = [train_step(engine, terms, Mesh(), [batch], 3e-2) for _ in range(60)]
        first, last = (report.measures for report in (reports[0], reports[-1]))
        assert float(last["routing_supervision_loss"]) < 0.5 * float(first["routing_supervision_loss"])
        assert (last["routing_accuracy"] > 0.9).all() and len(last["routing_accuracy"]) == 2
        names = {key: float(value) for key, value in last.items() if key.startswith("label_accuracy/")}
        assert names.keys() == {f"label_accuracy/{name}" for name in NAMES} and min(names.values()) > 0.9
        assert terms[0].report()[1] == "  a: 0 50 %, 1 50 %, 2 0 %"

    run_on_ranks(on_rank, 1)


def test_without_it_nothing_is_there() -> None:
    run = run_of()
    model = transformer_of(run, Mesh())
    before = sum(p.numel() for p in model.parameters())
    assert supervision_terms(run, model, NAMES, (), Mesh().tp) == () and before == sum(
        p.numel() for p in model.parameters()
    )


def test_a_batch_without_labels_adds_nothing() -> None:
    run = supervised(run_of())

    def on_rank(rank: int) -> None:
        model = transformer_of(run, Mesh())
        terms = (*pretraining_terms(run.model), *supervision_terms(run, model, NAMES, (), Mesh().tp))
        engine = make_engine(model, run, Mesh())
        report = train_step(engine, terms, Mesh(), [global_batch(0)], 1e-3)
        assert report.skipped is None and math.isnan(float(report.measures["routing_supervision_loss"]))

    run_on_ranks(on_rank, 1)


def test_weight_over_time() -> None:
    run = supervised(run_of(), warmup_steps=4, anneal_steps=5)
    model = transformer_of(run, Mesh())
    (term,) = supervision_terms(
        run.model_copy(update={"train": run.train.model_copy(update={"steps": 20})}), model, NAMES, (), Mesh().tp
    )
    found = []
    for step in range(20):
        term.at(step)
        found.append(term.coefficient / 0.2)
    assert found[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0]) and found[5:15] == pytest.approx([1.0] * 10)
    assert found[15:] == pytest.approx([5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])


def test_domains_as_labels() -> None:
    run = supervised(run_of(), by="domain")
    model = transformer_of(run, Mesh())
    (term,) = supervision_terms(run, model, (), ("web", "code"), Mesh().tp)
    batch = global_batch(0)
    batch = batch._replace(labels_BS=batch.labels_BS.index_fill(0, torch.tensor([3]), -100))  # an empty row
    target = term.targets(batch)  # type: ignore[attr-defined]
    assert (target[3] == -1).all() and target[:3].eq(batch.domain_B[:3].unsqueeze(1)).all()


@pytest.mark.parametrize(
    ("settings", "labels", "message"),
    [
        ({}, (), "no sample has an expert_label"),
        ({"labels": ("a", "b")}, NAMES, "supervision.labels: the data has c, expected a, b"),
        ({"labels": ("a",), "unknown_label_as": "z"}, NAMES, "unknown_label_as: found z, expected one of a"),
    ],
)
def test_labels_that_are_not_known(settings: dict[str, Any], labels: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        labels_of(Supervision(routing_weight=0.1, **settings), labels, ())


def test_unknown_labels_may_count_as_one() -> None:
    found = labels_of(Supervision(routing_weight=0.1, labels=("b", "a"), unknown_label_as="a"), NAMES, ())
    assert found.names == ("b", "a") and found.places.tolist() == [1, 0, 1]


@pytest.mark.parametrize("weight", [0.04, 0.6, -0.1])
def test_the_range_of_the_weight(weight: float) -> None:
    """S1.13."""
    with pytest.raises(ValueError, match=r"expected 0 \(off\), or 0.05 to 0.5"):
        Supervision(routing_weight=weight)
