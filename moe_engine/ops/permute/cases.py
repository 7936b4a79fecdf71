"""Cases of permute and unpermute: no token, one, odd widths, experts without rows, all rows on one, dropped rows."""

import torch
from torch import Tensor

from moe_engine.ops import permute, sort_by_expert, unpermute
from moe_engine.ops.parity_case import Case, seeded

# relative to the largest value of the fp64 result
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float64: 1e-12}

# tokens, width, experts, k, how the experts are chosen
SIZES = [
    (0, 8, 4, 2, "even"),
    (1, 1, 1, 1, "even"),
    (1, 16, 8, 2, "even"),
    (7, 33, 5, 3, "even"),
    (64, 128, 8, 2, "even"),
    (64, 72, 8, 2, "one"),
    (50, 64, 128, 8, "even"),
    (40, 96, 6, 4, "dropped"),
]


def index_of(tokens: int, experts: int, k: int, choice: str, generator: torch.Generator) -> Tensor:
    """int32 [T, K]: distinct experts for each token ("even"), expert 0 for all ("one"), or a third dropped."""
    score = torch.rand(tokens, experts, generator=generator)
    index = score.argsort(-1)[:, :k].int()
    if choice == "one":
        index = torch.zeros_like(index)
    if choice == "dropped":
        index = index.masked_fill(torch.rand(index.shape, generator=generator) < 1 / 3, experts)
    return index


def _cases(tokens: int, width: int, experts: int, k: int, choice: str) -> list[Case]:
    name = f"T{tokens} D{width} E{experts} k{k} {choice}"

    def sort_inputs(dtype: torch.dtype) -> tuple:
        return index_of(tokens, experts, k, choice, seeded(name)), experts

    def permute_inputs(dtype: torch.dtype) -> tuple:
        _, assignment_of_row, row_of = sort_by_expert(*sort_inputs(dtype))
        return torch.randn(tokens, width, generator=seeded(name)).to(dtype), assignment_of_row, row_of

    def unpermute_inputs(dtype: torch.dtype) -> tuple:
        _, assignment_of_row, row_of = sort_by_expert(*sort_inputs(dtype))
        return torch.randn(tokens * k, width, generator=seeded(name)).to(dtype), assignment_of_row, row_of

    return [
        Case("sort " + name, sort_by_expert, sort_inputs),
        Case("permute " + name, permute, permute_inputs),
        Case("unpermute " + name, unpermute, unpermute_inputs),
    ]


CASES = [case for size in SIZES for case in _cases(*size)]
