"""What is learned from the dense model as it reads: router rows, and how much each neuron matters.

The model runs in fp32, on one rank, only where something asks for it, and is gone before the weights are written. For
routers from features it is read a layer at a time.
virtual has one row for each group of experts, repeated over the experts of the group.
"""

import argparse
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor

from moe_engine.checkpoint.hf.folder import HfFolder
from moe_engine.data.loader import Batch
from moe_engine.errors import DataError
from moe_engine.model.transformer import Transformer
from moe_engine.parallel.weight import key_of
from moe_engine.upcycle import routers, virtual
from moe_engine.upcycle.decoder import load, streamed
from moe_engine.upcycle.features import mlp_inputs
from moe_engine.upcycle.importance import importance_of_clusters, neuron_importance
from moe_engine.upcycle.methods import SCORED
from moe_engine.upcycle.options import OF_FEATURES, OF_PROMPTS, Options
from moe_engine.upcycle.prompts import prompt_rows
from moe_engine.upcycle.source import RouterRows
from moe_engine.upcycle.stages import stage
from moe_engine.upcycle.text import Text, batches

TOKENS_AT_ONCE = 1024  # whose activations of all layers are held for the gradients


class Observed(NamedTuple):
    """router, attention_router: rows of a layer's routers. scores: importance[N, E, F] of the methods that need it."""

    router: RouterRows
    attention_router: RouterRows
    scores: Tensor | None


def observe(given: argparse.Namespace, options: Options, parent: HfFolder, text: Text) -> Observed:
    """Run the dense model over the sample and the prompts, if there is one that reads them."""
    gates = scores = dense = None
    router, attention_router = (drawn_rows(given, options, parent, which) for which in ("", "attention"))
    if text.sample_BS is not None and given.method in SCORED and given.router_init not in OF_FEATURES:
        _enough(text.sample_BS, options)
    if given.router_init in OF_FEATURES:
        assert text.sample_BS is not None
        gates = feature_rows(given.router_init, parent, text.sample_BS, options, given.method)
        router = lambda layer, experts: repeated(gates[layer], options, given.method)  # noqa: E731
    if text.prompts is not None or given.method in SCORED:
        with stage("reading", len(parent.shapes), "weights") as progress:
            dense = load(parent, parent.model, progress)
    if text.prompts is not None:
        assert dense is not None
        rows_NED = prompt_rows(given.router_init, dense, text.prompts, text.bos_id)
        router = lambda layer, experts: repeated(rows_NED[layer], options, given.method)  # noqa: E731
    if given.method in SCORED:
        assert dense is not None and text.sample_BS is not None
        scores = importance(dense, text.sample_BS, options, gates, given.importance)
    return Observed(router, attention_router, scores)


def _enough(sample_BS: Tensor, options: Options) -> None:
    """DataError unless each group of sequences can have one."""
    if len(sample_BS) < options.experts:
        raise DataError(
            f"{len(sample_BS)} sequences of {sample_BS.shape[1]} tokens, fewer than --experts {options.experts}: "
            "give more --text and --text-tokens, or a smaller --seq-length"
        )


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


def feature_rows(kind: str, parent: HfFolder, tokens_BS: Tensor, options: Options, method: str) -> list[Tensor]:
    """clusters or random_features of each layer's inputs, in one pass that has one layer in memory."""
    make, rows = getattr(routers, kind), list[Tensor]()
    with stage("routers", parent.model.num_hidden_layers, "layers") as progress:

        def see(layer: int, x_TD: Tensor) -> None:
            rows.append(make(x_TD, rows_of(options, method), layer, options.seed))
            progress(1)

        (batch,) = batches(tokens_BS, len(tokens_BS))
        mlp_inputs(streamed(parent, parent.model), batch, see)
    return rows


def importance(
    dense: Transformer, tokens_BS: Tensor, options: Options, gates: list[Tensor] | None, variant: Any
) -> Tensor:
    """score[N, E, F] over the groups that the gates make of tokens, or without gates of sequences that are alike."""
    size = max(1, TOKENS_AT_ONCE // tokens_BS.shape[1])
    with stage("importance", len(tokens_BS), f"sequences of {tokens_BS.shape[1]} tokens") as progress:

        def sample() -> Iterator[Batch]:
            for batch in batches(tokens_BS, size):
                yield batch
                progress(len(batch.tokens_BS))

        if gates is not None:
            return neuron_importance(dense, sample(), options.experts, gates, variant)
        return importance_of_clusters(dense, sample(), options.experts, options.seed, variant)
