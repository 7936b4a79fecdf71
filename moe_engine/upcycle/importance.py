"""How much each neuron of a dense model matters to each group of tokens.

    h = silu(gate x) * (up x)                                  the input of down
    score[e, i] = mean over the tokens of group e of |h_i dL/dh_i|

L is the sum of the tokens' losses, so that a token counts the same in every batch. Only tokens with a label count (the
last token of a text has no gradient of its own). A group is a set of sequences, `domain_B` of the batches or, in
`importance_of_clusters` (LLaMA-MoE), a cluster of sequences that are alike; or, with gates, the tokens whose
argmax_e (gate_e . x) is e in that layer (LLaMA-MoE-v2). The text is read once: the groups of sequences are known after
it only, so their sums are kept by sequence until then, in Q N F numbers of fp64 for Q sequences.

    feature_change   |h dL/dh|, summed over tokens         the default
    total            |sum over tokens of h dL/dh|
    feature_grad     |dL/dh|, summed over tokens
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from moe_engine.data.loader import Batch
from moe_engine.errors import DataError
from moe_engine.labels import IGNORE
from moe_engine.model.transformer import Transformer
from moe_engine.upcycle.features import group_sequences, inputs_of, sequence_features

Variant = Literal["feature_change", "total", "feature_grad"]


class _Layer(NamedTuple):
    """x[T, D] enters the feed-forward layer; value[T, F] fp64 is what the variant sums."""

    x_TD: Tensor
    value_TF: Tensor


def neuron_importance(
    model: Transformer,
    batches: Iterable[Batch],
    groups: int,
    gates: Sequence[Tensor] | None = None,
    variant: Variant = "feature_change",
) -> Tensor:
    """score[N, E, F] fp32 of the N layers of a dense model on one rank, E = groups. The parameters get no gradient.

    gates: one [E, D] for each layer. DataError if a group has no token.
    """
    layers, width = len(model.layers), model.config.intermediate_size
    device = next(model.parameters()).device
    sum_NEF = torch.zeros(layers, groups, width, dtype=torch.float64, device=device)
    count_NE = torch.zeros(layers, groups, dtype=torch.float64, device=device)
    for batch in batches:
        valid_T = batch.labels_BS.flatten() != IGNORE
        for layer, found in enumerate(_layers(model, batch, variant)[0]):
            if gates is None:
                group_T = batch.domain_B.repeat_interleave(batch.tokens_BS.shape[1])
            else:
                group_T = (found.x_TD.float() @ gates[layer].float().T).argmax(dim=1)
            sum_NEF[layer].index_add_(0, group_T[valid_T], found.value_TF[valid_T])
            count_NE[layer] += group_T[valid_T].bincount(minlength=groups)
    return _mean(sum_NEF, count_NE)


def importance_of_clusters(
    model: Transformer, batches: Iterable[Batch], groups: int, seed: int, variant: Variant = "feature_change"
) -> Tensor:
    """score[N, E, F] as above, each group a cluster of sequences by their mean feature; `domain_B` is not read.

    One forward and one backward pass give the features and the gradients. ValueError for fewer sequences than groups.
    """
    features, sums, counts = [], [], []
    for batch in batches:
        found, h_TD = _layers(model, batch, variant)
        features.append(sequence_features(h_TD, batch.tokens_BS.shape))
        valid_BS1 = (batch.labels_BS != IGNORE).unsqueeze(-1)
        shape = *batch.tokens_BS.shape, -1
        sums.append(torch.stack([(each.value_TF.view(shape) * valid_BS1).sum(dim=1) for each in found]))
        counts.append(valid_BS1.sum(dim=(1, 2)).double())
    group_Q = group_sequences(torch.cat(features), groups, seed)
    sum_NQF, count_Q = torch.cat(sums, dim=1), torch.cat(counts)
    sum_NEF = sum_NQF.new_zeros(len(sum_NQF), groups, sum_NQF.shape[2]).index_add_(1, group_Q, sum_NQF)
    count_E = count_Q.new_zeros(groups).index_add_(0, group_Q, count_Q)
    return _mean(sum_NEF, count_E.expand(len(sum_NQF), -1))


def _mean(sum_NEF: Tensor, count_NE: Tensor) -> Tensor:
    if bool((count_NE == 0).any()):
        layer, group = (count_NE == 0).nonzero()[0].tolist()
        raise DataError(f"group {group} has no token in layer {layer}: give more text or ask for fewer experts")
    return (sum_NEF.abs() / count_NE.unsqueeze(-1)).float()


def _layers(model: Transformer, batch: Batch, variant: Variant) -> tuple[Iterator[_Layer], Tensor]:
    """What one batch says of each layer in turn, and the last layer's normalised output h[T, D]."""
    if model.config.num_local_experts or any(layer.recompute != "none" for layer in model.layers):
        raise ValueError("expected a dense Transformer without recompute")
    layers = range(len(model.layers))
    down = {i: model.get_submodule(f"layers.{i}.ffn.down") for i in layers}
    ffn = {i: model.get_submodule(f"layers.{i}.ffn") for i in layers}
    with (
        torch.enable_grad(),
        _differentiable(model),
        inputs_of(down) as h,
        inputs_of(ffn) as x,
        inputs_of({0: model.head}) as last,
    ):
        loss_T = model(batch.tokens_BS, batch.positions_BS, batch.labels_BS).loss_T
        grads = torch.autograd.grad(loss_T.sum(), [h[i] for i in layers])

    def each() -> Iterator[_Layer]:
        """Layer by layer, so that the fp64 values of one are held at a time."""
        for layer, grad_TF in enumerate(grads):
            value_TF = grad_TF.double() if variant == "feature_grad" else grad_TF.double() * h[layer].detach()
            yield _Layer(x[layer].detach(), value_TF if variant == "total" else value_TF.abs())

    return each(), last[0].detach()


@contextmanager
def _differentiable(model: Transformer) -> Iterator[None]:
    """Gradients reach every activation, though all parameters may be frozen."""
    handle = model.embedding.register_forward_hook(lambda module, args, x_TD: x_TD.requires_grad_())
    try:
        yield
    finally:
        handle.remove()
