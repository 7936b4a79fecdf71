"""How much each neuron of a dense model matters to each group of tokens.

    h = silu(gate x) * (up x)                                  the input of down
    score[e, i] = mean over the tokens of group e of |h_i dL/dh_i|

L is the sum of the tokens' losses, so that a token counts the same in every batch. Only tokens with a label count (the
last token of a text has no gradient of its own). A group is a set of sequences, `domain_B` of the batches (LLaMA-MoE:
clusters of the text sample, `features.group_sequences`), or, with gates, the tokens whose argmax_e (gate_e . x) is e in
that layer (LLaMA-MoE-v2).

    feature_change   |h dL/dh|, summed over tokens         the default
    total            |sum over tokens of h dL/dh|
    feature_grad     |dL/dh|, summed over tokens
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from moe_engine.data.loader import IGNORED, Batch
from moe_engine.errors import DataError
from moe_engine.model.transformer import Transformer
from moe_engine.upcycle.features import inputs_of

Variant = Literal["feature_change", "total", "feature_grad"]


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
    if model.config.num_local_experts or model.recompute != "none":
        raise ValueError("expected a dense Transformer without recompute")
    layers, width = len(model.layers), model.config.intermediate_size
    device = next(model.parameters()).device
    sum_NEF = torch.zeros(layers, groups, width, dtype=torch.float64, device=device)
    count_NE = torch.zeros(layers, groups, dtype=torch.float64, device=device)
    for batch in batches:
        _add(model, batch, gates, variant, sum_NEF, count_NE)
    if bool((count_NE == 0).any()):
        layer, group = (count_NE == 0).nonzero()[0].tolist()
        raise DataError(f"group {group} has no token in layer {layer}: give more text or ask for fewer experts")
    return (sum_NEF.abs() / count_NE.unsqueeze(-1)).float()


def _add(
    model: Transformer,
    batch: Batch,
    gates: Sequence[Tensor] | None,
    variant: Variant,
    sum_NEF: Tensor,
    count_NE: Tensor,
) -> None:
    """One batch's sums and tokens, for every layer."""
    layers, groups = count_NE.shape
    down = {i: model.get_submodule(f"layers.{i}.ffn.down") for i in range(layers)}
    ffn = {i: model.get_submodule(f"layers.{i}.ffn") for i in range(layers)}
    with torch.enable_grad(), _differentiable(model), inputs_of(down) as h, inputs_of(ffn) as x:
        loss_T = model(batch.tokens_BS, batch.positions_BS, batch.labels_BS).loss_T
        grads = torch.autograd.grad(loss_T.sum(), [h[i] for i in range(layers)])
    valid_T = batch.labels_BS.flatten() != IGNORED
    for layer, grad_TF in enumerate(grads):
        if gates is None:
            group_T = batch.domain_B.repeat_interleave(batch.tokens_BS.shape[1])
        else:
            group_T = (x[layer].detach().float() @ gates[layer].float().T).argmax(dim=1)
        value_TF = grad_TF.double() if variant == "feature_grad" else grad_TF.double() * h[layer].detach()
        if variant != "total":
            value_TF = value_TF.abs()
        sum_NEF[layer].index_add_(0, group_T[valid_T], value_TF[valid_T])
        count_NE[layer] += group_T[valid_T].bincount(minlength=groups)


@contextmanager
def _differentiable(model: Transformer) -> Iterator[None]:
    """Gradients reach every activation, though all parameters may be frozen."""
    handle = model.embedding.register_forward_hook(lambda module, args, x_TD: x_TD.requires_grad_())
    try:
        yield
    finally:
        handle.remove()
