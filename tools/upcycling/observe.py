"""What is learned from the dense model as it reads: router rows, and how much each neuron matters.

The model runs in fp32, on one rank, only where something asks for it, and is gone before the weights are written.
virtual has one row for each group of experts, repeated over the experts of the group.
"""

import argparse
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_engine.checkpoint.hf.folder import HfFolder
from moe_engine.errors import DataError
from moe_engine.model.transformer import Transformer
from moe_engine.parallel.mesh import Mesh
from moe_engine.parallel.weight import key_of
from moe_engine.upcycle import SCORED, Options, routers, virtual
from moe_engine.upcycle.features import mlp_inputs
from moe_engine.upcycle.importance import importance_of_clusters, neuron_importance
from moe_engine.upcycle.prompts import prompt_rows
from tools.upcycling.flags import OF_FEATURES, OF_PROMPTS
from tools.upcycling.source import RouterRows
from tools.upcycling.text import Text, batches

FEATURE_BYTES = 1 << 30  # of layers' inputs, held at once
PASS_TOKENS = 2048  # that go forward and backward at once: their logits and gradients are held in fp32


class Observed(NamedTuple):
    """router, attention_router: rows of a layer's routers. scores: importance[N, E, F] of the methods that need it."""

    router: RouterRows
    attention_router: RouterRows
    scores: Tensor | None


def observe(given: argparse.Namespace, options: Options, parent: HfFolder, text: Text) -> Observed:
    """Run the dense model over the sample and the prompts, if there is one that reads them."""
    attention_router = drawn_rows(given, options, parent, "attention")
    looks = text.sample_BS is not None or text.prompts is not None
    dense = load(parent, parent.model) if looks else None
    if dense is None:
        return Observed(drawn_rows(given, options, parent, ""), attention_router, None)
    gates = None
    if given.router_init in OF_FEATURES:
        assert text.sample_BS is not None
        gates = feature_rows(given.router_init, dense, text.sample_BS, options, given.method)
        router: RouterRows = lambda layer, experts: repeated(gates[layer], options, given.method)  # noqa: E731
    elif given.router_init in OF_PROMPTS:
        assert text.prompts is not None
        rows_NED = prompt_rows(given.router_init, dense, text.prompts, text.bos_id)
        router = lambda layer, experts: repeated(rows_NED[layer], options, given.method)  # noqa: E731
    else:
        router = drawn_rows(given, options, parent, "")
    scores = None
    if given.method in SCORED:
        assert text.sample_BS is not None
        scores = importance(dense, text.sample_BS, options, gates, given.importance)
    return Observed(router, attention_router, scores)


def rows_of(options: Options, method: str) -> int:
    """Different rows of a router."""
    return options.experts // options.granularity if method == "virtual" else options.experts


def repeated(rows_ED: Tensor, options: Options, method: str) -> Tensor:
    """A row for each expert."""
    return virtual.repeat_rows(rows_ED, options) if method == "virtual" else rows_ED


def drawn_rows(given: argparse.Namespace, options: Options, parent: HfFolder, which: str) -> RouterRows:
    """Rows that need no data, of FFN routers ("") or of attention's, which are normal where the others are observed."""
    kind = "normal" if given.router_init in (*OF_FEATURES, *OF_PROMPTS) else given.router_init
    seed = key_of(options.seed, which) if which else options.seed

    def rows(layer: int, experts: int) -> Tensor:
        drawn = routers.drawn(kind, experts, parent.model.hidden_size, layer, seed, given.router_std)
        return drawn if which else repeated(drawn, options, given.method)

    return rows


def feature_rows(kind: str, dense: Transformer, tokens_BS: Tensor, options: Options, method: str) -> list[Tensor]:
    """clusters or random_features of each layer's inputs, of as many layers at once as FEATURE_BYTES hold."""
    make, layers = getattr(routers, kind), len(dense.layers)
    at_once = max(1, FEATURE_BYTES // (4 * tokens_BS.numel() * dense.config.hidden_size))
    groups_B = torch.zeros(len(tokens_BS), dtype=torch.int64)
    rows = []
    for first in range(0, layers, at_once):
        chosen = range(first, min(first + at_once, layers))
        each = [mlp_inputs(dense, batch, layers=chosen) for batch in batches(tokens_BS, groups_B)]
        for layer in chosen:
            x_TD = torch.cat([x.pop(layer) for x in each])
            rows.append(make(x_TD, rows_of(options, method), layer, options.seed))
    return rows


def importance(
    dense: Transformer, tokens_BS: Tensor, options: Options, gates: list[Tensor] | None, variant: Any
) -> Tensor:
    """score[N, E, F] over the groups that the gates make of tokens, or without gates of sequences that are alike."""
    group_B = torch.zeros(len(tokens_BS), dtype=torch.int64)
    given = batches(tokens_BS, group_B, max(1, PASS_TOKENS // tokens_BS.shape[1]))
    if gates is None:
        if len(tokens_BS) < options.experts:
            raise DataError(
                f"{len(tokens_BS)} sequences of {tokens_BS.shape[1]} tokens, fewer than --experts {options.experts}: "
                "give more --text and --text-tokens, or a smaller --seq-length"
            )
        return importance_of_clusters(dense, given, options.experts, options.seed, variant)
    return neuron_importance(dense, given, options.experts, gates, variant)


def load(source: Any, model: Any) -> Transformer:
    """A model in fp32 on one rank, its weights read from a source."""
    decoder = Transformer(model, Mesh())
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            parameter.copy_(source.whole(name))
    return decoder.eval()
