"""Something not finite anywhere: no rank steps, nothing is left behind, and the report says where it came from."""

from typing import Any

import pytest
import torch
from torch import Tensor

from moe_engine.parallel.local_ranks import run_on_ranks
from moe_engine.parallel.mesh import Mesh, build_mesh
from moe_engine.parallel.weight import note_of
from moe_engine.train.session import make_engine
from moe_engine.train.terms import pretraining_terms
from tests.train.small import my_batches, parameters_of, run_of, train_step, transformer_of

EXPERT, DENSE = "layers.1.ffn.experts.w_down", "layers.0.attention.q.weight"
LONG = pytest.mark.slow
KINDS = [
    *({"zero": zero} for zero in (0, 1, 2)),
    {"zero": 2, "precision": "bf16"},
    pytest.param({"zero": 2, "offload_optimizer": True}, marks=LONG),
    pytest.param({"zero": 1, "precision": "bf16"}, marks=LONG),
]


class Fault:
    """Spoils one parameter's gradient, or the loss, of one rank while it is armed."""

    def __init__(self, model: torch.nn.Module, where: str, here: bool, value: float):
        self.armed, self.here, self.value = False, here, value
        if where == "loss":
            model.register_forward_hook(self.on_loss)
        else:
            dict(model.named_parameters())[where].register_hook(self.on_gradient)

    def on_gradient(self, grad: Tensor) -> Tensor | None:
        if not (self.armed and self.here):
            return None
        spoiled = grad.clone()
        spoiled.view(-1)[-1] = self.value
        return spoiled

    def on_loss(self, module: Any, inputs: Any, output: Any) -> Any:
        if not (self.armed and self.here):
            return None
        spoiled_T = torch.cat([output.loss_T[:-1], output.loss_T[-1:] * self.value])
        return output._replace(loss_T=spoiled_T)


def train(mesh: Mesh, settings: dict[str, Any], where: str, bad_rank: int, value: float, faulty: bool):
    """A good step, (a spoiled one,) another good one: reports, and the weights after each."""
    run = run_of(mesh.dp.size, mesh.ep.size, mesh.tp.size, accumulation=2, **settings)
    model = transformer_of(run, mesh)
    fault = Fault(model, where, mesh.world.rank == bad_rank, value)
    engine = make_engine(model, run, mesh)
    reports, weights = [], []
    for step, spoil in ((0, False), (1, True), (2, False)) if faulty else ((0, False), (2, False)):
        fault.armed = spoil
        reports.append(train_step(engine, pretraining_terms(run.model), mesh, my_batches(run, mesh, step), 1e-2))
        weights.append(parameters_of(engine))
    engine.close()
    return reports, weights


def check(settings: dict[str, Any], layout: tuple[int, int, int], where: str, bad_rank: int, value: float) -> None:
    def on_rank(rank: int) -> str | None:
        mesh = build_mesh(*layout)
        reports, weights = train(mesh, settings, where, bad_rank, value, faulty=True)
        clean, wanted = train(mesh, settings, where, bad_rank, value, faulty=False)
        assert [report.skipped is None for report in reports] == [True, False, True]
        for name, before in weights[0].items():
            assert torch.equal(weights[1][name], before), f"{name} moved in the skipped step"
            assert torch.equal(weights[2][name], wanted[1][name]), f"{name} remembers the skipped step"
        assert reports[2].grad_norm == clean[1].grad_norm
        assert not torch.tensor(reports[1].grad_norm).isfinite()
        return reports[1].skipped

    lines = run_on_ranks(on_rank, layout[0] * layout[1] * layout[2])
    assert len(set(lines)) == 1, lines
    # over the all-to-all a bad loss spoils the experts' gradients of other ranks too: the cause is what is named
    what = "the loss" if where == "loss" else f"the gradient of {where}"
    assert lines[0] == f"not finite: {what} on rank {bad_rank}"


@pytest.mark.parametrize("settings", KINDS, ids=str)
def test_bad_expert_gradient_on_one_rank(settings: dict[str, Any]):
    check(settings, (2, 2, 1), EXPERT, 2, float("nan"))


@pytest.mark.parametrize("settings", [{"zero": 0}, {"zero": 2}, {"zero": 2, "precision": "bf16"}], ids=str)
def test_bad_dense_gradient_on_one_rank(settings: dict[str, Any]):
    check(settings, (1, 2, 1), DENSE, 1, float("inf"))


@pytest.mark.parametrize("settings", [KINDS[0], KINDS[3], *(pytest.param(k, marks=LONG) for k in KINDS[1:3])], ids=str)
def test_bad_loss_on_one_rank(settings: dict[str, Any]):
    check(settings, (1, 2, 1), "loss", 1, float("nan"))


@pytest.mark.parametrize("settings", [{"zero": 0}, {"zero": 2}], ids=str)
def test_bad_gradient_under_tensor_parallelism(settings: dict[str, Any]):
    check(settings, (1, 1, 2), EXPERT, 1, float("nan"))


def test_parameters_of_the_test_exist():
    notes = {name: note_of(p) for name, p in transformer_of(run_of(), Mesh()).named_parameters()}
    assert notes[EXPERT].expert and not notes[DENSE].expert


def test_a_batch_without_labels_is_skipped_and_named():
    def on_rank(rank: int) -> tuple[str | None, float]:
        mesh = build_mesh(1, 2, 1)
        run = run_of(1, 2, 1)
        engine = make_engine(transformer_of(run, mesh), run, mesh)
        before = {name: p.detach().clone() for p, name in engine.names.items()}
        blank = [b._replace(labels_BS=torch.full_like(b.labels_BS, -100)) for b in my_batches(run, mesh, 0)]
        report = train_step(engine, pretraining_terms(run.model), mesh, blank, 1e-2)
        assert all(torch.equal(p, before[name]) for p, name in engine.names.items())
        return report.skipped, float(report.measures["lm_loss"])

    for why, loss in run_on_ranks(on_rank, 2):
        assert why == "no token of the global batch has a label" and loss != loss
