"""Some of the fuzzer's cases, and that it sees a wrong result. More of them: tests/tools/test_kernels_sanitize.py."""

import pytest
import torch

from moe_engine import ops
from tests.ops import fuzz

pytestmark = pytest.mark.skipif(not ops.compiled, reason="moe_engine._C was not built")


@pytest.mark.parametrize("first", range(10_000, 10_600, 100))
def test_case_24_random_cases_agree_with_the_reference(first: int) -> None:
    for seed in range(first, first + 100):
        fuzz.check(seed)


def test_case_24_a_wrong_result_is_named_with_its_seed_and_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3, 8)

    def wrong(x: torch.Tensor) -> torch.Tensor:
        return x + 1e-3 * (x.dtype == torch.float32)

    monkeypatch.setattr(fuzz, "draw", lambda seed: fuzz.Fuzz(wrong, (x,), [False], 1e-6, 2))
    with pytest.raises(AssertionError, match=r"seed 5: result 0 of wrong differs by .*2 threads, .*float32\[3, 8\]"):
        fuzz.check(5)


@pytest.mark.parametrize("seed", range(20))
def test_case_24_a_case_is_its_seed(seed: int) -> None:
    one, other = fuzz.draw(seed), fuzz.draw(seed)
    assert list(map(fuzz.describe, one.args)) == list(map(fuzz.describe, other.args))
    for a, b in zip(one.args, other.args, strict=True):
        assert not isinstance(a, torch.Tensor) or torch.equal(a.nan_to_num(), b.nan_to_num())
