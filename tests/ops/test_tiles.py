"""The tiles of csrc/tiles.cpp and the rows of csrc/swiglu.cpp in every instruction set that this processor has, against
fp64.

An op runs the best of them only."""

import pytest
import torch

from moe_engine import ops

pytestmark = pytest.mark.skipif(not ops.compiled, reason="moe_engine._C was not built")

# relative to the largest value: sums are fp32, two of the four results are rounded to the dtype of the operands
TOLERANCE = {torch.float32: (2e-6, 2e-6), torch.bfloat16: (2e-6, 4e-3), torch.float64: (1e-14, 1e-14)}
VERSIONS = ["avx512_bf16", "avx512", "avx2", "baseline"]
SIZES = [(1, 1, 1), (4, 8, 2), (5, 3, 7), (6, 64, 32), (7, 17, 33), (13, 33, 64), (61, 64, 127), (192, 62, 128)]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize(("m", "n", "k"), SIZES)
def test_every_version_multiplies_and_rounds(m: int, n: int, k: int, dtype: torch.dtype, version: str) -> None:
    generator = torch.Generator().manual_seed(m + n + k)
    a, b = (torch.randn(rows, k, generator=generator).to(dtype) for rows in (m, n))
    found = torch.ops.moe_engine.tile_products(version, a, b)
    if not found:
        pytest.skip(f"this processor has no {version}")
    truth = a.double() @ b.double().T
    for place, result in enumerate(found):
        assert result.dtype == (dtype if place >= 2 else torch.promote_types(dtype, torch.float32))
        error = (result.double() - truth).abs().max() / truth.abs().max()
        assert error <= TOLERANCE[dtype][place // 2], f"result {place}: {error}"


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("width", [1, 7, 8, 31, 32, 33, 200])
def test_every_version_has_swiglu_and_its_gradients(width: int, dtype: torch.dtype, version: str) -> None:
    generator = torch.Generator().manual_seed(width)
    gate_up, grad = (8 * torch.randn(5, columns, generator=generator).to(dtype) for columns in (2 * width, width))
    found = torch.ops.moe_engine.swiglu_rows(version, gate_up, grad.to(torch.promote_types(dtype, torch.float32)), 0.3)
    if not found:
        pytest.skip(f"this processor has no {version}")
    x, s = gate_up.double().requires_grad_(), torch.full((5, 1), 0.3, dtype=torch.float64, requires_grad=True)
    y = s * torch.nn.functional.silu(x[:, :width]) * x[:, width:]
    dx, ds = torch.autograd.grad(y, (x, s), grad.double())
    for place, (result, truth) in enumerate(zip(found, (y, y, dx, ds[:, 0]), strict=True)):
        error = (result.double() - truth).abs().max() / truth.abs().max()
        assert error <= TOLERANCE[dtype][place < 3], f"result {place}: {error}"


NAN, INF = float("nan"), float("inf")
SPECIAL = [NAN, INF, -INF, 0.0, -0.0, 1e-40, -1e-40, 1e-30, 88.0, -88.0, 3e38, -3e38, 1e4, -1e4]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_case_24_every_version_has_the_swiglu_of_special_numbers(dtype: torch.dtype, version: str) -> None:
    """NaN gives NaN and nothing else does but -inf, infinity infinity, and a denormal number half of itself."""
    gate = torch.tensor(SPECIAL).repeat(4).to(dtype)
    gate_up = torch.cat([gate, torch.ones_like(gate)])[None]
    grad = torch.ones(1, len(gate), dtype=torch.promote_types(dtype, torch.float32))
    found = torch.ops.moe_engine.swiglu_rows(version, gate_up, grad, 1.0)
    if not found:
        pytest.skip(f"this processor has no {version}")
    x = gate.double().requires_grad_()
    y = x / (1 + torch.exp(-x))  # NaN at -inf, which is 0 times -inf
    (dx,) = torch.autograd.grad(torch.nn.functional.silu(x).sum(), x)
    usual = x.detach().abs() < 1e5  # elsewhere the formula of the gradient is 0 times infinity, as is the reference's
    for result, truth in ((found[0][0], y), (found[1][0], y), (found[2][0, : len(gate)][usual], dx[usual])):
        torch.testing.assert_close(
            result.double(), truth.detach(), rtol=TOLERANCE[dtype][1], atol=1e-36, equal_nan=True
        )


def exponential(x: torch.Tensor) -> torch.Tensor:
    """exp(x): what the gradient of cross_entropy is where lse = 0 and the label is in another shard."""
    nowhere, zero, one = torch.tensor([-1]), torch.zeros(1), torch.ones(1)
    return torch.ops.moe_engine.cross_entropy_grad(x[None], nowhere, 0, zero, one)[0]


def test_case_24_exp_of_nan_infinities_and_denormal_numbers() -> None:
    found = exponential(torch.tensor([NAN, INF, -INF, 1e-40, -1e-40, 0.0, -0.0, 3e38, -3e38, 89.0, -200.0] * 5))
    truth = torch.tensor([NAN, INF, 0, 1, 1, 1, 1, INF, 0, INF, 0] * 5)
    assert torch.equal(found.isnan(), truth.isnan()) and torch.equal(found.nan_to_num(), truth.nan_to_num())


def test_case_24_exp_is_right_wherever_fp32_has_its_value() -> None:
    """Up to the largest number; below the smallest normal one to the nearest or next denormal one."""
    x = torch.linspace(-110, 88.72, 400_001)
    error = (exponential(x).double() - x.double().exp()).abs()
    assert (error <= (2e-7 * x.double().exp()).clamp(min=2.0**-149)).all()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_the_baseline_is_everywhere_and_other_names_are_nowhere(dtype: torch.dtype) -> None:
    a = torch.ones(1, 1, dtype=dtype)
    assert len(torch.ops.moe_engine.tile_products("baseline", a, a)) == 4
    assert torch.ops.moe_engine.tile_products("mmx", a, a) == []
