"""Cases of swiglu: odd widths, no row, values from saturation to underflow."""

import torch

from moe_engine.ops import swiglu
from moe_engine.ops.parity_case import Case, seeded

# relative to the largest value of the fp64 result
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float64: 1e-12}

SIZES = [(0, 8, 1.0), (1, 1, 1.0), (3, 17, 1.0), (5, 1408, 1.0), (64, 100, 30.0), (7, 33, 200.0)]


def _case(rows: int, width: int, scale: float) -> Case:
    name = f"R{rows} F{width} scale {scale:g}"

    def inputs(dtype: torch.dtype) -> tuple:
        return ((torch.randn(rows, 2 * width, generator=seeded(name)) * scale).to(dtype),)

    return Case(name, swiglu, inputs)


CASES = [_case(*size) for size in SIZES]
