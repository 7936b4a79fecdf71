"""A model with supervised routing as one module, for a loop of one's own on one process."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moe_engine.config.supervision import Supervision
from moe_engine.data.loader import Batch
from moe_engine.model.router_losses import load_share
from moe_engine.model.supervision import ExpertLabelEmbedding
from moe_engine.model.transformer import Transformer
from moe_engine.train.objective import objective
from moe_engine.train.supervision import Labels, RoutingSupervision
from moe_engine.train.terms import Term, pretraining_terms


class SupervisedMoEWrapper(nn.Module):
    """A model with a label embedding, on one process: forward gives the objective of a batch (S1.24).

    LM + aux_coef * balancing + z-loss + routing_weight * supervision, as the training step has it.
    """

    def __init__(self, model: Transformer, labels: Sequence[str], routing_weight: float = 0.1, seed: int = 0):
        super().__init__()
        config, settings = model.config, Supervision(routing_weight=routing_weight)
        self.model = model
        self.label_embedding = ExpertLabelEmbedding(len(labels), config.num_local_experts, tp=model.tp, seed=seed)
        known = Labels(tuple(labels), torch.arange(len(labels)))
        term = RoutingSupervision(
            settings, known, self.label_embedding.table, model.tp, config.num_experts_per_tok, steps=1
        )
        self.terms: tuple[Term, ...] = (*pretraining_terms(config), *((term,) if routing_weight else ()))

    def forward(self, batch: Batch) -> Tensor:
        """The objective, a scalar; `batch.expert_label_BS` indexes the labels."""
        output = self.model(batch.tokens_BS, batch.positions_BS, batch.labels_BS)
        counts = [int(term.count(batch)) for term in self.terms]
        load = [load_share(stats.count_NBE.sum(1)) for stats in output.stats]
        return objective(self.terms, counts, batch, output, load)[0]
