"""What holds for every method: dtype, determinism, the parent left alone; options and receipts."""

import pytest
import torch

from moe_engine.config import Model
from moe_engine.errors import ConfigError
from moe_engine.upcycle.layer import Dense, Routed
from moe_engine.upcycle.methods import METHODS, SCORED
from moe_engine.upcycle.options import Options, changed
from moe_engine.upcycle.preservation import Preservation
from moe_engine.upcycle.receipt import receipt
from moe_engine.upcycle.transplant import dense_layer, routed_weights, transplant
from tests.upcycle.small import DENSE, dense_model, random_dense, scores, tokens, upcycle

OPTIONS = {
    "residual": Options(experts=7, top_k=1), "sharing_inter": Options(experts=7), "virtual": Options(granularity=2),
    "copy": Options(noise_std=1e-2, noise_share=0.5), "drop": Options(compat=True), "mix": Options(experts=2),
}  # fmt: skip


def built(method: str, dense: Dense, layer: int = 1, **changes: int) -> Routed:
    options = Options(**{**OPTIONS.get(method, Options()).__dict__, **changes})
    extra = [scores(options.experts)] if method in SCORED else [[dense]] if method == "mix" else []
    return METHODS[method].build(layer, dense, options, *extra)


def tensors(routed: Routed) -> list[torch.Tensor]:
    return [routed.w_gate_up, routed.w_down, *(routed.shared or [])]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtype_shapes_and_determinism(method: str, dtype: torch.dtype) -> None:
    dense = random_dense(dtype=dtype)
    before = [w.clone() for w in dense]
    torch.manual_seed(1)
    first = built(method, dense)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    again = built(method, dense)
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state())  # the global generator was not drawn from
    for a, b in zip(tensors(first), tensors(again), strict=True):
        assert a.dtype == dtype and a.is_contiguous() and torch.equal(a, b)
    experts, _, width, hidden = first.w_gate_up.shape
    assert first.w_down.shape == (experts, hidden, width) and hidden == 48
    for w in tensors(first):
        w.zero_()  # the result is no view of the parent
    assert all(torch.equal(a, b) for a, b in zip(before, dense))


@pytest.mark.parametrize("method", ["copy", "half", "random", "drop"])
def test_layers_and_seeds_differ(method: str) -> None:
    dense = random_dense()
    first = built(method, dense).w_gate_up
    assert not torch.equal(first, built(method, dense, layer=2).w_gate_up)
    assert not torch.equal(first, built(method, dense, seed=1).w_gate_up)


@pytest.mark.parametrize("method", METHODS)
def test_theory_is_stated(method: str) -> None:
    found = METHODS[method].preserves(OPTIONS.get(method, Options()))
    assert found.text.split(":")[0] in ("exact", "scaled", "not preserved")
    assert (found.bound is not None) == found.text.startswith("exact")


def test_impossible_options_are_listed_together() -> None:
    with pytest.raises(ConfigError) as error:
        Options(experts=4, top_k=5, drop_ratio=1.5, noise_std=-1.0, scale=0.0, projection="down", dense_ends=-1)
    text = str(error.value)
    for words in ("top_k 5: valid are 1 to 4", "drop_ratio 1.5", "noise_std -1.0", "scale 0.0", "'down'", "dense_ends"):
        assert words in text
    with pytest.raises(ConfigError, match="attention_top_k 9: valid are 1 to 8"):
        Options(attention_experts=8, attention_top_k=9)


def test_parents_that_cannot_be_turned() -> None:
    moe = Model.model_validate(DENSE.model_dump() | {"num_local_experts": 4})
    with pytest.raises(ConfigError, match="has 4 experts already"):
        METHODS["copy"].child(moe, Options())
    with pytest.raises(ConfigError, match="dense_ends 2 leaves none of 3 layers to turn: valid are 0 to 1"):
        METHODS["copy"].child(DENSE, Options(dense_ends=2))
    with pytest.raises(ConfigError, match="no nonsense"):
        changed(DENSE, nonsense=1)
    with pytest.raises(ConfigError, match="num_experts_per_tok"):
        changed(DENSE, num_experts_per_tok=0)


@torch.no_grad()
def test_receipt_measures_and_checks() -> None:
    parent = dense_model()
    other = upcycle(parent, "random", Options())
    found = receipt(parent, other, tokens(), Preservation("exact: not really", 1e-5))
    at = torch.arange(33).expand(4, 33)
    difference = (parent.logits(tokens(), at) - other.logits(tokens(), at)).abs()
    assert found.max == pytest.approx(float(difference.max()), rel=1e-4)
    assert found.mean == pytest.approx(float(difference.mean()), rel=1e-4)
    assert 0 < found.argmax_agreement < 1 and not found.holds and found.expected == "exact: not really"
    assert receipt(parent, other, tokens()).holds  # nothing is claimed, nothing is missed
    other.layers[1].get_submodule("attention.q").weight.fill_(torch.nan)  # pyright: ignore
    broken = receipt(parent, other, tokens(), Preservation("exact: not really", 1e-5))
    assert broken.max != broken.max and not broken.holds, "a NaN is a difference"


def test_receipt_is_in_fp32_without_router_noise_and_leaves_the_models() -> None:
    parent = dense_model().bfloat16()
    child = upcycle(parent, "copy", Options()).bfloat16()
    noisy, still = (upcycle(dense_model(), "random", Options()) for _ in range(2))
    noisy.layers[0].ffn.router.jitter = 0.5
    assert receipt(still, noisy, tokens()).max == 0
    assert receipt(parent, child, tokens()).max <= 2e-6
    assert receipt(parent.float(), child, tokens()).max <= 2e-6
    assert parent.training and child.training and child.norm.weight.dtype == torch.bfloat16


def test_transplant_refuses_what_does_not_fit() -> None:
    parent = dense_model()
    child = upcycle(parent, "copy", Options())
    with pytest.raises(ValueError, match=r"found None for layers.0.ffn.router.weight, expected \(8, 48\)"):
        transplant(parent, child, {})
    routed = METHODS["random"].build(0, dense_layer(parent, 0), Options())
    with pytest.raises(ValueError, match=r"found \(8, 2, 5, 48\) for layers.0.ffn.experts.w_gate_up"):
        transplant(parent, child, routed_weights(0, routed, torch.zeros(8, 48)))
    with pytest.raises(ValueError, match="layer 0 holds experts"):
        dense_layer(child, 0)


def test_every_expert_of_a_child_gets_a_gradient() -> None:
    child = upcycle(dense_model(), "copy", Options(), "random")
    ids = tokens(8, 64)
    child(ids, torch.arange(64).expand(8, 64), ids)[0].mean().backward()
    for layer in child.layers:
        assert bool((layer.ffn.experts.w_down.grad.flatten(1).norm(dim=1) > 0).all())
