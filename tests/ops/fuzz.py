"""Random cases of the C++ ops and their gradients against their definitions in plain torch:

    python -m tests.ops.fuzz --cases 2000 [--seed 0]

A case is its seed: an op, sizes (no row too), dtype, tensors that are strided, expanded or begin at an odd address,
dropped assignments, NaN and infinities, which inputs need gradients, and 1 to 7 threads. A case that fails prints its
seed and shapes; `--cases 1 --seed SEED` runs it alone. What a kernel reads or writes where it may not is for the
sanitizers to find (tools/kernels/sanitize.py), which watch this."""

import argparse
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_engine import ops
from moe_engine.ops.parity_case import wide
from moe_engine.ops.permute.cases import index_of
from tests.ops.test_parity import DIFFERENTIABLE, MODULES, dirty_memory

SIZES = [1, 1, 2, 3, 5, 7, 8, 12, 16, 17, 31, 33, 48, 64, 65, 100, 130]
ROWS = [0, 0, *SIZES, 193, 260]


class Fuzz(NamedTuple):
    """One call of an op, and what it may differ by."""

    op: Callable
    args: tuple
    needed: list[bool]  # which floating inputs want a gradient
    tolerance: float
    threads: int


def spoil(x: Tensor, dice: random.Random, *values: float) -> Tensor:
    """x with a few of the values in it, one time in six."""
    if x.numel() and dice.random() < 1 / 6:
        for _ in range(dice.randint(1, 4)):
            x.view(-1)[dice.randrange(x.numel())] = dice.choice(values)
    return x


def laid_out(x: Any, dice: random.Random) -> Any:
    """The same numbers in another place in memory; of floating ones perhaps the first row alone, expanded."""
    if not isinstance(x, Tensor) or not x.dim():
        return x
    way = dice.choice(["as it is", "as it is", "strided", "transposed", "shifted", "expanded"])
    if way == "strided":
        return x.repeat_interleave(2, -1)[..., ::2]
    if way == "transposed" and x.dim() > 1:
        return x.mT.contiguous().mT
    if way == "shifted":
        return torch.cat([x.new_ones(1), x.flatten()])[1:].view(x.shape)
    if way == "expanded" and x.is_floating_point() and len(x):
        return x[:1].expand(x.shape)
    return x


def routing(dice: random.Random, generator: torch.Generator) -> tuple[Tensor, int]:
    """index[T, K] and the number of experts."""
    experts = dice.choice([1, 2, 3, 5, 8, 40])
    k = dice.randint(1, min(experts, 4))
    return index_of(dice.choice(ROWS), experts, k, dice.choice(["even", "one", "dropped"]), generator), experts


def inputs(folder: str, dtype: torch.dtype, dice: random.Random, generator: torch.Generator) -> tuple[Callable, tuple]:
    """An op of the folder and its arguments."""

    def randn(*shape: int, values: tuple[float, ...] = (float("nan"),)) -> Tensor:
        return spoil(torch.randn(shape, generator=generator).to(dtype), dice, *values)

    rows, d, f = dice.choice(ROWS), dice.choice(SIZES), dice.choice(SIZES)
    extreme = dice.choice([(float("nan"), float("inf"), -float("inf")), (1e-40, -89.0, 89.0, -1e4)])
    if folder == "router_logits":
        x = randn(rows, d)
        return ops.router_logits, (x.to(wide(dtype)) if dice.random() < 0.3 else x, randn(f, d) / d**0.5)
    if folder == "router_topk":  # in steps, so that what is equal and what is not is so in fp32 and fp64
        logits = torch.randint(16, (rows, d), generator=generator) / 4.0
        bias = torch.randint(3, (d,), generator=generator) / 2.0 if dice.random() < 0.5 else None
        logits = spoil(logits.to(wide(dtype)), dice, float("nan"))
        k, bias = dice.randint(1, min(d, 8)), None if bias is None else bias.to(wide(dtype))
        return ops.router_topk, (logits, k, dice.random() < 0.5, bias)
    if folder == "permute":
        index, experts = routing(dice, generator)
        _, *orders = ops.sort_by_expert(index, experts)
        return dice.choice(
            [
                (ops.sort_by_expert, (index, experts)),
                (ops.permute, (randn(len(index), d), *orders)),
                (ops.unpermute, (randn(index.numel(), d), *orders)),
            ]
        )
    if folder == "grouped_mm":
        counts = [dice.choice([0, 0, *SIZES]) for _ in range(dice.randint(1, 6))]
        beyond = dice.choice([0, 3])
        x = torch.cat([randn(sum(counts), d), torch.full((beyond, d), float("nan"), dtype=dtype)])
        return ops.grouped_mm, (x, randn(len(counts), f, d) / d**0.5, torch.tensor(counts, dtype=torch.int32))
    if folder == "swiglu":
        return ops.swiglu, (randn(rows, 2 * f, values=extreme) * dice.choice([1, 30]),)
    if folder == "experts":
        index, experts = routing(dice, generator)
        weight = torch.rand(index.shape, generator=generator).masked_fill(index == experts, 0).to(wide(dtype))
        matrices = randn(experts, 2 * f, d) / d**0.5, randn(experts, d, f) / f**0.5
        args = (randn(len(index), d), weight, *matrices, *ops.sort_by_expert(index, experts), dice.random() < 0.5)
        return ops.experts, args
    logits, first = randn(rows, d, values=(-float("inf"), -200.0, 1e-40)), dice.choice([0, 5])
    label = torch.randint(first + d + 3, (rows,), generator=generator).masked_fill(
        torch.rand(rows, generator=generator) < 0.2, -100
    )
    if dice.random() < 0.5:
        return ops.cross_entropy_stats, (logits, label, first)
    lse = logits.to(wide(dtype)).logsumexp(-1).clamp(min=0)
    return ops.cross_entropy_grad, (logits, label, first, lse, torch.randn(rows, generator=generator).to(wide(dtype)))


def draw(seed: int) -> Fuzz:
    dice, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    folder = dice.choice(sorted(MODULES))
    dtype = dice.choice([torch.float32, torch.bfloat16, torch.float64])
    op, args = inputs(folder, dtype, dice, generator)
    args = tuple(laid_out(arg, dice) for arg in args)
    tolerances = MODULES[folder].TOLERANCE
    differentiable = op.__name__ in DIFFERENTIABLE
    needed = [differentiable and floating(arg) and dice.random() < 0.8 for arg in args]
    return Fuzz(op, args, needed, tolerances.get(dtype, tolerances[torch.float32]), dice.randint(1, 7))


def floating(arg: Any) -> bool:
    return isinstance(arg, Tensor) and arg.is_floating_point()


def run(fuzz: Fuzz, args: tuple, seed: int) -> list[Tensor]:
    """The outputs, then the gradients for random gradients of the outputs, laid out at random too."""
    dice, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    args = tuple(a.detach().requires_grad_(n) if floating(a) else a for a, n in zip(args, fuzz.needed, strict=True))
    outputs = fuzz.op(*args)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    roots = [out for out in outputs if out.requires_grad]
    eighths = [torch.randint(-16, 17, out.shape, generator=generator).to(out.dtype) / 8 for out in roots]  # exact
    seeds = [laid_out(seed, dice) for seed in eighths]
    leaves = [arg for arg, needed in zip(args, fuzz.needed, strict=True) if needed]
    grads = torch.autograd.grad(roots, leaves, seeds, allow_unused=True) if roots else ()
    return [out.detach() for out in outputs] + [grad for grad in grads if grad is not None]


def difference(found: Tensor, truth: Tensor, scale: float) -> float:
    """The largest one, relative to the largest value or to the scale; infinite where NaN or infinity differ."""
    if found.shape != truth.shape or not torch.equal(found.isnan(), truth.isnan()):
        return float("inf")
    if not found.is_floating_point():
        return 0.0 if torch.equal(found, truth) else float("inf")
    found, finite = found.double(), truth.isfinite()
    if not torch.equal(found[~finite].nan_to_num(), truth[~finite].nan_to_num()):
        return float("inf")
    found, truth = found[finite], truth[finite]
    return ((found - truth).abs().max() / truth.abs().max().clamp(min=scale)).item() if truth.numel() else 0.0


def check(seed: int) -> None:
    """Raises AssertionError with the seed and the shapes."""
    fuzz, before = draw(seed), torch.get_num_threads()
    torch.set_num_threads(fuzz.threads)
    try:
        with dirty_memory():
            found = run(fuzz, fuzz.args, seed)
    finally:
        torch.set_num_threads(before)
    with ops.use("reference"):
        truth = run(fuzz, tuple(arg.double() if floating(arg) else arg for arg in fuzz.args), seed)
    # a sum of n numbers of either sign is about sqrt(n) large; that it is near 0 by chance is no measure of its error
    scale = max(1, *(size for arg in fuzz.args if isinstance(arg, Tensor) for size in arg.shape)) ** 0.5
    for place, (one, other) in enumerate(zip(found, truth, strict=True)):
        wrong = difference(one, other, scale)
        assert wrong <= fuzz.tolerance, (
            f"seed {seed}: result {place} of {fuzz.op.__name__} differs by {wrong:.2g}, at most {fuzz.tolerance:.2g} "
            f"was expected; {fuzz.threads} threads, inputs {', '.join(map(describe, fuzz.args))}, "
            f"gradients of {fuzz.needed}"
        )


def describe(arg: Any) -> str:
    if not isinstance(arg, Tensor):
        return repr(arg)
    return f"{str(arg.dtype).removeprefix('torch.')}{list(arg.shape)} strides {list(arg.stride())}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0, help="of the first case; those of the others follow")
    options = parser.parse_args()
    assert ops.compiled, "moe_engine._C was not built"
    failures = 0
    for seed in range(options.seed, options.seed + options.cases):
        try:
            check(seed)
        except AssertionError as error:
            failures += 1
            print(error, flush=True)
    print(f"cases {options.cases}, failures {failures}")
    raise SystemExit(failures > 0)


if __name__ == "__main__":
    main()
