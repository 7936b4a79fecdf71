"""Cases of experts: odd sizes, 1 to 128 experts, k from 1 to 8, experts without rows, one expert for all, dropped rows,
no token, h kept and computed again, more rows or wider ones than a kernel takes at once."""

import torch

from moe_engine.ops import experts, sort_by_expert
from moe_engine.ops.parity_case import Case, seeded, wide
from moe_engine.ops.permute.cases import index_of

# relative to the largest value of the fp64 result
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float64: 1e-12}

# tokens, D, F, experts, k, how the experts are chosen, keep h
SIZES = [
    (0, 8, 8, 4, 2, "even", True),
    (1, 1, 1, 1, 1, "even", True),
    (1, 16, 40, 8, 2, "even", True),
    (7, 33, 17, 5, 3, "even", True),
    (40, 66, 50, 6, 4, "dropped", True),
    (40, 64, 48, 8, 2, "one", True),
    (30, 72, 34, 4, 1, "even", False),
    (100, 130, 66, 8, 2, "even", False),
    (20, 32, 24, 128, 8, "even", True),
    (3, 40, 16, 16, 2, "even", True),
    (700, 512, 32, 2, 1, "even", True),
    (280, 96, 100, 3, 2, "even", True),
    (300, 130, 260, 6, 1, "one", True),
    (14, 2100, 40, 2, 1, "even", True),
    (9, 30, 1040, 4, 2, "even", False),
]


def _case(tokens: int, d: int, f: int, e: int, k: int, choice: str, keep_h: bool) -> Case:
    name = f"T{tokens} D{d} F{f} E{e} k{k} {choice}" + " recompute" * (not keep_h)

    def inputs(dtype: torch.dtype) -> tuple:
        """Weights of dropped assignments are 0, as the router leaves them."""
        generator = seeded(name)
        index = index_of(tokens, e, k, choice, generator)
        x, w_in = torch.randn(tokens, d, generator=generator), torch.randn(e, 2 * f, d, generator=generator)
        w_out = torch.randn(e, d, f, generator=generator)
        weight = (torch.rand(tokens, k, generator=generator) + 0.1).masked_fill(index == e, 0)
        matrices = (w_in / d**0.5).to(dtype), (w_out / f**0.5).to(dtype)
        return x.to(dtype), weight.to(wide(dtype)), *matrices, *sort_by_expert(index, e), keep_h

    return Case(name, experts, inputs)


CASES = [_case(*size) for size in SIZES]
