"""Shares follow the weights, without a fixed pattern, from any state."""

import json

import pytest

from moe_engine.data.mixture import Mixture
from moe_engine.errors import ConfigError

WEIGHTS = [[1.0], [0.5, 0.5], [0.7, 0.2, 0.1], [5, 3, 1, 1], [0.001, 0.999], [1e-6, 1, 2, 3, 4, 5, 6], [1] * 40]


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("seed", [0, 7])
def test_shares_over_any_prefix(weights: list[float], seed: int) -> None:
    mixture = Mixture(weights, seed)
    counts = [0] * len(weights)
    for n, (domain, before) in enumerate(mixture.draw(20_000), 1):
        assert before == counts[domain]
        counts[domain] += 1
        if n % 1000 == 0:
            for count, weight in zip(counts, mixture.weights):
                assert abs(count - weight * n) < 4, (n, counts)
                assert abs(count / n - weight) < 0.015


def test_order_is_one_sequence_however_it_is_drawn() -> None:
    whole = Mixture([3, 2, 1], 5).draw(1000)
    mixture = Mixture([3, 2, 1], 5)
    assert [draw for size in (1, 99, 300, 600) for draw in mixture.draw(size)] == whole
    assert Mixture([3, 2, 1], 6).draw(1000) != whole
    assert Mixture([300, 200, 100], 5).draw(1000) == whole


def test_no_rank_always_gets_the_same_domain() -> None:
    drawn = [domain for domain, _ in Mixture([1, 1], 0).draw(4000)]
    even = drawn[::2].count(0) / 2000
    assert 0.4 < even < 0.6


def test_state_resumes_exactly() -> None:
    mixture = Mixture([0.6, 0.3, 0.1], 1)
    mixture.draw(777)
    state = json.loads(json.dumps(mixture.state()))
    expected = mixture.draw(500)
    other = Mixture([1, 1, 1], 1)
    other.load_state(state)
    assert other.draw(500) == expected


def test_weights_change_on_the_way() -> None:
    mixture = Mixture([0.5, 0.5, 0.0], 0)
    assert {domain for domain, _ in mixture.draw(100)} == {0, 1}
    mixture.set_weights([0.1, 0.1, 0.8])
    drawn = mixture.draw(1000)
    assert [abs(sum(d == i for d, _ in drawn) - share) < 4 for i, share in enumerate([100, 100, 800])] == [True] * 3
    assert drawn[0][1] == 50 or drawn[0][0] == 2  # a domain goes on where it was
    with pytest.raises(ValueError, match="2 weights for 3"):
        mixture.set_weights([1, 1])


@pytest.mark.parametrize("weights", [[], [0, 0], [1, -1], [float("nan")], [float("inf"), 1]])
def test_bad_weights_are_refused(weights: list[float]) -> None:
    with pytest.raises(ConfigError, match="domain weights"):
        Mixture(weights, 0)
