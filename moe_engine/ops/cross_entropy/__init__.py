"""Cross-entropy over a shard of the vocabulary, in two passes over the logits, without a copy of them in fp32.

This shard's columns are the token ids first_id .. first_id + V - 1 (first_id = 0 and the whole vocabulary on one rank).

    max_T = max_v logits        sumexp_T = sum_v exp(logits - max)        target_T = logits[label]
    joined over the shards:     lse = log(sum) + max,  loss = lse - target
    dlogits_TV = grad * (exp(logits - lse) - onehot(label))

A label of -100 is not counted: its target is 0 and its row of dlogits exactly 0. A label of another shard gives a
target of 0 here, which a sum over the shards completes. Neither op is differentiable: the loss joins the shards between
them.
"""

import torch
from torch import Tensor

from moe_engine.ops.backend import on_cuda
from moe_engine.ops.cross_entropy import reference

_stats = torch.library.custom_op("moe_engine::cross_entropy_stats", reference.cross_entropy_stats, mutates_args=())
_grad = torch.library.custom_op("moe_engine::cross_entropy_grad", reference.cross_entropy_grad, mutates_args=())
on_cuda(__name__, cross_entropy_stats=_stats, cross_entropy_grad=_grad)


def cross_entropy_stats(logits_TV: Tensor, label_T: Tensor, first_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """(max_T, sumexp_T, target_T), fp32 (fp64 for fp64 logits). label_T: int64 token ids of the whole vocabulary."""
    _check(logits_TV, label_T)
    return torch.ops.moe_engine.cross_entropy_stats(logits_TV, label_T, first_id)


def cross_entropy_grad(logits_TV: Tensor, label_T: Tensor, first_id: int, lse_T: Tensor, grad_T: Tensor) -> Tensor:
    """dlogits_TV in the dtype of logits. lse_T and grad_T: fp32, log-sum-exp over the shards and loss gradient."""
    _check(logits_TV, label_T)
    return torch.ops.moe_engine.cross_entropy_grad(logits_TV, label_T, first_id, lse_T, grad_T)


def _check(logits_TV: Tensor, label_T: Tensor) -> None:
    if logits_TV.dim() != 2 or label_T.shape != logits_TV.shape[:1] or label_T.dtype != torch.int64:
        raise ValueError(
            f"found logits {tuple(logits_TV.shape)} and labels {tuple(label_T.shape)} {label_T.dtype}, "
            "expected [T, V] and [T] int64"
        )


@_stats.register_fake
def _(logits, label, first_id):
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return tuple(logits.new_empty(logits.shape[0], dtype=dtype) for _ in range(3))


@_grad.register_fake
def _(logits, label, first_id, lse, grad):
    return logits.new_empty(logits.shape)
