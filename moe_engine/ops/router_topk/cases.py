"""Cases of router_topk: 1 to 128 experts, every k to 8, ties, a bias that changes the choice, no token."""

import torch

from moe_engine.ops import router_topk
from moe_engine.ops.parity_case import Case, seeded, wide

# relative to the largest value of the fp64 result; the router is fp32 whatever the rest is
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-12}

SIZES = [(0, 8, 2), (1, 1, 1), (1, 8, 2), (13, 5, 3), (64, 8, 8), (300, 64, 8), (33, 128, 8), (17, 128, 1)]


def _case(tokens: int, experts: int, k: int, renormalize: bool, bias: bool, tied: bool = False) -> Case:
    name = f"T{tokens} E{experts} k{k}" + " renormalize" * renormalize + " bias" * bias + " tied" * tied

    def inputs(dtype: torch.dtype) -> tuple:
        generator = seeded(name)
        logits = torch.randn(tokens, experts, generator=generator)
        if tied:
            logits = logits[:, :1].expand(-1, experts).contiguous()
        bias_E = torch.randn(experts, generator=generator) if bias else None
        return logits.to(wide(dtype)), k, renormalize, None if bias_E is None else bias_E.to(wide(dtype))

    return Case(name, router_topk, inputs)


CASES = [
    *(_case(*size, renormalize, bias) for size in SIZES for renormalize in (False, True) for bias in (False, True)),
    _case(9, 8, 3, True, False, tied=True),
]
