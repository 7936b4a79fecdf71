"""Every op and every gradient, on each back-end, against the reference in fp64, for each folder's cases.

The Triton kernels run here where there is a GPU. Where there is none, tests/ops/test_triton.py runs this file with
TRITON_INTERPRET=1, and then they run here on CPU tensors, and nothing else does."""

import contextlib
import functools
import os
import zlib
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_engine import ops
from moe_engine.ops import tune
from moe_engine.ops.parity_case import Case
from tests.ops import interpreter

FOLDERS = ["router_logits", "router_topk", "permute", "grouped_mm", "swiglu", "experts", "cross_entropy"]
MODULES = {folder: import_module(f"moe_engine.ops.{folder}.cases") for folder in FOLDERS}
CASES = [(folder, case) for folder, module in MODULES.items() for case in module.CASES]
DIFFERENTIABLE = {"router_logits", "router_topk", "permute", "unpermute", "grouped_mm", "swiglu", "experts"}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS = [
    "reference",
    pytest.param("compiled", marks=pytest.mark.skipif(not ops.compiled, reason="moe_engine._C was not built")),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
LARGE = int(os.environ.get("INTERPRET_AT_MOST", "60_000"))
if INTERPRETED:
    interpreter.install()
    BACKENDS = ["triton"]


@pytest.fixture(autouse=True)
def unmeasured_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU each kind of launch takes one of its candidates, by the name of its file, so that the cases pass through
    all of them; measuring would take minutes a case, and fill the user's cache with the choices of toy shapes."""
    monkeypatch.setattr(tune, "_read", lambda path: None)
    monkeypatch.setattr(tune, "_measure", lambda path, tiles, run: tiles[zlib.crc32(path.name.encode()) % len(tiles)])
    tune._chosen.cache_clear()


@contextlib.contextmanager
def dirty_memory() -> Iterator[None]:
    """What an op allocates and does not write is NaN (or the largest integer), not the zeros of fresh memory."""
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns, by default
    assert torch.empty(3).isnan().all()
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def run(case: Case, args: tuple, backend: str) -> list[Tensor]:
    """The outputs of the op, then the gradients of its floating inputs for fixed random gradients of the outputs."""
    device = torch.device("cuda" if backend == "cuda" else "cpu")
    args = with_grad(case, tuple(arg.to(device) if isinstance(arg, Tensor) else arg for arg in args))
    forced = ops.use(backend) if backend in ("reference", "triton") else contextlib.nullcontext()
    with dirty_memory(), forced:
        outputs = case.op(*args)
        outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
        roots = [out for out in outputs if out.requires_grad]
        generator = torch.Generator().manual_seed(7)
        seeds = [torch.randn(out.shape, generator=generator).to(out) for out in roots]
        leaves = [arg for arg in args if _floating(arg)]
        grads = torch.autograd.grad(roots, leaves, seeds, allow_unused=True) if roots else []
    return [out.detach().cpu() for out in outputs] + [grad.cpu() for grad in grads if grad is not None]


def _floating(arg: Any) -> bool:
    return isinstance(arg, Tensor) and arg.is_floating_point()


def with_grad(case: Case, args: tuple) -> tuple:
    differentiable = case.op.__name__ in DIFFERENTIABLE
    return tuple(arg.detach().requires_grad_(differentiable) if _floating(arg) else arg for arg in args)


def in_fp64(args: tuple) -> tuple:
    return tuple(arg.double() if _floating(arg) else arg for arg in args)


def assert_close(found: Tensor, truth: Tensor, tolerance: float) -> None:
    assert found.shape == truth.shape
    assert found.is_contiguous()
    if not found.is_floating_point():
        assert torch.equal(found, truth)
        return
    assert torch.equal(found.isnan(), truth.isnan())
    found, truth = found.double().nan_to_num(), truth.nan_to_num()
    assert torch.equal(found.isinf(), truth.isinf())
    if truth.numel():
        assert (found - truth).abs().max() <= tolerance * truth.abs().max().clamp(min=1e-30)


def skip_what_does_not_run(folder: str, case: Case, dtype: torch.dtype, backend: str) -> None:
    if dtype == torch.float16 and (backend == "compiled" or dtype not in MODULES[folder].TOLERANCE):
        pytest.skip("fp16 is tested where matrices are multiplied, and not on the C++ back-end, which has none")
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("the Triton kernels have no fp64")
    if INTERPRETED and sum(arg.numel() for arg in case.inputs(dtype) if isinstance(arg, Tensor)) > LARGE:
        pytest.skip(f"more than {LARGE} numbers take the interpreter minutes: INTERPRET_AT_MOST in the environment")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize(("folder", "case"), CASES, ids=lambda value: getattr(value, "name", value))
def test_values_and_gradients(folder: str, case: Case, dtype: torch.dtype, backend: str) -> None:
    skip_what_does_not_run(folder, case, dtype, backend)
    args = case.inputs(dtype)
    tolerance = MODULES[folder].TOLERANCE.get(dtype, MODULES[folder].TOLERANCE[torch.float32])
    found, truth = run(case, args, backend), run(case, in_fp64(args), "reference")
    assert len(found) == len(truth)
    for one, other in zip(found, truth, strict=True):
        assert_close(one, other, tolerance)


STRIDED = {
    "grouped_mm": "counts [3, 0, 5, 1] beyond 4 N34 K18",
    "permute": "T7 D33 E5 k3 even",
    "experts": "T7 D33 F17 E5 k3 even",
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("folder", "end"), STRIDED.items())
def test_values_and_gradients_with_strided_integers(folder: str, end: str, backend: str) -> None:
    """Counts and orders of rows may be every other number of a longer tensor."""
    (case, *_) = [case for case in MODULES[folder].CASES if case.name.endswith(end) and case.op.__name__ in STRIDED]

    @functools.wraps(case.op)
    def op(*args: Any) -> Any:
        spread = [isinstance(arg, Tensor) and not arg.is_floating_point() for arg in args]
        return case.op(
            *[a.repeat_interleave(2, -1)[..., ::2] if far else a for a, far in zip(args, spread, strict=True)]
        )

    args, tolerance = case.inputs(torch.float32), MODULES[folder].TOLERANCE[torch.float32]
    found, truth = run(case._replace(op=op), args, backend), run(case, in_fp64(args), "reference")
    for one, other in zip(found, truth, strict=True):
        assert_close(one, other, tolerance)


@pytest.mark.skipif(not INTERPRETED, reason="the interpreter measures nothing; a GPU does, in the cases above")
@pytest.mark.parametrize("end", ["T30 D72 F34 E4 k1 even recompute", "T7 D33 F17 E5 k3 even"])
def test_values_and_gradients_after_launches_that_measure(end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Backward writes over an h of its own, but not while it measures."""
    chosen = []

    def choose(kernel: str, *rest: Any) -> Any:
        rest[-1](tune.INTERPRETED)
        chosen.append(kernel)
        return tune.INTERPRETED

    (case,) = [case for case in MODULES["experts"].CASES if case.name.endswith(end)]
    args = case.inputs(torch.float32)
    expected = run(case, args, "triton")
    monkeypatch.setattr(tune, "choose", choose)
    for one, other in zip(run(case, args, "triton"), expected, strict=True):
        assert torch.equal(one, other)
    assert "experts_down" in chosen


@pytest.mark.skipif(not INTERPRETED, reason="a GPU goes through its own tiles in the cases above")
@pytest.mark.parametrize("kind", tune.Tiles._fields)
def test_values_and_gradients_in_every_tile(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every candidate of every kernel, for whatever GPU: other blocks are masked, and cut by descriptors."""
    (case,) = [case for case in MODULES["experts"].CASES if case.name.endswith("T40 D64 F48 E8 k2 one")]
    left: dict[str, list[tune.Tile]] = {}

    def choose(kernel: str, device: Any, dtype: Any, sizes: Any, rows: Any, tiles: tune.Tiles, run: Any) -> tune.Tile:
        waiting = left.setdefault(kernel, list(getattr(tiles, kind)))
        return waiting.pop() if waiting else getattr(tiles, kind)[0]

    monkeypatch.setattr(tune, "choose", choose)
    args = case.inputs(torch.float32)
    truth = run(case, in_fp64(args), "reference")
    while not left or any(left.values()):
        for one, other in zip(run(case, args, "triton"), truth, strict=True):
            assert_close(one, other, MODULES["experts"].TOLERANCE[torch.float32])
    assert left.keys() == {"experts_up", "experts_down", "grouped_mm", "grouped_mm_dx", "grouped_mm_dw"}


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("folder", "case"), CASES, ids=lambda value: getattr(value, "name", value))
def test_two_runs_agree_bit_for_bit(folder: str, case: Case, dtype: torch.dtype, backend: str) -> None:
    first, second = (run(case, case.inputs(dtype), backend) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.nan_to_num(), other.nan_to_num())


SMALL = [(folder, case) for folder, module in MODULES.items() for case in module.CASES[1:12:3]]


@pytest.mark.parametrize(("folder", "case"), SMALL, ids=lambda value: getattr(value, "name", value))
def test_schema_fake_and_autograd_registration(folder: str, case: Case) -> None:
    args = case.inputs(torch.float32)
    args = with_grad(case, tuple(arg.nan_to_num() if _floating(arg) else arg for arg in args))
    result = torch.library.opcheck(getattr(torch.ops.moe_engine, case.op.__name__).default, args)
    assert set(result.values()) == {"SUCCESS"}


@pytest.mark.parametrize("needed", [(True, True), (True, False), (False, True), (False, False)])
def test_schema_and_fake_of_what_backward_calls(needed: tuple[bool, bool]) -> None:
    index = torch.tensor([[0, 2], [1, 0], [3, 2]], dtype=torch.int32)  # 3 is dropped
    x, weight, h = torch.randn(3, 4), torch.rand(3, 2), torch.randn(6, 10)
    layer = (x, weight, torch.randn(3, 10, 4), torch.randn(3, 4, 5), *ops.sort_by_expert(index, 3))
    backward = torch.ops.moe_engine.experts_backward.default
    for kept in (h, h[:0].clone()):
        assert set(torch.library.opcheck(backward, (torch.randn(3, 4), *layer, kept, *needed)).values()) == {"SUCCESS"}
    router = torch.ops.moe_engine.router_logits_backward.default
    assert set(torch.library.opcheck(router, (torch.randn(3, 5), x, torch.randn(5, 4), *needed)).values()) == {
        "SUCCESS"
    }


GRADIENTS = {
    "router_logits": "T7 D33 E5",
    "router_topk": "T13 E5 k3 renormalize bias",
    "permute": "T7 D33 E5 k3 even",
    "grouped_mm": "counts [3, 0, 5, 1] beyond 0 N7 K9",
    "swiglu": "R3 F17 scale 1",
    "experts": "T7 D33 F17 E5 k3 even",
}


CHECKED = [
    case
    for folder, end in GRADIENTS.items()
    for case in MODULES[folder].CASES
    if case.name.endswith(end) and case.op.__name__ in DIFFERENTIABLE
]


@pytest.mark.parametrize("case", CHECKED, ids=lambda case: case.name)
def test_gradients_of_the_reference_equal_finite_differences(case: Case) -> None:
    args = with_grad(case, case.inputs(torch.float64))
    with ops.use("reference"):
        assert torch.autograd.gradcheck(lambda *a: _only_floating(case.op(*a)), args)


def _only_floating(outputs: Tensor | tuple) -> tuple:
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return tuple(out for out in outputs if out.is_floating_point())
