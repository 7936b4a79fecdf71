"""The faults of settings and of numbers: the engine survives them, and with a rule taken away each of them notices."""

from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_engine.checkpoint import resume_checks
from moe_engine.config import checks, command_line, messages
from moe_engine.config.section import OnResume, Setting
from moe_engine.model.moe import Router
from moe_engine.train import step
from moe_engine.train.deepspeed_engine import DeepSpeedEngine
from moe_engine.train.engine import StepOutcome
from tests.faults import numbers
from tests.faults.arena import Arena
from tests.faults.numbers import NUMBERS
from tests.faults.settings import SETTINGS, dealt, faults_of, misspelt, random_wish, remedies_of

FAULTS = SETTINGS | NUMBERS
Failures = Callable[[str, int], list[str]]


@pytest.fixture
def failures(tmp_path: Path) -> Iterator[Failures]:
    """What was lost in `count` injections of a fault."""
    arena = Arena(tmp_path)

    def inject(fault: str, count: int) -> list[str]:
        answers = list(FAULTS[fault].inject(arena, count))
        assert len(answers) == count
        return [answer for answer in answers if answer]

    yield inject
    arena.close()


COUNTS = {"E1": 30, "E2": SETTINGS["E2"].ci, "E3": 100, "D1": 1, "D3": 4}


@pytest.mark.parametrize("fault", FAULTS)
def test_nothing_is_lost(failures: Failures, fault: str) -> None:
    assert failures(fault, COUNTS[fault]) == []


def test_a_forgotten_rule_is_noticed(failures: Failures, monkeypatch: pytest.MonkeyPatch) -> None:
    real = checks.tp_must_divide
    monkeypatch.setattr(checks, "tp_must_divide", lambda run: {k: v for k, v in real(run).items() if k != "vocab_size"})
    assert any("accepted, but wrong is ['parallel.tp']" in line for line in failures("E1", 60))


def test_a_rule_too_many_is_noticed(failures: Failures, monkeypatch: pytest.MonkeyPatch) -> None:
    real = checks.tp_must_divide
    monkeypatch.setattr(checks, "tp_must_divide", lambda run: real(run) | {"hidden_size / 3": 3})
    assert any("refused, but wrong is nothing" in line for line in failures("E1", 60))


@pytest.mark.parametrize("wrong", [lambda valid: [*valid, 7], lambda valid: valid[:-1] or valid])
def test_bad_advice_is_noticed(failures: Failures, monkeypatch: pytest.MonkeyPatch, wrong: Any) -> None:
    real = checks.numbers
    monkeypatch.setattr(checks, "numbers", lambda valid: real(wrong(valid)))
    assert failures("E1", 30)


def test_a_change_that_is_not_told_is_noticed(failures: Failures, monkeypatch: pytest.MonkeyPatch) -> None:
    told = resume_checks.setting_of
    other: dict[str, OnResume] = {"out": "warn", "weight_decay": "free"}

    def mistold(section: str, key: str) -> Setting:
        about = told(section, key)
        return about._replace(on_resume=other.get(key, about.on_resume))

    monkeypatch.setattr(resume_checks, "setting_of", mistold)
    lost = failures("E2", SETTINGS["E2"].ci)
    assert [line.partition(",")[0] for line in lost] == ["optimizer.weight_decay", "train.out"]


def test_wrong_suggestions_are_noticed(failures: Failures, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((messages, "nearest"), (command_line, "nearest_name")):
        monkeypatch.setattr(module, name, lambda word, valid: next(iter(valid)))
    assert len(failures("E3", 100)) > 50


def test_an_accepted_typo_is_noticed(failures: Failures, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command_line, "unknown_flags", lambda rest, parser: [])
    assert all(line.endswith("accepted") for line in failures("E3", 3)) and failures("E3", 3)


def test_a_skip_without_a_name_is_noticed(failures: Failures, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "why_skipped", lambda *_: "not finite: a gradient")
    assert "rank 0 said" in failures("D1", 1)[0]


def test_a_weight_that_moves_in_a_skipped_step_is_noticed(failures: Failures, monkeypatch: pytest.MonkeyPatch) -> None:
    real = DeepSpeedEngine.step

    def moving(self: DeepSpeedEngine, lr: float) -> StepOutcome:
        outcome = real(self, lr)
        if outcome.skipped and self.mesh.world.rank == 1:
            next(iter(self.names)).data.view(-1)[0] += 1
        return outcome

    monkeypatch.setattr(DeepSpeedEngine, "step", moving)
    assert "rank 1 stood still in steps [], spoiled were [2" in failures("D1", 1)[0]


def test_a_capacity_that_drops_nothing_is_noticed(failures: Failures, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numbers, "LOADS", [load for load in numbers.LOADS if load.capacity])
    monkeypatch.setattr(Router, "_overflow", lambda *_: None)
    assert "the gradient of" in failures("D3", 1)[0]


def test_a_gradient_of_the_wrong_size_is_noticed(failures: Failures, monkeypatch: pytest.MonkeyPatch) -> None:
    real: Any = DeepSpeedEngine.gradients

    def doubled(self: DeepSpeedEngine) -> dict[str, Tensor]:
        return {name: 2 * grad if "experts" in name else grad for name, grad in real(self).items()}

    monkeypatch.setattr(DeepSpeedEngine, "gradients", doubled)
    assert "experts.w_gate_up is off by 1.0e+00" in failures("D3", 1)[0]


def test_wishes_are_of_every_kind() -> None:
    draw = Random(0)
    wrong = [faults_of(random_wish(draw)) for _ in range(300)]
    assert 50 < sum(not keys for keys in wrong) < 150 and len({key for keys in wrong for key in keys}) == 7
    assert dealt(6, 3) and not dealt(6, 4) and not dealt(2, 3)


def test_advice_is_read_as_it_is_written() -> None:
    assert remedies_of("parallel.ep: found 3, ...: valid ep with tp 2: 1, 2") == [{"ep": 1}, {"ep": 2}]
    assert remedies_of("...: valid ep x tp are 1 x 2, 4 x 1") == [
        {"ep": 1, "tp": 2, "dp": None},
        {"ep": 4, "tp": 1, "dp": None},
    ]
    assert remedies_of("model.num_experts_per_tok 9 is ...: valid are 1 to 2") == [{"top_k": 1}, {"top_k": 2}]
    assert remedies_of("parallel.zero: found 3 with ep 2, expected 0, 1 or 2: ...") == [
        {"zero": zero} for zero in (0, 1, 2)
    ]


def test_typos_are_one_edit_away() -> None:
    draw = Random(0)
    for _ in range(300):
        wrong = misspelt("parallel.ep", draw, ["parallel.dp"])
        assert messages.edits(wrong, "parallel.ep") == 1 and wrong != "parallel.dp"


def test_a_difference_that_is_no_number_is_the_worst() -> None:
    one = torch.ones(2)
    assert numbers.relative(one * float("nan"), one) == numbers.relative(one, 0 * one) == float("inf")
    assert numbers.relative(0 * one, 0 * one) == 0.0
