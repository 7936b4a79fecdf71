"""Definition of experts and its gradients in plain torch, from the definitions of the ops that it fuses."""

import torch
from torch import Tensor

from moe_engine.ops.grouped_mm.reference import grouped_mm, grouped_mm_dw, grouped_mm_dx
from moe_engine.ops.permute.reference import permute, unpermute
from moe_engine.ops.swiglu.reference import swiglu_backward


def experts(
    x: Tensor, weight: Tensor, w_gate_up: Tensor, w_down: Tensor, counts: Tensor, assignment_of_row: Tensor,
    row_of: Tensor, keep_h: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y_TD, h_R(2F)); h has no rows unless keep_h. The weight multiplies the activation before it is rounded."""
    h = grouped_mm(permute(x, assignment_of_row, row_of), w_gate_up, counts)
    a = (_swiglu(h) * weight.flatten()[assignment_of_row][:, None]).to(x.dtype)
    y = unpermute(grouped_mm(a, w_down, counts), assignment_of_row, row_of)
    return y, h if keep_h else h.new_empty(0, h.shape[1])


def experts_backward(
    grad: Tensor, x: Tensor, weight: Tensor, w_gate_up: Tensor, w_down: Tensor, counts: Tensor,
    assignment_of_row: Tensor, row_of: Tensor, h: Tensor, need_x: bool, need_matrices: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dx_TD, dweight_TK, dw_gate_up, dw_down); dx and the matrices' have no elements if not needed. An h without rows
    is computed again. dweight = sum_F da * silu(g) * u needs no division by the weight."""
    rows = permute(x, assignment_of_row, row_of)
    if not len(h):
        h = grouped_mm(rows, w_gate_up, counts)
    grad_rows, weight_R1 = permute(grad, assignment_of_row, row_of), weight.flatten()[assignment_of_row][:, None]
    da, a = grouped_mm_dx(grad_rows, w_down, counts).to(weight.dtype), _swiglu(h)
    dh = swiglu_backward(da * weight_R1, h)
    dweight = (da * a).sum(-1)[row_of.long()].to(weight.dtype)
    return (
        unpermute(grouped_mm_dx(dh, w_gate_up, counts), assignment_of_row, row_of) if need_x else x.new_empty(0),
        dweight,
        grouped_mm_dw(dh, rows, counts) if need_matrices else x.new_empty(0),
        grouped_mm_dw(grad_rows, (a * weight_R1).to(x.dtype), counts) if need_matrices else x.new_empty(0),
    )


def _swiglu(h: Tensor) -> Tensor:
    gate, up = h.to(torch.promote_types(h.dtype, torch.float32)).chunk(2, dim=-1)
    return gate * torch.sigmoid(gate) * up
