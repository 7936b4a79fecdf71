"""A model that runs on one rank in fp32 and without gradients of its parameters, its weights read from a source.

load        whole in memory: for many passes
streamed    a layer is read when it runs and is gone when it has run: for one pass over all tokens
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from moe_engine.config import Model
from moe_engine.model.transformer import Transformer
from moe_engine.parallel.mesh import Mesh


def load(source: Any, model: Model, progress: Callable[[int], Any] = lambda n: None) -> Transformer:
    """All weights in memory; `progress` is told of each."""
    decoder = Transformer(model, Mesh())
    _read(source, decoder, progress=progress)
    return decoder.eval().requires_grad_(False)


def streamed(source: Any, model: Model, progress: Callable[[int], Any] = lambda n: None) -> Transformer:
    """Embedding, last norm and head in memory, and one layer at a time; `progress` is told of each that has run.

    Each pass reads all layers again.
    """
    with torch.device("meta"):
        decoder = Transformer(model, Mesh())
    for name, part in decoder.named_children():
        if name != "layers":
            _here(part)
    if model.tie_word_embeddings:
        decoder.head.weight = decoder.embedding.weight
    _read(source, decoder)
    for i, layer in enumerate(decoder.layers):
        layer.register_forward_pre_hook(lambda layer, args, i=i: _read(source, _here(layer), f"layers.{i}."))
        layer.register_forward_hook(lambda layer, args, out: _gone(layer, progress))
    return decoder.eval().requires_grad_(False)


def _here(module: nn.Module) -> nn.Module:
    """The module with memory for its weights."""
    return module.to_empty(device="cpu")


def _gone(layer: nn.Module, progress: Callable[[int], Any]) -> None:
    """Free the weights of a layer that has run."""
    layer.to_empty(device="meta")
    progress(1)


@torch.no_grad()
def _read(source: Any, module: nn.Module, prefix: str = "", progress: Callable[[int], Any] = lambda n: None) -> None:
    """Fill the parameters that have memory."""
    for name, parameter in module.named_parameters():
        if not parameter.is_meta:
            parameter.copy_(source.whole(prefix + name))
            progress(1)
