"""Cases of grouped_mm: odd sizes, experts without rows, all rows on one, rows past the counts, no row at all."""

import torch

from moe_engine.ops import grouped_mm
from moe_engine.ops.parity_case import Case, seeded

# relative to the largest value of the fp64 result
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 1.2e-2, torch.float16: 1.5e-3, torch.float64: 1e-12}

# counts per expert, rows past their sum, N, K
SIZES = [
    ([0, 0], 0, 8, 8),
    ([0, 0, 0], 5, 6, 4),
    ([1], 0, 1, 1),
    ([1], 0, 64, 32),
    ([3, 0, 5, 1], 0, 7, 9),
    ([3, 0, 5, 1], 4, 34, 18),
    ([0, 40, 0], 3, 48, 64),
    ([17, 64, 65, 0, 129], 30, 130, 72),
    ([300, 1], 0, 192, 320),
    ([2, 33], 1, 66, 1100),
    ([16, 5], 0, 1090, 70),
    ([9] * 7 + [0] + [31], 0, 64, 2180),
    ([1] * 100 + [0] * 28, 0, 32, 48),
]


def _case(counts: list[int], beyond: int, n: int, k: int) -> Case:
    shown = counts if len(counts) < 8 else [len(counts), sum(counts)]
    name = f"counts {shown} beyond {beyond} N{n} K{k}"

    def inputs(dtype: torch.dtype) -> tuple:
        generator = seeded(name)
        x = torch.randn(sum(counts) + beyond, k, generator=generator)
        x[sum(counts) :] = float("nan")  # rows past the counts hold anything
        w = torch.randn(len(counts), n, k, generator=generator)
        return x.to(dtype), w.to(dtype), torch.tensor(counts, dtype=torch.int32)

    return Case(name, grouped_mm, inputs)


CASES = [_case(*size) for size in SIZES]
