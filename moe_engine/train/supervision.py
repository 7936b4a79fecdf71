"""Supervised routing: a term that teaches routers which experts a sample's label prefers (model/supervision.py).

The target is learned (its weights are the model's `label_embedding`, saved with it), drawn once, or fixed by a map of
labels to experts. A term's labels are those of the data, or those that the run lists, in that order.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moe_engine.config import Run
from moe_engine.config.files import read_mapping
from moe_engine.config.supervision import Supervision
from moe_engine.data.loader import Batch
from moe_engine.errors import ConfigError
from moe_engine.labels import IGNORE, LABEL_EMBEDDING
from moe_engine.model.supervision import ExpertLabelEmbedding, label_kl
from moe_engine.model.transformer import Output, Transformer
from moe_engine.parallel.collectives import reduce_from, sum_
from moe_engine.parallel.mesh import Axis
from moe_engine.train.terms import Measure, Term


class Labels(NamedTuple):
    """names: of the targets. places: of each label of a batch, its target. by_domain: a batch's labels are domains."""

    names: tuple[str, ...]
    places: Tensor
    by_domain: bool = False


class RoutingSupervision(Term):
    """KL(target || router), mean over labelled tokens. table: gives the preferences of each target, logits [C, E]."""

    name, optional = "routing_supervision_loss", True

    def __init__(
        self, settings: Supervision, labels: Labels, table: Callable[[], Tensor], tp: Axis, top_k: int, steps: int
    ):
        self.settings, self.labels, self.table, self.tp, self.top_k = settings, labels, table, tp, top_k
        self.steps, self.coefficient = steps, settings.routing_weight

    def at(self, step: int) -> None:
        """The weight grows over the first steps and falls over the last; never to 0, so that gradients are there."""
        grown = (step + 1) / (self.settings.warmup_steps + 1)
        left = (self.steps - step) / (self.settings.anneal_steps + 1)
        self.coefficient = self.settings.routing_weight * max(min(1.0, grown, left), 1e-6)

    def targets(self, batch: Batch) -> Tensor:
        """The target of every token, int64 [B, S]; -1 where it has none."""
        label_BS = batch.expert_label_BS
        if self.labels.by_domain:
            counted_B = (batch.labels_BS != IGNORE).any(1)
            label_BS = torch.where(counted_B, batch.domain_B, -1).unsqueeze(1).expand_as(label_BS)
        places = self.labels.places.to(label_BS.device)
        return torch.where(label_BS >= 0, places[label_BS.clamp(min=0)], -1)

    def count(self, batch: Batch) -> Tensor:
        """Labelled tokens of this micro-batch."""
        return (self.targets(batch) >= 0).sum()

    def total(self, batch: Batch, output: Output, load: Sequence[Tensor] | None) -> Tensor:
        """The sum of divergences over labelled tokens."""
        label_T = self._mine(batch)
        logits = [routing.logits_TE for routing in output.routings]
        return reduce_from(label_kl(self.table(), logits, label_T, self.settings.aggregation).sum(), self.tp)

    def measures(self, batch: Batch, output: Output) -> Mapping[str, Measure]:
        """routing_accuracy [N]: in each layer, the share of labelled tokens whose chosen experts hold the target's
        top k; label_accuracy/NAME of each label, over all layers."""
        label_T = self._mine(batch)
        wanted_CE = self._wanted()
        wanted_TE = wanted_CE[label_T.clamp(min=0)]
        chosen_NTE = torch.stack(
            [torch.zeros_like(wanted_TE).scatter(1, r.chosen_TK.long(), True) for r in output.routings]
        )
        right_NT = (chosen_NTE | ~wanted_TE).all(-1) & (label_T >= 0)
        of_label_CT = label_T == torch.arange(len(self.labels.names), device=label_T.device).unsqueeze(1)
        sums = [right_NT.sum(1), (right_NT.sum(0) * of_label_CT).sum(1), of_label_CT.sum(1)]
        right_N, right_C, count_C = sum_(torch.cat(sums), self.tp).split([len(x) for x in sums])
        layers = len(output.routings)
        found = {"routing_accuracy": Measure(right_N, count_C.sum().expand(layers))}
        for name, right, count in zip(self.labels.names, right_C, count_C):
            found[f"label_accuracy/{name}"] = Measure(right, count * layers)
        return found

    def report(self) -> list[str]:
        """The experts that each label prefers, with their shares."""
        with torch.no_grad():
            share_CE = self.table().softmax(-1)
        lines = ["what each label prefers: expert share, the first ones"]
        for name, share_E in zip(self.labels.names, share_CE):
            shares, best = share_E.sort(descending=True, stable=True)  # ties: the lowest expert first
            shown = ", ".join(f"{int(e)} {100 * float(s):.0f} %" for s, e in zip(shares[: self.top_k + 1], best))
            lines.append(f"  {name}: {shown}")
        return lines

    def _mine(self, batch: Batch) -> Tensor:
        """Targets of this tp rank's tokens, [T/tp]."""
        label_T = self.targets(batch).flatten()
        return label_T[self.tp.cut(len(label_T))]

    @torch.no_grad()
    def _wanted(self) -> Tensor:
        """The target's top k of each label, bool [C, E]; fewer where it does not want as many."""
        table_CE = self.table()
        top_CK = table_CE.sort(dim=-1, descending=True, stable=True).indices[:, : self.top_k]
        wanted = torch.zeros_like(table_CE, dtype=torch.bool).scatter(1, top_CK, True)
        return wanted & table_CE.isfinite()


def supervision_terms(
    run: Run, model: Transformer, expert_labels: Sequence[str], domains: Sequence[str], tp: Axis
) -> tuple[Term, ...]:
    """The term of a run, or none; before its engine is made, as a learned target becomes part of the model.

    ConfigError when no router can be taught, or a label is not known.
    """
    settings = run.supervision
    if not settings.routing_weight:
        return ()
    if not run.model.num_moe_layers:
        raise ConfigError("supervision.routing_weight: found above 0, and no layer has experts: expected 0")
    if settings.target == "learned" and run.parallel.zero == 3:
        raise ConfigError("supervision.target: found learned with zero 3, expected drawn or fixed, or zero 0 to 2")
    labels = labels_of(settings, expert_labels, domains)
    experts = run.model.num_local_experts
    device = model.embedding.weight.device
    embedding = ExpertLabelEmbedding(len(labels.names), experts, settings.temperature, tp, run.train.seed).to(device)
    if settings.target == "fixed":
        table_CE = fixed_table(settings.map, labels.names, experts).to(device)
    else:
        table_CE = embedding.table().detach()
        if settings.target == "learned":
            setattr(model, LABEL_EMBEDDING, embedding)
    table = embedding.table if settings.target == "learned" else lambda: table_CE
    top_k = run.model.num_experts_per_tok
    return (RoutingSupervision(settings, labels, table, tp, top_k, run.train.steps),)


def labels_of(settings: Supervision, expert_labels: Sequence[str], domains: Sequence[str]) -> Labels:
    """Which target each label of the data has; ConfigError for one that the run does not list."""
    given = tuple(domains if settings.by == "domain" else expert_labels)
    if not given:
        raise ConfigError(
            "supervision.routing_weight: found above 0, and no sample has an expert_label: give --columns "
            "label=COLUMN, expert_label of a source, or supervision.by domain"
        )
    names = settings.labels or given
    other = settings.unknown_label_as
    if other is not None and other not in names:
        raise ConfigError(f"supervision.unknown_label_as: found {other}, expected one of {', '.join(names)}")
    unknown = [label for label in given if label not in names]
    if unknown and other is None:
        raise ConfigError(
            f"supervision.labels: the data has {', '.join(unknown)}, expected {', '.join(names)}; list it, or say what "
            "it counts as with supervision.unknown_label_as"
        )
    places = [names.index(label if label in names else other or "") for label in given]
    return Labels(names, torch.tensor(places, dtype=torch.int64), settings.by == "domain")


def fixed_table(path: str | None, names: Sequence[str], experts: int) -> Tensor:
    """Logits [C, E] of equal shares for the experts that a YAML file lists for each label, -inf for the others."""
    if path is None:
        raise ConfigError("supervision.map: not given, expected a YAML file of `label: [experts]` for target fixed")
    given = read_mapping(path)
    table_CE = torch.full((len(names), experts), float("-inf"))
    for i, name in enumerate(names):
        wanted = given.get(name)
        fits = isinstance(wanted, list) and wanted and all(isinstance(e, int) and 0 <= e < experts for e in wanted)
        if not fits:
            raise ConfigError(f"{path}: {name}: found {wanted}, expected a list of experts from 0 to {experts - 1}")
        table_CE[i, wanted] = 0.0
    return table_CE
