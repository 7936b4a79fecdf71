"""Cases of router_logits: no token, one, odd widths, 1 to 256 experts, and x in fp32 as jitter leaves it."""

import torch

from moe_engine.ops import router_logits
from moe_engine.ops.parity_case import Case, seeded

# relative to the largest value of the fp64 result: products are fp32, gradients are rounded to the inputs' dtype
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float64: 1e-12}

SIZES = [(0, 8, 4), (1, 1, 1), (7, 33, 5), (65, 128, 8), (130, 72, 64), (40, 96, 256)]


def _case(tokens: int, width: int, experts: int, jitter: bool = False) -> Case:
    name = f"T{tokens} D{width} E{experts}{' x fp32' if jitter else ''}"

    def inputs(dtype: torch.dtype) -> tuple:
        generator = seeded(name)
        x, w = torch.randn(tokens, width, generator=generator), torch.randn(experts, width, generator=generator)
        return x.to(torch.promote_types(dtype, torch.float32) if jitter else dtype), w.to(dtype)

    return Case(name, router_logits, inputs)


CASES = [*(_case(*size) for size in SIZES), _case(33, 40, 6, jitter=True)]
