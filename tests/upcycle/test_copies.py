"""copy, half, drop and mix: experts that are whole dense layers, or began as such."""

import pytest
import torch

from moe_engine.errors import ConfigError
from moe_engine.upcycle import copy, drop, half, mix
from moe_engine.upcycle.layer import Dense
from moe_engine.upcycle.methods import METHODS
from moe_engine.upcycle.options import Options
from moe_engine.upcycle.receipt import receipt
from moe_engine.upcycle.transplant import dense_layer, routed_weights, transplant
from tests.upcycle.small import DENSE, dense_model, expert, random_dense, tokens, upcycle


@pytest.mark.parametrize("router", ["zeros", "normal", "random", "uniform"])
@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (5, 3), (3, 1)])
def test_copy_is_exact_whatever_the_router(router: str, experts: int, top_k: int) -> None:
    """Three layers, Llama-3 RoPE, tied embeddings, head_dim other than hidden / heads."""
    parent, options = dense_model(), Options(experts=experts, top_k=top_k)
    found = receipt(parent, upcycle(parent, "copy", options, router), tokens(), copy.preserves(options))
    assert found.max <= 2e-6 and found.argmax_agreement == 1.0
    assert found.holds and found.bound is not None and found.expected.startswith("exact")


def test_copy_without_renormalising_is_scaled_and_said_so() -> None:
    parent, options = dense_model(), Options(norm_topk_prob=False)
    child = upcycle(parent, "copy", options, "zeros")
    found = receipt(parent, child, tokens(), copy.preserves(options))
    assert found.max > 1e-3 and found.bound is None and found.expected.startswith("scaled")
    for layer in parent.layers:
        layer.ffn.down.weight.data *= 2 / 8  # a uniform router: the mass of the chosen is k/E
    assert receipt(parent, child, tokens()).max <= 2e-6


def test_dense_ends_keep_the_parents_layers() -> None:
    parent, options = dense_model(), Options(dense_ends=1)
    child = upcycle(parent, "copy", options)
    assert child.config.moe_layers == (1,) and child.config.num_moe_layers == 1
    assert receipt(parent, child, tokens()).max <= 2e-6


@pytest.mark.parametrize("share", [1.0, 0.3])
def test_noise_has_its_deviation_on_its_share(share: float) -> None:
    dense = random_dense(256, 128)
    routed = copy.build(2, dense, Options(experts=4, noise_std=0.01, noise_share=share))
    clean = copy.build(2, dense, Options(experts=4))
    for e in range(4):
        difference = torch.cat([(a - b).flatten() for a, b in zip(expert(routed, e), expert(clean, e))])
        changed = difference[difference != 0]
        assert abs(float(changed.std()) / 0.01 - 1) < 0.01
        assert abs(len(changed) / len(difference) - share) < 0.01
        assert e == 0 or not torch.equal(routed.w_down[e], routed.w_down[e - 1])


def test_half_is_not_preserved() -> None:
    """On a random tiny Llama about 41 % of the argmax tokens survive."""
    sizes = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "head_dim": 24}
    config, options = DENSE.model_copy(update=sizes | {"tie_word_embeddings": False}), Options()
    survived = []
    for seed in range(4):
        parent = dense_model(config, seed)
        child = upcycle(parent, "half", options, "kaiming")
        assert child.config.moe_intermediate_size == 64 and not child.config.norm_topk_prob
        found = receipt(parent, child, tokens(8, 64, 256), half.preserves(options))
        assert found.bound is None and found.expected.startswith("not preserved") and found.max > 0.1 * found.largest
        survived.append(found.argmax_agreement)
    assert abs(sum(survived) / 4 - 0.41) < 0.08, survived


def test_half_takes_the_first_half() -> None:
    options = Options()
    dense = random_dense(400, 64)
    routed = half.build(0, dense, options)
    difference = routed.w_gate_up[3, 1] - dense.up_FD[:200]
    assert abs(float(difference.std()) / 1e-3 - 1) < 0.03
    assert torch.equal(half.build(0, dense, Options(noise_std=0.0)).w_down[5], dense.down_DF[:, :200])
    with pytest.raises(ConfigError, match="intermediate_size 41 has no half"):
        half.child(DENSE.model_copy(update={"intermediate_size": 41}), options)


@pytest.mark.parametrize("compat", [False, True])
def test_drop_of_nothing_is_a_copy(compat: bool) -> None:
    parent, options = dense_model(), Options(drop_ratio=0.0, compat=compat)
    assert receipt(parent, upcycle(parent, "drop", options), tokens(), drop.preserves(options)).max <= 2e-6
    assert drop.preserves(options).bound and not drop.preserves(Options(drop_ratio=0.1)).bound


@pytest.mark.parametrize("ratio", [0.5, 0.6, 1.0])
def test_drop_redraws_the_same_neurons_of_the_three_matrices(ratio: float) -> None:
    dense, options = random_dense(601, 96), Options(experts=6, drop_ratio=ratio)
    dense = Dense(dense.gate_FD * 0.02 + 0.3, dense.up_FD * 3 - 1, dense.down_DF * 0.5)
    routed = drop.build(1, dense, options)
    kept = []
    for e in range(6):
        gate, up, down = expert(routed, e)
        kept_F = (gate == dense.gate_FD).all(dim=1)
        assert int(kept_F.sum()) == 601 - int(ratio * 601)
        assert torch.equal(kept_F, (up == dense.up_FD).all(dim=1))
        assert torch.equal(kept_F, (down == dense.down_DF).all(dim=0))
        for new, old in ((gate, dense.gate_FD), (up, dense.up_FD), (down.T, dense.down_DF.T)):
            new, old = new[~kept_F], old[~kept_F]
            n = old.numel()
            assert abs(float(new.mean() - old.mean())) < 3 * float(old.std()) / n**0.5
            assert abs(float(new.std() / old.std()) - 1) < 3 / (2 * n) ** 0.5
        kept.append(kept_F)
    for e in range(1, 6):
        share = float((kept[0] & kept[e]).float().mean())
        assert abs(share - (1 - ratio) ** 2) < 3 * (0.25 / 601) ** 0.5


def test_drop_compat_shuffles_and_draws_for_each_matrix() -> None:
    dense = random_dense(200, 16)
    gate, up, down = expert(drop.build(0, dense, Options(experts=2, drop_ratio=0.5, compat=True)), 1)
    place = {tuple(row.tolist()): i for i, row in enumerate(dense.gate_FD)}
    order = [place.get(tuple(row.tolist()), -1) for row in gate]
    kept = [(new, old) for new, old in enumerate(order) if old >= 0]
    assert len(kept) == 100 and any(new != old for new, old in kept)
    same_up = [torch.equal(up[new], dense.up_FD[old]) for new, old in kept]
    same_down = [torch.equal(down[:, new], dense.down_DF[:, old]) for new, old in kept]
    assert 25 < sum(same_up) < 75 and 25 < sum(same_down) < 75 and same_up != same_down


def test_mix_takes_an_expert_of_each_model_and_averages_the_rest() -> None:
    first, second, third = (random_dense(seed=seed) for seed in (1, 2, 3))
    routed = mix.build(0, first, Options(experts=3), [second, third])
    for e, dense in enumerate((first, second, third)):
        assert all(torch.equal(a, b) for a, b in zip(expert(routed, e), dense))
    with pytest.raises(ConfigError, match="experts 4 of 3 models"):
        mix.build(0, first, Options(experts=4), [second, third])
    with pytest.raises(ConfigError, match="the models differ"):
        mix.build(0, first, Options(experts=2), [random_dense(neurons=24)])
    weights = [torch.tensor([1.0, 256.0]).bfloat16(), torch.tensor([2.0, 257.0]).bfloat16()]
    assert torch.equal(mix.average(weights), torch.tensor([1.5, 256.0]).bfloat16())
    with pytest.raises(ConfigError, match="the models differ"):
        mix.average([weights[0], weights[1].float()])
    assert METHODS["mix"].child(DENSE, Options()).moe_intermediate_size == 40


def test_mix_of_one_model_with_itself_is_that_model() -> None:
    parent = dense_model()
    child = upcycle(parent, "copy", Options(experts=2))

    parts = {}
    for layer in range(3):
        dense = dense_layer(parent, layer)
        parts |= routed_weights(layer, mix.build(layer, dense, Options(experts=2), [dense]), torch.zeros(2, 48))
    transplant(parent, child, parts)
    assert receipt(parent, child, tokens()).max <= 2e-6
