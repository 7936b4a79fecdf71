"""sharing_inner, sharing_inter, residual: neurons chosen by importance."""

import pytest
import torch

from moe_engine.errors import ConfigError, DataError
from moe_engine.upcycle import sharing_inner, sharing_inter
from moe_engine.upcycle.methods import METHODS
from moe_engine.upcycle.neurons import shared_pool, top
from moe_engine.upcycle.options import Options
from moe_engine.upcycle.receipt import receipt
from tests.upcycle.small import (
    DENSE,
    dense_model,
    expert,
    neurons_of,
    random_dense,
    relative,
    scores,
    swiglu_ffn,
    tokens,
    upcycle,
)


def test_inner_takes_the_top_of_each_row() -> None:
    dense, score_EF = random_dense(), scores(4)
    for width in (None, 7):
        options = Options(experts=4, expert_width=width)
        assert sharing_inner.child(DENSE, options).moe_intermediate_size == (width or 10)
        held = neurons_of(sharing_inner.build(0, dense, options, score_EF), dense)
        for e in range(4):
            ranked = sorted(range(40), key=lambda n: -float(score_EF[e, n]))
            assert held[e] == sorted(ranked[: width or 10])
    counts = torch.tensor(held).flatten().bincount(minlength=40)
    assert counts.max() > 1 and counts.min() == 0


def test_top_gives_ties_to_the_lower_neuron() -> None:
    assert top(torch.tensor([[1.0, 2, 2, 2, 0]]), 2).tolist() == [[1, 2]]
    free = torch.tensor([True, False, True, True, True])
    assert top(torch.tensor([[1.0, 2, 2, 2, 0]]), 4, free).tolist() == [[0, 2, 3, 4]]


def test_pool_takes_what_most_experts_want_in_rounds() -> None:
    """All three want 6 and 7; without these two want 5, and the third 0 and 1; what is too much is cut at the size."""
    score_EF = torch.tensor([[0.0, 0, 0, 1, 2, 7, 8, 9], [0, 1, 5, 0, 0, 6, 8, 9], [3, 2, 0, 0, 0, 0, 8, 9]])
    for size in (1, 2, 3):
        assert shared_pool(score_EF, 2, size).tolist() == [[6], [6, 7], [5, 6, 7]][size - 1]


@pytest.mark.parametrize("method", ["sharing_inter", "residual"])
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize(("experts", "residual"), [(7, 1), (3, 2), (2, 3)])
def test_pool_sizes(method: str, share: bool, experts: int, residual: int) -> None:
    dense = random_dense()
    options = Options(experts=experts, top_k=1, residual_experts=residual, share_neurons=share)
    routed = METHODS[method].build(0, dense, options, scores(experts))
    width = 40 // (experts + residual)
    held = neurons_of(routed, dense)
    assert routed.shared is not None and routed.shared.gate_FD.shape == (residual * width, 48)
    shared = [int((dense.gate_FD == row).all(dim=1).nonzero()) for row in routed.shared.gate_FD]
    assert torch.equal(routed.shared.down_DF, dense.down_DF[:, shared]) and len(set(shared)) == residual * width
    assert all(len(n) == width and not set(n) & set(shared) for n in held)
    if share:
        free = [n for n in range(40) if n not in shared]
        for e in range(experts):
            assert held[e] == sorted(sorted(free, key=lambda n: -float(scores(experts)[e, n]))[:width])
    else:
        assert sorted(shared + [n for own in held for n in own]) == list(range(40))
        x = torch.randn(11, 48, generator=torch.Generator().manual_seed(2))
        total = swiglu_ffn(x, routed.shared) + sum(swiglu_ffn(x, expert(routed, e)) for e in range(experts))
        assert relative(total, swiglu_ffn(x, dense)) < 1e-12


def test_shared_and_all_routed_experts_are_the_dense_model() -> None:
    parent = dense_model()
    options = Options(experts=7, top_k=7, scale=7.0, share_neurons=False)
    for method in ("residual", "sharing_inter"):
        child = upcycle(parent, method, options, "zeros", scores(7))
        assert child.config.shared_intermediate_size == child.config.moe_intermediate_size == 5
        assert receipt(parent, child, tokens()).max <= 1e-6


def test_scales() -> None:
    options = Options(experts=7, top_k=1)
    assert METHODS["residual"].child(DENSE, options).routed_scaling_factor == 1
    assert METHODS["sharing_inter"].child(DENSE, options).routed_scaling_factor == 7


def test_impossible_widths_and_scores() -> None:
    dense = random_dense()
    for options, words in (
        (Options(), r"experts \+ residual_experts = 9 does not divide the 40 neurons"),
        (Options(experts=7, expert_width=6, share_neurons=False), "expert_width 6 x 8 .* is not the 40 neurons"),
        (Options(experts=7, expert_width=21), "residual_experts \\+ 1 of that are more than 40 neurons"),
        (Options(experts=7, residual_experts=0), "residual_experts 0"),
    ):
        with pytest.raises(ConfigError, match=words):
            sharing_inter.build(0, dense, options, scores(options.experts))
    with pytest.raises(ConfigError, match="expert_width 41 is more than the 40 neurons"):
        sharing_inner.build(0, dense, Options(expert_width=41), scores(8))
    with pytest.raises(ValueError, match=r"found scores \(7, 40\), expected \[8, 40\]"):
        sharing_inner.build(0, dense, Options(), scores(7))
    with pytest.raises(DataError, match="not finite"):
        sharing_inner.build(0, dense, Options(), scores(8) * torch.inf)
