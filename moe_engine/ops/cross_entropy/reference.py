"""Definition of cross_entropy_stats and cross_entropy_grad in plain torch."""

import torch
from torch import Tensor


def cross_entropy_stats(logits: Tensor, label: Tensor, first_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """(max_T, sum_V exp(logits - max), logits[label]), fp32 or wider; the last is 0 for a label of -100 or of another
    shard."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    column, here = _columns(logits, label, first_id)
    largest = logits.amax(-1)
    target = torch.where(here, logits.gather(-1, column[:, None])[:, 0], 0)
    return largest, (logits - largest[:, None]).exp().sum(-1), target


def cross_entropy_grad(logits: Tensor, label: Tensor, first_id: int, lse: Tensor, grad: Tensor) -> Tensor:
    """(exp(logits - lse) - [column is the label]) * grad, computed in the dtype of lse, rounded to that of logits. Rows
    of label -100 are 0."""
    column, here = _columns(logits, label, first_id)
    dlogits = (logits.to(lse.dtype) - lse[:, None]).exp()
    dlogits = dlogits.scatter_add(-1, column[:, None], -here.to(lse.dtype)[:, None]) * grad[:, None]
    return dlogits.masked_fill_((label == -100)[:, None], 0).to(logits.dtype)


def _columns(logits: Tensor, label: Tensor, first_id: int) -> tuple[Tensor, Tensor]:
    column = label - first_id
    here = (label != -100) & (column >= 0) & (column < logits.shape[1])
    return torch.where(here, column, 0), here
