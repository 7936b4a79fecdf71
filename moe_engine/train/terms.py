"""The terms that the objective is a sum of (objective.py), and the numbers that each logs.

What a term is called and what it measures is logged under that name without further code (docs/adding-a-term.md).
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moe_engine.config import Model
from moe_engine.data.loader import Batch
from moe_engine.labels import IGNORE
from moe_engine.model.router_losses import balance_loss, z_loss
from moe_engine.model.transformer import Output


class Measure(NamedTuple):
    """A logged number, or a tensor of them: `sum` and `count` are added over micro-batches and data ranks, and divided.

    count None: the sum itself is the number, in its own dtype.
    """

    sum: Tensor
    count: Tensor | None = None


class Term:
    """One part of the objective. name: the key of its mean in metrics.jsonl. coefficient 0: measured, not minimised."""

    name: str
    coefficient: float = 1.0
    optional = False  # a global batch may have nothing for it
    needs_load = False  # `total` is given the load of the whole global batch

    def at(self, step: int) -> None:
        """Called before each step, from 0, with its number: a coefficient may follow it."""

    def report(self) -> list[str]:
        """Lines that the log ends with."""
        return []

    def count(self, batch: Batch) -> Tensor:
        """This micro-batch's share of the divisor, a scalar on the batch's device; before any forward pass."""
        return torch.tensor(batch.tokens_BS.numel(), device=batch.tokens_BS.device)

    def total(self, batch: Batch, output: Output, load: Sequence[Tensor] | None) -> Tensor:
        """The differentiable sum on this micro-batch, a scalar, the same on all tp ranks.

        load: f_NE of the whole global batch for each kind of router (shares that sum to 1), where it is needed. Sums
        over `output.routings`, which hold this tp rank's tokens, are completed by `reduce_from(sum, tp)`.
        """
        raise NotImplementedError

    def measures(self, batch: Batch, output: Output) -> Mapping[str, Measure]:
        """What is logged beside the term itself, by name; without gradients, the same on all tp ranks.

        NAME/KEY is the entry KEY of a mapping NAME.
        """
        return {}


class LanguageModelLoss(Term):
    """Cross-entropy of the labelled tokens, in nats a token; of each data domain too."""

    name = "lm_loss"

    def __init__(self, domains: Sequence[str] = ()):
        self.domains = domains

    def count(self, batch: Batch) -> Tensor:
        """Labelled tokens of this micro-batch."""
        return (batch.labels_BS != IGNORE).sum()

    def total(self, batch: Batch, output: Output, load: Sequence[Tensor] | None) -> Tensor:
        """The sum of -log p of the labels, in nats."""
        return output.loss_T.sum()

    def measures(self, batch: Batch, output: Output) -> Mapping[str, Measure]:
        """labelled_tokens, a sum; domain_loss/NAME for each domain, in nats a labelled token of it."""
        found = {"labelled_tokens": Measure(self.count(batch))}
        loss_B = output.loss_T.view(batch.labels_BS.shape).sum(1).double()
        labelled_B = (batch.labels_BS != IGNORE).sum(1)
        for i, name in enumerate(self.domains):
            here_B = batch.domain_B == i
            found[f"domain_loss/{name}"] = Measure((loss_B * here_B).sum(), (labelled_B * here_B).sum())
        return found


class BalancingLoss(Term):
    """The balancing loss by the name in `router_aux_loss` (router_losses.py), and the load that it acts on.

    With "none" it is micro_batch's, only measured. aux_loss_hf is the same in transformers' convention.
    """

    name = "aux_loss"

    def __init__(self, config: Model):
        self.kind = "micro_batch" if config.router_aux_loss == "none" else config.router_aux_loss
        self.coefficient = 0.0 if config.router_aux_loss == "none" else config.router_aux_loss_coef
        self.needs_load = self.kind == "global_batch"
        self.names = load_names(config)

    def total(self, batch: Batch, output: Output, load: Sequence[Tensor] | None) -> Tensor:
        """The mean per token times B * S, the count: micro-batches weigh by their tokens."""
        return batch.tokens_BS.numel() * balance_loss(self.kind, output.stats, load)

    def measures(self, batch: Batch, output: Output) -> Mapping[str, Measure]:
        """aux_loss_hf; expert_load and attention_load, shares [N, E] that sum to 1 in each of N layers; dropped int64
        [N], of the feed-forward layers."""
        tokens = self.count(batch)
        found = {"aux_loss_hf": Measure(tokens * balance_loss("hf_mixtral", output.stats), tokens)}
        for name, stats in zip(self.names, output.stats, strict=True):
            count_NE = stats.count_NBE.sum(1)
            found[name] = Measure(count_NE, count_NE.sum(1, keepdim=True))
            if name == "expert_load":  # attention experts drop nothing
                found["dropped"] = Measure(stats.dropped_NB.sum(1).long())
        return found


class RouterZLoss(Term):
    """Mean of logsumexp(router logits)^2 over tokens and layers."""

    name = "z_loss"

    def __init__(self, config: Model):
        self.coefficient = config.router_z_loss_coef

    def total(self, batch: Batch, output: Output, load: Sequence[Tensor] | None) -> Tensor:
        """The mean per token times B * S, the count."""
        return batch.tokens_BS.numel() * z_loss(output.stats)


def pretraining_terms(config: Model, domains: Sequence[str] = ()) -> tuple[Term, ...]:
    """What pre-training minimises and measures; `domains` are the names that `Batch.domain_B` indexes."""
    routers = (BalancingLoss(config), RouterZLoss(config)) if load_names(config) else ()
    return (LanguageModelLoss(domains), *routers)


def load_names(config: Model) -> list[str]:
    """What the load of each kind of router is logged as, in the order of `Output.stats`."""
    names = {"expert_load": config.num_moe_layers, "attention_load": config.num_attention_moe_layers}
    return [name for name, layers in names.items() if layers]
