"""Definition of swiglu in plain torch."""

import torch
from torch import Tensor


def swiglu(gate_up: Tensor) -> Tensor:
    """y_RF = gate * sigmoid(gate) * up in fp32 (fp64 for fp64), rounded once to the dtype of gate_up."""
    gate, up = gate_up.to(torch.promote_types(gate_up.dtype, torch.float32)).chunk(2, dim=-1)
    return (gate * torch.sigmoid(gate) * up).to(gate_up.dtype)


def swiglu_backward(grad: Tensor, gate_up: Tensor) -> Tensor:
    """d_gate = grad * up * s * (1 + gate * (1 - s)) and d_up = grad * gate * s with s = sigmoid(gate), side by side
    [R, 2F]; rounded once to the dtype of gate_up."""
    wide = torch.promote_types(gate_up.dtype, torch.float32)
    gate, up = gate_up.to(wide).chunk(2, dim=-1)
    grad, sigmoid = grad.to(wide), torch.sigmoid(gate)
    grad_gate = grad * up * sigmoid * (1 + gate * (1 - sigmoid))
    return torch.cat([grad_gate, grad * gate * sigmoid], dim=-1).to(gate_up.dtype)
