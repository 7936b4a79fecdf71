"""Cross-entropy over a vocabulary cut along tp: no rank ever holds a whole row of logits.

max, sum of exp, logit of the label    of this rank's columns      (op cross_entropy)
max over tp, then sum over tp          two small all-reduces
loss_T = logsumexp - logit of the label, 0 where the label is -100; in fp32
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_engine.labels import IGNORE
from moe_engine.ops import cross_entropy_grad, cross_entropy_stats
from moe_engine.parallel.collectives import max_, sum_
from moe_engine.parallel.mesh import Axis


class _VocabCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_TV: Tensor, label_T: Tensor, tp: Axis) -> Tensor:
        """logits[T, V/tp], label[T] -> loss[T] fp32. Kept for backward: the logits, labels and lse[T] of whole rows."""
        first_id = tp.rank * logits_TV.shape[1]
        max_T, sumexp_T, target_T = cross_entropy_stats(logits_TV, label_T, first_id)
        if tp.size > 1:
            global_max_T = max_(max_T.clone(), tp)
            sumexp_T, target_T = sum_(torch.stack([sumexp_T * (max_T - global_max_T).exp(), target_T]), tp)
            max_T = global_max_T
        lse_T = max_T + sumexp_T.log()
        ctx.save_for_backward(logits_TV, label_T, lse_T)
        ctx.first_id = first_id
        return (lse_T - target_T).masked_fill(label_T == IGNORE, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_T: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        """grad[T], the same on all tp ranks -> dlogits[T, V/tp] in the dtype of logits, without communication."""
        logits_TV, label_T, lse_T = ctx.saved_tensors
        return cross_entropy_grad(logits_TV, label_T, ctx.first_id, lse_T, grad_T.contiguous()), None, None


def vocab_cross_entropy(logits_TV: Tensor, label_T: Tensor, tp: Axis) -> Tensor:
    """logits[T, V/tp], label_T int64 (global ids, -100 = not counted) -> loss_T fp32, the same on every tp rank."""
    return _VocabCrossEntropy.apply(logits_TV, label_T, tp)  # pyright: ignore[reportReturnType]
