"""Definition of sort_by_expert, permute and unpermute in plain torch."""

import torch
from torch import Tensor


def sort_by_expert(index: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    expert, assignment = torch.sort(index.flatten(), stable=True)
    bound = torch.arange(num_experts + 1, device=index.device, dtype=index.dtype)
    counts = torch.searchsorted(expert, bound).diff()
    row_of = torch.empty_like(assignment)
    row_of[assignment] = torch.arange(assignment.numel(), device=index.device)
    return counts.int(), (assignment // max(index.shape[1], 1)).int(), row_of.view(index.shape).int()


def permute(x: Tensor, token_of_row: Tensor, row_of: Tensor) -> Tensor:
    return x.index_select(0, token_of_row)


def permute_backward(grad_rows: Tensor, row_of: Tensor) -> Tensor:
    picked = grad_rows[row_of.long()].to(torch.promote_types(grad_rows.dtype, torch.float32))
    return picked.sum(1).to(grad_rows.dtype)


def unpermute(rows: Tensor, weight: Tensor, row_of: Tensor) -> Tensor:
    picked = rows[row_of.long()].to(weight.dtype)
    return torch.where(weight[..., None] == 0, 0, picked * weight[..., None]).sum(1).to(rows.dtype)


def unpermute_backward(grad: Tensor, rows: Tensor, weight: Tensor, row_of: Tensor) -> tuple[Tensor, Tensor]:
    row_of, wide, kept = row_of.long(), grad.to(weight.dtype)[:, None], weight[..., None] != 0
    grad_rows = torch.empty_like(rows, memory_format=torch.contiguous_format)
    grad_rows[row_of] = torch.where(kept, wide * weight[..., None], 0).to(rows.dtype)
    return grad_rows, torch.where(kept, wide * rows[row_of].to(weight.dtype), 0).sum(-1)
