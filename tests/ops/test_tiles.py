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


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_the_baseline_is_everywhere_and_other_names_are_nowhere(dtype: torch.dtype) -> None:
    a = torch.ones(1, 1, dtype=dtype)
    assert len(torch.ops.moe_engine.tile_products("baseline", a, a)) == 4
    assert torch.ops.moe_engine.tile_products("mmx", a, a) == []
