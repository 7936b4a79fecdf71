"""The learning rate against the published golden values and against transformers' own schedule."""

import pytest
import torch

from moe_engine.config import Optimizer
from moe_engine.train.schedule import learning_rate


@pytest.mark.parametrize(
    ("step", "wanted"), [(0, 0.0), (1, 6.6667e-07), (15, 1e-05), (82, 5.0581763e-06), (149, 1.3538e-09)]
)
def test_goldens(step: int, wanted: float):
    assert learning_rate(step, 150, Optimizer(lr=1e-5, warmup_steps=15)) == pytest.approx(wanted, rel=5e-5, abs=1e-20)


@pytest.mark.parametrize(("steps", "warmup"), [(150, 15), (20, 0), (7, 7), (1, 0), (1, 1), (30, 29)])
def test_every_step_equals_transformers(steps: int, warmup: int):
    optimization = pytest.importorskip("transformers.optimization")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=3e-4)
    schedule = optimization.get_cosine_schedule_with_warmup(optimizer, warmup, steps)
    for step in range(steps):
        ours = learning_rate(step, steps, Optimizer(lr=3e-4, warmup_steps=warmup))
        assert ours == pytest.approx(schedule.get_last_lr()[0], abs=1e-18), step
        optimizer.step()
        schedule.step()


def test_falls_to_min_lr_and_stays_there():
    optimizer = Optimizer(lr=1e-3, min_lr=1e-4, warmup_steps=2)
    rates = [learning_rate(step, 12, optimizer) for step in range(13)]
    assert rates[:3] == [0.0, 5e-4, 1e-3] and rates[12] == pytest.approx(1e-4)
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert learning_rate(50, 12, optimizer) == pytest.approx(1e-4)
