"""Time, memory and agreement of contenders.

Time is a median over rounds; in each round every contender has its turn, and so have the ceilings, a large matrix
product and a large copy, so that a slow moment of the machine hits all of them. A large write before each turn evicts
what the last one left in the caches. On CUDA it is the time between two events of the device, on CPU the wall clock's.
Before that, every contender's output and gradients are compared with those of the first, the engine.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tools.kernels.contenders import Contender

WARM_UP = 2
PASSES = ("forward", "forward+backward")
Jobs = dict[tuple[str, str], Callable[[], Any]]


class Figures(NamedTuple):
    """One contender in one pass. Per second: FLOPs or bytes; `share` of the ceiling of that unit; `ratio`: the fastest
    peer's time / this time; bytes: the peak above what was allocated before (CUDA only), and what is kept for backward;
    `error`: the largest relative difference from the engine."""

    contender: str
    direction: str
    seconds: float
    per_second: float
    share: float
    peak_bytes: int | None
    saved_bytes: int
    ratio: float | None
    error: float


def tolerance(dtype: torch.dtype, device: torch.device) -> float:
    """Relative norm of a difference that rounding explains. GPU kernels may multiply fp32 as TF32."""
    if dtype == torch.float32:
        return 1e-4 if device.type == "cpu" else 5e-3
    return 3e-2


def relative_error(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected| in the Euclidean norm, in pieces that fit beside the weights; inf for NaN."""
    pairs = zip(found.reshape(-1).split(2**26), expected.reshape(-1).split(2**26), strict=True)
    sums = [(float((a.float() - b.float()).square().sum()), float(b.float().square().sum())) for a, b in pairs]
    difference, size = (sum(column) ** 0.5 for column in zip(*sums, strict=True))
    error = difference / size if size else difference
    return error if error == error else float("inf")


def outcome(contender: Contender) -> tuple[Tensor, ...]:
    """The output, and the gradients in the engine's layout."""
    y = contender.forward()
    return y.detach(), *(contender.in_our_layout(contender.backward(y)) if contender.backward else ())


def reason(error: Exception) -> str:
    """One line."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:100]}"


def agreeing(
    builders: dict[str, Callable[[], Contender]], limit: float
) -> tuple[dict[str, tuple[Contender, float]], dict[str, str], bool]:
    """Build and run each once: the contenders that agree with the first that runs, with their error; why the others are
    left out; and whether any differed."""
    found: dict[str, tuple[Contender, float]] = {}
    left_out: dict[str, str] = {}
    expected, first, differs = None, "", False
    for name, build in builders.items():
        try:
            contender = build()
            outputs = outcome(contender)
            if expected is None:
                expected, first = outputs, name
            errors = [relative_error(*both) for both in zip(outputs, expected, strict=True)]
        except Exception as error:  # a peer may fail in any way, and the others still count
            left_out[name] = reason(error)
            continue
        worst = max(range(len(errors)), key=errors.__getitem__)
        if errors[worst] <= limit:
            found[name] = contender, errors[worst]
        else:
            differs, where = True, f"gradient {worst}" if worst else "the output"
            left_out[name] = f"differs from {first}: relative error {errors[worst]:.1e} in {where}"
    return found, left_out, differs


def jobs_of(contender: Contender) -> Jobs:
    def both() -> Any:
        assert contender.backward
        return contender.backward(contender.forward())

    return {
        (contender.name, d): job for d, job in zip(PASSES, (contender.forward, both)[: 1 + bool(contender.backward)])
    }


def ceiling_jobs(dtype: torch.dtype, device: torch.device) -> tuple[Jobs, dict[str, float]]:
    """A square matrix product and a copy, with their FLOPs and bytes (read and written)."""
    n, size = (8192, 2**28) if device.type == "cuda" else (2048, 2**27)
    a = torch.randn(n, n, device=device).to(dtype)
    out, source = torch.empty_like(a), torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    jobs: Jobs = {
        ("ceiling", "flops"): lambda: torch.mm(a, a, out=out),
        ("ceiling", "bytes"): lambda: target.copy_(source),
    }
    return jobs, {"flops": 2.0 * n**3, "bytes": 2.0 * size}


def timed_in_turn(jobs: Jobs, repeats: int, device: torch.device) -> dict[tuple[str, str], float]:
    """Median seconds of each job over `repeats` rounds, after two that warm up."""
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in jobs}
    timed = on_cuda if device.type == "cuda" else on_cpu
    size, writes = (2**28, 16) if device.type == "cuda" else (2**27, 1)
    other_data = torch.empty(size, dtype=torch.uint8, device=device)
    for turn in range(WARM_UP + repeats):
        for key, job in jobs.items():
            for _ in range(writes):
                other_data.zero_()
            passed = timed(job)
            if turn >= WARM_UP:
                seconds[key].append(passed)
    return {key: statistics.median(values) for key, values in seconds.items()}


def on_cpu(job: Callable[[], Any]) -> float:
    start = time.perf_counter()
    result = job()
    passed = time.perf_counter() - start
    del result  # freed after the clock stopped
    return passed


def on_cuda(job: Callable[[], Any]) -> float:
    """Called while the device still writes other data, about a millisecond, so that launches run ahead of the device as
    they do in training; a contender that waits for the device on its way loses that."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    result = job()
    stop.record()
    stop.synchronize()
    del result
    return start.elapsed_time(stop) / 1e3


def saved_bytes(contender: Contender) -> int:
    """Bytes of the distinct storages that autograd keeps for backward, the parameters left out."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = contender.forward()
    for parameter in contender.leaves[1:]:
        storages.pop(parameter.untyped_storage().data_ptr(), None)
    del kept  # until here no storage can be freed and its address used again
    return sum(storages.values())


def peak_bytes(job: Callable[[], Any], device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = job()
    torch.cuda.synchronize(device)
    del result
    return torch.cuda.max_memory_allocated(device) - before


def measure(
    contenders: dict[str, tuple[Contender, float]],
    unit: str,
    work: dict[str, float],
    repeats: int,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[dict[str, float], list[Figures]]:
    """The ceilings per second, and a row for each contender and pass. `work`: FLOPs or bytes of each pass."""
    ceilings, amounts = ceiling_jobs(dtype, device)
    jobs = {key: job for contender, _ in contenders.values() for key, job in jobs_of(contender).items()}
    seconds = timed_in_turn(ceilings | jobs, repeats, device)
    ceiling = {unit: amount / seconds["ceiling", unit] for unit, amount in amounts.items()}
    rows = []
    for (name, direction), job in jobs.items():
        contender, error = contenders[name]
        taken = seconds[name, direction]
        peers = [seconds[peer, direction] for peer in contenders if peer != "moe_engine"]
        rows.append(
            Figures(
                name, direction, taken, work[direction] / taken, work[direction] / taken / ceiling[unit],
                peak_bytes(job, device), saved_bytes(contender), min(peers) / taken if peers else None, error,
            )
        )  # fmt: skip
    return ceiling, rows
