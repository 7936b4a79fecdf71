"""SwiGLU: the activation between the two matmuls of an expert (arXiv 2002.05202).

gate_R(F), up_R(F) = gate_up_R(2F)       gate columns first, then up
y_RF = silu(gate) * up                   silu(g) = g * sigmoid(g), in fp32, rounded once
"""

import torch
from torch import Tensor

from moe_engine.ops.backend import on_cuda
from moe_engine.ops.swiglu import reference

_forward = torch.library.custom_op("moe_engine::swiglu", reference.swiglu, mutates_args=())
_backward = torch.library.custom_op("moe_engine::swiglu_backward", reference.swiglu_backward, mutates_args=())
on_cuda(__name__, swiglu=_forward, swiglu_backward=_backward)


def swiglu(gate_up: Tensor) -> Tensor:
    """[R, 2F] -> [R, F] in the same dtype. Differentiable. Raises ValueError if the width is odd."""
    if gate_up.dim() != 2 or gate_up.shape[1] % 2:
        raise ValueError(f"found gate_up {tuple(gate_up.shape)}, expected [R, 2F]: gate columns, then up columns")
    return torch.ops.moe_engine.swiglu(gate_up)


@_forward.register_fake
def _(gate_up):
    return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)


@_backward.register_fake
def _(grad, gate_up):
    return gate_up.new_empty(gate_up.shape)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, grad):
    (gate_up,) = ctx.saved_tensors
    return torch.ops.moe_engine.swiglu_backward(grad, gate_up)


_forward.register_autograd(_differentiate, setup_context=_save)
