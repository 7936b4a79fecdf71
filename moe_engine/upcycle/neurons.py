"""Which neurons an expert gets, by importance: score[e, i] says how much neuron i matters to the tokens of group e.

top           the most important neurons of each expert; a neuron may be in many experts or in none
greedy        each neuron in one expert: always the largest score that is left, of the experts with room
shared_pool   the neurons that most experts would take: the residual expert, which is always on
"""

import torch
from torch import Tensor

from moe_engine.errors import DataError


def checked(score_EF: Tensor, experts: int, neurons: int) -> Tensor:
    """score[E, F] in fp32 on the CPU; ValueError for another shape, DataError if it holds NaN or infinity."""
    if score_EF.shape != (experts, neurons):
        raise ValueError(f"found scores {tuple(score_EF.shape)}, expected [{experts}, {neurons}]: experts, neurons")
    if not bool(score_EF.isfinite().all()):
        raise DataError("the importance of neurons is not finite: the dense model diverges on the sample of text")
    return score_EF.float().cpu()


def top(score_EF: Tensor, width: int, free_F: Tensor | None = None) -> Tensor:
    """neuron[E, width]: the most important of the free ones (default: all), ties to the lower; ascending."""
    if free_F is not None:
        score_EF = score_EF.masked_fill(~free_F, -torch.inf)
    order_EF = score_EF.sort(dim=1, descending=True, stable=True).indices
    return order_EF[:, :width].sort(dim=1).values


def greedy(score_EF: Tensor, width: int, free_F: Tensor | None = None) -> Tensor:
    """neuron[E, width]: each free neuron in one expert. Ties go to the later expert, then to the lower neuron.

    LLaMA-MoE's rule (2406.16554): among the experts with room, the largest score of an unused neuron decides next.
    There must be at least E * width free neurons.
    """
    experts, neurons = score_EF.shape
    free = [True] * neurons if free_F is None else free_F.tolist()
    chosen: list[list[int]] = [[] for _ in range(experts)]
    for place in score_EF.flip(0).flatten().sort(descending=True, stable=True).indices.tolist():
        expert, neuron = experts - 1 - place // neurons, place % neurons
        if free[neuron] and len(chosen[expert]) < width:
            free[neuron] = False
            chosen[expert].append(neuron)
    return torch.tensor(chosen).sort(dim=1).values


def shared_pool(score_EF: Tensor, width: int, size: int) -> Tensor:
    """`size` neurons, ascending: in each round those which the most experts have among their top `width` free ones.

    A round that finds too many takes the lower ones (LLaMA-MoE's residual construction).
    """
    neurons = score_EF.shape[1]
    free_F = torch.ones(neurons, dtype=torch.bool)
    while (missing := size - int((~free_F).sum())) > 0:
        wanted = top(score_EF, min(width, int(free_F.sum())), free_F)
        count_F = wanted.flatten().bincount(minlength=neurons)
        free_F[(count_F == count_F.max()).nonzero().flatten()[:missing]] = False
    return (~free_F).nonzero().flatten()
