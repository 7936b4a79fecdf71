"""Seeded shuffling that is the same on every machine."""

import numpy as np
import pytest

from moe_engine.data.order import hash64, permutation, stable_key


def splitmix64(x: int, key: int) -> int:
    """The published function on plain integers."""
    mask = (1 << 64) - 1
    x = (x * 0x9E3779B97F4A7C15 + key) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


@pytest.mark.parametrize("key", [0, 1, 2**64 - 1, stable_key(3, "web", 0)])
def test_hash_equals_integers(key: int) -> None:
    values = np.array([0, 1, 2, 77, 2**63, 2**64 - 1], np.uint64)
    assert hash64(values, key).tolist() == [splitmix64(int(v), key) for v in values]


@pytest.mark.parametrize("count", [0, 1, 2, 3, 1000])
def test_permutation_is_one(count: int) -> None:
    assert sorted(permutation(count, 5).tolist()) == list(range(count))


def test_permutation_is_fixed_and_even() -> None:
    assert permutation(8, 0).tolist() == sorted(range(8), key=lambda i: splitmix64(i, 0))
    first = np.bincount([int(permutation(4, key)[0]) for key in range(4000)], minlength=4)
    assert np.abs(first / 4000 - 0.25).max() < 0.03


def test_key_depends_on_every_part() -> None:
    parts = [(1, "a", 2), (1, "a", 3), (2, "a", 2), (1, "b", 2), (1, "a2"), (1, "a", "2", "")]
    assert len({stable_key(*part) for part in parts}) == len(parts)
    assert stable_key(1, "a") == 0x32FA4ABD88BEA8AA  # the same on every machine
