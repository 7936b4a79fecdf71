"""What the layers of the dense model see on a batch of text: the material of routers and of groups of tokens.

    hidden_inputs       x, what enters decoder layer l (Hugging Face's hidden_states[l])
    mlp_inputs          norm(x + attention), what enters its feed-forward layer, and would enter a router
    sequence_features   the mean over positions of the last layer's output, for grouping sequences

All on one rank, without gradients, padding dropped where `counted_BS` (bool) is False.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from moe_engine.data.loader import Batch
from moe_engine.model.transformer import Transformer
from moe_engine.parallel.weight import key_of
from moe_engine.upcycle.kmeans import kmeans


@contextmanager
def inputs_of(modules: dict[int, nn.Module]) -> Iterator[dict[int, Tensor]]:
    """The first argument of each module, under its key, as of its last call."""
    seen: dict[int, Tensor] = {}
    handles = [m.register_forward_pre_hook(partial(_note, seen, key)) for key, m in modules.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _note(seen: dict[int, Tensor], key: int, module: nn.Module, args: tuple[Tensor, ...]) -> None:
    seen[key] = args[0]


@torch.no_grad()
def mlp_inputs(
    model: Transformer, batch: Batch, see: Callable[[int, Tensor], None], counted_BS: Tensor | None = None
) -> None:
    """Calls see(layer, x[T, D] of the counted tokens) for each layer as it runs, so that one layer's are in memory."""
    keep_T = slice(None) if counted_BS is None else counted_BS.flatten()
    note = lambda layer: lambda module, args: see(layer, args[0][keep_T])  # noqa: E731
    ffn = [model.get_submodule(f"layers.{i}.ffn") for i in range(len(model.layers))]
    handles = [module.register_forward_pre_hook(note(layer)) for layer, module in enumerate(ffn)]
    try:
        model.hidden(batch.tokens_BS, batch.positions_BS)
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def hidden_inputs(model: Transformer, tokens_S: Tensor) -> Tensor:
    """x[N, S, D] of one sequence, for each of N layers."""
    with inputs_of(dict(enumerate(model.layers))) as seen:
        model.hidden(tokens_S.unsqueeze(0), torch.arange(len(tokens_S), device=tokens_S.device).unsqueeze(0))
    return torch.stack([seen[layer] for layer in range(len(model.layers))])


def sequence_features(h_TD: Tensor, shape: tuple[int, ...], counted_BS: Tensor | None = None) -> Tensor:
    """The mean feature[B, D], fp32, of the counted tokens of each sequence; h of a batch of shape [B, S]."""
    h_BSD = h_TD.float().view(*shape, -1)
    every_BS = torch.ones(shape, dtype=torch.bool, device=h_TD.device)
    keep_BS1 = (every_BS if counted_BS is None else counted_BS).unsqueeze(-1)
    return (h_BSD * keep_BS1).sum(dim=1) / keep_BS1.sum(dim=1).clamp(min=1)


def group_sequences(feature_BD: Tensor, groups: int, seed: int) -> Tensor:
    """group[B] int64 of a sample's sequences, by k-means of their features: the `domain_B` that importance reads."""
    return kmeans(feature_BD, groups, torch.Generator().manual_seed(key_of(seed, "upcycle/groups"))).label_N
