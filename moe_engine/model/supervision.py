"""Which experts a label prefers, and how far routers are from it (S1.21 to S1.24).

    p = softmax((W[:, label] + b) / temperature)          the target of a labelled token, over E experts
    loss = sum over labelled tokens of KL(p || softmax(logits_t)) / labelled tokens

Everything is computed from log-softmax, so that logits of any size stay finite. A learned target
gets gradients as the routers do; with a fixed one the routers alone, and what feeds them, move.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_engine.parallel.collectives import copy_to
from moe_engine.parallel.mesh import Axis
from moe_engine.parallel.weight import initialise, weight

Aggregation = Literal["per_layer", "mean", "sum", "last"]


class ExpertLabelEmbedding(nn.Module):
    """Preferences of C labels over E experts: a linear map of the one-hot label, Xavier-uniform, its bias 0.1.

    temperature divides them. Gradients are summed over tp, whose ranks hold different tokens.
    """

    def __init__(self, labels: int, experts: int, temperature: float = 1.0, tp: Axis | None = None, seed: int = 0):
        super().__init__()
        self.temperature, self.tp = temperature, tp or Axis("tp")
        self.weight = weight((experts, labels), bound=math.sqrt(6 / (labels + experts)))
        self.bias = weight((experts,), fill=0.1)
        initialise(self, seed)

    def table(self) -> Tensor:
        """The preferences of every label, logits [C, E]."""
        return (copy_to(self.weight, self.tp).T + copy_to(self.bias, self.tp)).float() / self.temperature

    def forward(self, label: Tensor) -> Tensor:
        """Labels int64 of any shape -> preferences [..., E]."""
        return self.table()[label]


def label_kl(table_CE: Tensor, logits: Sequence[Tensor], label_T: Tensor, aggregation: Aggregation) -> Tensor:
    """KL(target || router) of each token, fp32 [T]; 0 where label_T is negative.

    table_CE: preferences as logits, -inf for an expert that a label does not want. logits: of each layer, [T, E].
    per_layer: the mean of the layers' divergences; mean, sum, last: one divergence of the aggregated logits.
    """
    log_p_CE = F.log_softmax(table_CE.float(), -1)
    p_CE = log_p_CE.exp()
    entropy_C = torch.where(p_CE > 0, p_CE * log_p_CE, 0.0).sum(-1)  # minus the entropy
    known_T = label_T >= 0
    place_T = label_T.clamp(min=0)
    p_TE = p_CE[place_T]
    found_T = entropy_C[place_T]
    for layer in aggregated(logits, aggregation):
        found_T = found_T - (p_TE * F.log_softmax(layer.float(), -1)).sum(-1) / (
            len(logits) if aggregation == "per_layer" else 1
        )
    return torch.where(known_T, found_T, 0.0)


def aggregated(logits: Sequence[Tensor], aggregation: Aggregation) -> Sequence[Tensor]:
    """The logits that are compared with the target: of every layer, or one for all."""
    if aggregation == "per_layer":
        return logits
    if aggregation == "last":
        return [logits[-1]]
    total = torch.stack(list(logits)).sum(0)
    return [total / len(logits) if aggregation == "mean" else total]


def compute_routing_supervision_loss(
    router_logits: Sequence[Tensor | tuple[Tensor, ...]],
    expert_labels: Tensor,
    label_embedding: ExpertLabelEmbedding,
    attention_mask: Tensor | None = None,
    aggregation: Aggregation = "mean",
) -> Tensor:
    """The loss of labelled sequences, a scalar: on one process, for models of any origin.

    router_logits: of each layer [B, S, E] or [B * S, E], or a tuple that begins with them. expert_labels: int64 [B],
    negative for none. attention_mask: [B, S], 0 for padding. 0 when nothing is labelled.
    """
    logits = [(layer[0] if isinstance(layer, tuple) else layer).flatten(0, -2) for layer in router_logits]
    label_T = expert_labels.repeat_interleave(len(logits[0]) // len(expert_labels))
    if attention_mask is not None:
        label_T = label_T.masked_fill(attention_mask.flatten() == 0, -1)
    kl_T = label_kl(label_embedding.table(), logits, label_T, aggregation)
    return kl_T.sum() / (label_T >= 0).sum().clamp(min=1)


def get_expert_utilization_stats(
    router_logits: Sequence[Tensor | tuple[Tensor, ...]],
    top_k: int = 2,
    attention_mask: Tensor | None = None,
    basis: Literal["assignments", "tokens"] = "assignments",
) -> dict[str, Tensor | float]:
    """How often each expert is among a token's top k by the layers' mean logits, in percent.

    basis: of all assignments (the percentages sum to 100), or of all tokens (to 100 * top_k). percent [E] with its
    variance (unbiased), min and max; counts_per_layer [N, E] of each layer's own choices.
    """
    logits = [(layer[0] if isinstance(layer, tuple) else layer).flatten(0, -2) for layer in router_logits]
    keep_T = torch.ones(len(logits[0]), dtype=torch.bool) if attention_mask is None else attention_mask.flatten() != 0
    experts = logits[0].shape[-1]

    def counts(layer_TE: Tensor) -> Tensor:
        """How often each expert is chosen, [E]."""
        return torch.bincount(layer_TE[keep_T].topk(top_k, -1).indices.flatten(), minlength=experts)

    total_E = counts(torch.stack(logits).mean(0)).double()
    divisor = float(total_E.sum()) if basis == "assignments" else float(keep_T.sum())
    percent_E = 100 * total_E / max(divisor, 1.0)
    return {
        "percent": percent_E,
        "variance": float(percent_E.var()),
        "min": float(percent_E.min()),
        "max": float(percent_E.max()),
        "counts_per_layer": torch.stack([counts(layer) for layer in logits]),
    }
