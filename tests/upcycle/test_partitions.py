"""random, clustering, gradient, llama_moe_v2: each neuron in one expert; and what a partition can and cannot keep."""

from itertools import combinations

import pytest
import torch

from moe_engine.errors import ConfigError
from moe_engine.upcycle import clustering, gradient, llama_moe_v2
from moe_engine.upcycle.methods import METHODS
from moe_engine.upcycle.neurons import greedy
from moe_engine.upcycle.options import Options
from moe_engine.upcycle.receipt import receipt
from tests.upcycle.small import (
    DENSE,
    dense_model,
    expert,
    experts_sum,
    neurons_of,
    random_dense,
    relative,
    scores,
    swiglu_ffn,
    tokens,
    upcycle,
)

PARTITIONS = ["random", "clustering", "gradient", "llama_moe_v2"]


def extra(method: str, experts: int) -> tuple[torch.Tensor, ...]:
    return (scores(experts),) if method == "gradient" else ()


@pytest.mark.parametrize("method", PARTITIONS)
@pytest.mark.parametrize("experts", [8, 5, 1])
def test_each_neuron_is_in_one_expert_and_the_sum_is_the_dense_layer(method: str, experts: int) -> None:
    dense, options = random_dense(), Options(experts=experts, top_k=1)
    routed = METHODS[method].build(1, dense, options, *extra(method, experts))
    assert routed.w_gate_up.shape == (experts, 2, 40 // experts, 48) and routed.shared is None
    assert sorted(n for held in neurons_of(routed, dense) for n in held) == list(range(40))
    x = torch.randn(17, 48, generator=torch.Generator().manual_seed(2))
    assert relative(experts_sum(x, routed), swiglu_ffn(x, dense)) < 1e-12


@pytest.mark.parametrize("method", PARTITIONS)
def test_all_experts_with_equal_weights_and_scale_e_are_the_dense_model(method: str) -> None:
    parent, options = dense_model(), Options(experts=8, top_k=8, scale=8.0)
    child = upcycle(parent, method, options, "zeros", *extra(method, 8))
    assert child.config.routed_scaling_factor == 8 and child.config.moe_intermediate_size == 5
    found = receipt(parent, child, tokens(), METHODS[method].preserves(options))
    assert found.max <= 1e-6 and "s/E = 1 " in found.expected


@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (5, 3)])
def test_the_mean_over_all_choices_is_s_over_e(experts: int, top_k: int) -> None:
    """s = E/k, the published rule, gives y/k; s = E is unbiased."""
    dense, options = random_dense(), Options(experts=experts, top_k=top_k)
    child = METHODS["random"].child(DENSE, options)
    routed = METHODS["random"].build(0, dense, options)
    x = torch.randn(9, 48, generator=torch.Generator().manual_seed(2))
    y_E = [swiglu_ffn(x, expert(routed, e)) for e in range(experts)]
    choices = list(combinations(range(experts), top_k))
    for s in (child.routed_scaling_factor, float(experts)):
        mean = sum(s / top_k * y_E[e] for choice in choices for e in choice) / len(choices)
        assert relative(mean, s / experts * swiglu_ffn(x, dense)) < 1e-12
    assert child.routed_scaling_factor == pytest.approx(experts / top_k) and child.norm_topk_prob


def test_random_and_contiguous_orders() -> None:
    dense = random_dense()
    held = [neurons_of(METHODS["random"].build(layer, dense, Options()), dense) for layer in (0, 1)]
    assert held[0] != held[1] and held[0] != [list(range(5 * e, 5 * e + 5)) for e in range(8)]
    held = neurons_of(llama_moe_v2.build(0, dense, Options()), dense)
    assert held == [list(range(5 * e, 5 * e + 5)) for e in range(8)]
    by_score = neurons_of(llama_moe_v2.build(0, dense, Options(), scores(8)), dense)
    assert by_score == neurons_of(gradient.build(0, dense, Options(), scores(8)), dense)


@pytest.mark.parametrize("projection", ["gate", "up"])
def test_clusters_are_tighter_than_a_random_split(projection: str) -> None:
    dense = random_dense(96, 10)
    options = Options(projection=projection)
    rows = torch.nn.functional.normalize(dense.gate_FD if projection == "gate" else dense.up_FD, dim=1)

    def spread(neuron_Ef: torch.Tensor) -> float:
        return sum(float((rows[n] - rows[n].mean(dim=0)).square().sum()) for n in neuron_Ef)

    ours = clustering.clusters(0, dense, options)
    assert sorted(ours.flatten().tolist()) == list(range(96)) and ours.shape == (8, 12)
    for seed in range(20):
        split = torch.randperm(96, generator=torch.Generator().manual_seed(seed)).view(8, 12)
        assert spread(ours) < 0.9 * spread(split)


def test_clusters_find_directions_whatever_the_length_of_rows() -> None:
    draw = torch.Generator().manual_seed(4)
    angle = torch.arange(30) % 6 * 0.8 + 0.02 * torch.randn(30, generator=draw)
    length = 10 ** (2 * torch.rand(30, 1, generator=draw))
    dense = random_dense(30, 2)._replace(gate_FD=length * torch.stack([angle.cos(), angle.sin()], dim=1))
    found = clustering.clusters(0, dense, Options(experts=6))
    assert {tuple(n) for n in found.tolist()} == {tuple(range(e, 30, 6)) for e in range(6)}


def test_greedy_follows_the_published_loop() -> None:
    """The loop as it is written: the largest score among experts with room; of equal ones, the later expert."""
    for seed in range(10):
        draw = torch.Generator().manual_seed(seed)
        score_EF = torch.randint(0, 4, (4, 20), generator=draw).float()  # many ties
        held: list[list[int]] = [[] for _ in range(4)]
        used: set[int] = set()
        while len(used) < 20:
            best, who, what = -1.0, -1, -1
            for e in range(4):
                if len(held[e]) == 5:
                    continue
                n = max((i for i in range(20) if i not in used), key=lambda i: (float(score_EF[e, i]), -i))
                if float(score_EF[e, n]) >= best:
                    best, who, what = float(score_EF[e, n]), e, n
            held[who].append(what)
            used.add(what)
        assert greedy(score_EF, 5).tolist() == [sorted(n) for n in held]


def test_greedy_gives_ties_to_the_later_expert() -> None:
    assert greedy(torch.ones(3, 6), 2).tolist() == [[4, 5], [2, 3], [0, 1]]
    assert greedy(torch.tensor([[9.0, 8, 0, 0], [9, 9, 1, 2]]), 2).tolist() == [[2, 3], [0, 1]]


@pytest.mark.parametrize("method", PARTITIONS)
def test_experts_must_divide_the_layer(method: str) -> None:
    with pytest.raises(ConfigError, match=r"experts 3 does not divide the 40 neurons of a layer: valid are 1, 2, 4"):
        METHODS[method].child(DENSE, Options(experts=3))
    with pytest.raises(ConfigError, match="experts 3 does not divide"):
        METHODS[method].build(0, random_dense(), Options(experts=3), *extra(method, 3))
