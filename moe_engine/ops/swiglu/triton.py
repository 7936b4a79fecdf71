"""swiglu on CUDA: elementwise, one program for each row and stretch of columns."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_engine.ops.tune import FUSED

WIDE = 1024


@triton.jit
def swiglu_kernel(gate_up, y, F, WIDE: tl.constexpr):
    """Program (row, i) writes WIDE columns of y[row, F] from gate_up[row, 2F]."""
    row, c = tl.program_id(0).to(tl.int64), tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    gate = tl.load(gate_up + row * 2 * F + c, mask=c < F, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * F + F + c, mask=c < F, other=0.0).to(tl.float32)
    tl.store(y + row * F + c, (gate * tl.sigmoid(gate) * up).to(y.dtype.element_ty), mask=c < F)


@triton.jit
def swiglu_backward_kernel(grad, gate_up, out, F, WIDE: tl.constexpr):
    """Program (row, i) writes WIDE columns of d_gate and the same of d_up in out[row, 2F]; grad is [R, F]."""
    row, c = tl.program_id(0).to(tl.int64), tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    d = tl.load(grad + row * F + c, mask=c < F, other=0.0).to(tl.float32)
    gate = tl.load(gate_up + row * 2 * F + c, mask=c < F, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * F + F + c, mask=c < F, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    d_gate = d * up * sigmoid * (1 + gate * (1 - sigmoid))
    tl.store(out + row * 2 * F + c, d_gate.to(out.dtype.element_ty), mask=c < F)
    tl.store(out + row * 2 * F + F + c, (d * gate * sigmoid).to(out.dtype.element_ty), mask=c < F)


def swiglu(gate_up: Tensor) -> Tensor:
    """y_RF in the dtype of gate_up."""
    gate_up, (rows, F) = gate_up.contiguous(), (gate_up.shape[0], gate_up.shape[1] // 2)
    y = gate_up.new_empty(rows, F)
    if y.numel():
        wide = min(WIDE, triton.next_power_of_2(F))
        swiglu_kernel[(rows, triton.cdiv(F, wide))](gate_up, y, F, wide, **FUSED)
    return y


def swiglu_backward(grad: Tensor, gate_up: Tensor) -> Tensor:
    """The gradient of gate_up, [R, 2F]. The sigmoid is computed again: forward keeps gate_up alone."""
    grad, gate_up, (rows, F) = grad.contiguous(), gate_up.contiguous(), grad.shape
    out = torch.empty_like(gate_up)
    if out.numel():
        wide = min(WIDE, triton.next_power_of_2(F))
        swiglu_backward_kernel[(rows, triton.cdiv(F, wide))](grad, gate_up, out, F, wide, **FUSED)
    return out
