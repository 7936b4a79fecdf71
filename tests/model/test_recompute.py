"""Recompute changes memory and nothing else: losses, statistics, gradients and the routing are those of one pass."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moe_engine.config import Model
from moe_engine.model.transformer import Transformer
from moe_engine.parallel.local_ranks import run_on_ranks
from moe_engine.parallel.mesh import Mesh, build_mesh
from moe_engine.parallel.weight import initialise
from tests.model.layouts import router_loss

LAYERS = 3
CONFIG = Model(
    vocab_size=40, hidden_size=32, intermediate_size=24, num_hidden_layers=LAYERS, num_attention_heads=4,
    num_key_value_heads=2, num_local_experts=4, moe_layers=(0, 2), initializer_range=0.2,
    router_aux_loss_coef=0.1, router_z_loss_coef=0.01, shared_intermediate_size=12, qk_norm="projection",
)  # fmt: skip


class Calls(TorchDispatchMode):
    """Counts the operators that really run, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[func.name().partition(".")[0]] += 1
        return func(*args, **(kwargs or {}))


def once(
    recompute: str, dtype: torch.dtype, config: Model = CONFIG
) -> tuple[Tensor, Tensor, dict[str, Tensor], Counter]:
    model = Transformer(config, Mesh(), recompute).to(dtype)
    initialise(model, 0)
    draw = torch.Generator().manual_seed(0)
    tokens, labels = torch.randint(40, (2, 2, 16), generator=draw)
    positions = torch.arange(16).expand(2, 16)
    torch.manual_seed(3)  # jitter
    with Calls() as calls:
        output = model(tokens, positions, labels)
        (output.loss_T.mean() + router_loss(config, output)).backward()
    return (
        output.loss_T.detach(),
        output.stats[0].prob_NBE.detach(),
        {n: p.grad for n, p in model.named_parameters() if p.grad is not None},
        calls.count,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_same_numbers_as_without(recompute: str, dtype: torch.dtype):
    loss, stats, gradients, _ = once("none", dtype)
    other_loss, other_stats, other_gradients, _ = once(recompute, dtype)
    assert torch.equal(loss, other_loss) and torch.equal(stats, other_stats)
    assert gradients.keys() == other_gradients.keys() and len(gradients) == len(
        list(Transformer(CONFIG, Mesh()).parameters())
    )
    for name, gradient in gradients.items():
        assert torch.equal(gradient, other_gradients[name]), name


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_router_runs_once_per_layer(recompute: str):
    """The choice of experts is kept from the first pass; the rest of the layer is what is computed again."""
    *_, calls = once(recompute, torch.bfloat16)
    assert calls["moe_engine::router_topk"] == 2
    assert calls["moe_engine::swiglu"] == (3 if recompute == "none" else 6)  # the dense layer and two shared experts
    assert calls["moe_engine::experts"] == (4 if recompute == "full" else 2)
    assert calls["moe_engine::experts_backward"] == 2


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_routing_survives_a_second_pass_that_would_choose_otherwise(recompute: str, monkeypatch: pytest.MonkeyPatch):
    """Between forward and backward the router weight is negated: a second routing would turn every choice round."""
    config = CONFIG.model_copy(update={"router_aux_loss": "none", "router_z_loss_coef": 0.0})
    model = Transformer(config, Mesh(), recompute)
    initialise(model, 0)
    tokens = torch.tensor([[7]])  # one token: two experts of each layer, and the other two after the change
    loss_T, *_, (stats,) = model(tokens, torch.zeros_like(tokens), tokens)
    used_NE = stats.count_NBE.sum(1)
    for layer in (0, 2):
        model.layers[layer].ffn.router.weight.data.neg_()
    loss_T.sum().backward()
    for layer, used_E in zip((0, 2), used_NE, strict=True):
        norm_E = model.layers[layer].ffn.experts.w_down.grad.flatten(1).norm(dim=1)
        assert int(used_E.sum()) == 2 and (norm_E > 0).tolist() == (used_E > 0).tolist(), layer


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_jitter_is_the_same_noise_in_both_passes(recompute: str):
    config = CONFIG.model_copy(update={"router_jitter_noise": 0.2})
    _, stats, gradients, _ = once("none", torch.float32, config)
    _, other_stats, other_gradients, _ = once(recompute, torch.float32, config)
    assert torch.equal(stats, other_stats)
    for name, gradient in gradients.items():
        assert torch.equal(gradient, other_gradients[name]), name


@pytest.mark.parametrize(("recompute", "trips"), [("none", 6), ("selective", 8), ("full", 8)])
def test_rows_travel_again_to_their_experts_and_not_back(recompute: str, trips: int):
    """Rows, their weights and the outputs, forward and backward; recompute repeats the first two."""

    def on_rank(rank: int) -> None:
        config = CONFIG.model_copy(update={"moe_layers": (1,)})
        model = Transformer(config, build_mesh(1, 2, 1), recompute)
        initialise(model, 0)
        tokens = torch.arange(32).view(2, 16)
        with Calls() as calls:
            model(tokens, torch.arange(16).expand(2, 16), tokens)[0].sum().backward()
        assert calls.count["c10d::alltoall_base_"] == trips

    run_on_ranks(on_rank, 2)
