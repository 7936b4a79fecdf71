"""Definition of sort_by_expert, permute and unpermute in plain torch."""

import torch
from torch import Tensor


def sort_by_expert(index: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """(counts_E, assignment_of_row_R, row_of_TK) int32, by a stable sort. Dropped assignments, index E, come last and
    are not counted."""
    expert, assignment = torch.sort(index.flatten(), stable=True)
    bound = torch.arange(num_experts + 1, device=index.device, dtype=index.dtype)
    counts = torch.searchsorted(expert, bound).diff()
    row_of = torch.empty_like(assignment)
    row_of[assignment] = torch.arange(assignment.numel(), device=index.device)
    return counts.int(), assignment.int(), row_of.view(index.shape).int()


def permute(x: Tensor, assignment_of_row: Tensor, row_of: Tensor) -> Tensor:
    """rows_RD: rows[r] = x[assignment_of_row[r] // K]. Of row_of only K is read."""
    return x.index_select(0, assignment_of_row // row_of.shape[1])


def unpermute(rows: Tensor, assignment_of_row: Tensor, row_of: Tensor) -> Tensor:
    """y_TD: y[t] = sum_k rows[row_of[t, k]] in fp32 (fp64 for fp64), rounded once. assignment_of_row is not read."""
    picked = rows[row_of.long()].to(torch.promote_types(rows.dtype, torch.float32))
    return picked.sum(1).to(rows.dtype)
