"""Routers from prompts (mergekit-moe): an expert is chosen where the model thinks of what its prompts speak of.

    hidden        the last token's hidden state at the entry of each layer, mean over prompts
    hidden_avg    the mean of the hidden states over positions, mean over prompts
    cheap_embed   the sum of the embeddings of the prompts' tokens, the same in every layer

    row = (positive - negative) / |positive - negative|

A prompt is a list of token ids, put behind an explicit BOS. Prompts run one at a time, so that no padding is seen.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moe_engine.errors import ConfigError
from moe_engine.model.transformer import Transformer
from moe_engine.upcycle.features import hidden_inputs
from moe_engine.upcycle.routers import warn_if_alike

Ids = Sequence[int]


class ExpertPrompts(NamedTuple):
    """Token ids of the prompts that an expert is for, and of those that it is not for."""

    positive: Sequence[Ids]
    negative: Sequence[Ids] = ()


def prompt_rows(kind: str, model: Transformer, experts: Sequence[ExpertPrompts], bos_id: int) -> Tensor:
    """Router rows[N, E, D], fp32, for the N layers of a model on one rank; warns of layers whose rows are alike.

    ConfigError for an unknown kind or an expert without a positive prompt.
    """
    if kind not in KINDS:
        raise ConfigError(f"router_init {kind!r}: from prompts are {', '.join(KINDS)}")
    if bare := [i for i, expert in enumerate(experts) if not expert.positive]:
        raise ConfigError(f"expert {bare[0]} has no positive prompt: give each expert at least one")
    rows = []
    for expert in experts:
        row_ND = KINDS[kind](model, _with_bos(model, expert.positive, bos_id))
        if expert.negative:
            row_ND = row_ND - KINDS[kind](model, _with_bos(model, expert.negative, bos_id))
        rows.append(row_ND / row_ND.norm(dim=-1, keepdim=True).clamp(min=1e-8))
    rows_NED = torch.stack(rows, dim=1)
    for layer in range(1 if kind == "cheap_embed" else len(rows_NED)):
        warn_if_alike(rows_NED[layer], layer)
    return rows_NED


def _with_bos(model: Transformer, prompts: Sequence[Ids], bos_id: int) -> list[Tensor]:
    """Each prompt behind one BOS, its own or a new one, as a tensor where the model is."""
    device = model.embedding.weight.device
    whole = [[*ids] if list(ids[:1]) == [bos_id] else [bos_id, *ids] for ids in prompts]
    return [torch.tensor(ids, device=device) for ids in whole]


def _last(model: Transformer, prompts: list[Tensor]) -> Tensor:
    return torch.stack([hidden_inputs(model, ids)[:, -1].float() for ids in prompts]).mean(dim=0)


def _average(model: Transformer, prompts: list[Tensor]) -> Tensor:
    return torch.stack([hidden_inputs(model, ids).float().mean(dim=1) for ids in prompts]).mean(dim=0)


def _embedding(model: Transformer, prompts: list[Tensor]) -> Tensor:
    sum_D = model.embedding.weight.detach()[torch.cat(prompts)].float().sum(dim=0)
    return sum_D.expand(len(model.layers), -1)


KINDS: dict[str, Callable[[Transformer, list[Tensor]], Tensor]] = {
    "hidden": _last,
    "hidden_avg": _average,
    "cheap_embed": _embedding,
}
