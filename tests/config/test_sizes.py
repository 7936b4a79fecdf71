"""Parameter arithmetic: published totals, and a per-rank count that enumerates every weight of every rank."""

import math

import pytest

from moe_engine.config import Model, Parallel
from moe_engine.config.files import read_model
from moe_engine.config.sizes import parameter_counts, rank_parameters

HEAD_NORMS = {"qk_norm": "head", "shared_intermediate_size": 18}
WIDE_NORMS = {"qk_norm": "projection"}
ROUTED_HEADS = {
    "num_attention_heads": 12, "num_key_value_heads": 2, "num_attention_experts": 6, "attention_moe_layers": (0, 2),
    "num_attention_experts_per_tok": 3, "qk_norm": "head",
}  # fmt: skip


def preset(name: str) -> Model:
    return Model.model_validate(read_model(name))


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("mixtral-8x7b", 46_702_792_704, 12_879_925_248),
        ("mixtral-8x22b", 140_620_634_112, 39_152_031_744),
        ("llama-3.2-1b", 1_235_814_400, 1_235_814_400),
        ("llama-3.2-3b", 3_212_749_824, 3_212_749_824),
        ("llama-3-8b", 8_030_261_248, 8_030_261_248),
        ("llama-2-7b", 6_738_415_616, 6_738_415_616),
        ("llama-3.2-3b-moe-8x", 18_010_942_464, 5_327_367_168),
        ("llama-3.2-3b-moe-8x-half", 9_555_225_600, 3_213_437_952),
        ("llama-moe-v2-8b", 8_031_309_824, 3_803_451_392),
    ],
)
def test_published_totals(name: str, total: int, active: int) -> None:
    counts = parameter_counts(preset(name))
    assert (counts.total, counts.active) == (total, active)


def test_llama_moe_v2_with_a_residual_expert() -> None:
    """S2.8: one expert for all tokens and one of seven chosen, 1792 wide each."""
    seven = {"num_local_experts": 7, "num_experts_per_tok": 1, "shared_intermediate_size": 1792}
    counts = parameter_counts(preset("llama-moe-v2-8b").model_copy(update=seven))
    assert (counts.total, counts.active) == (8_030_261_248 + 32 * 7 * 4096, 3_803_320_320)


def test_attention_experts_of_llama_are_slices_of_its_heads() -> None:
    """Eight kv heads make eight experts with no copy: only the routers come to the 8.03 billion."""
    dense, routers = preset("llama-moe-v2-8b"), 32 * 8 * 4096
    counts = parameter_counts(dense.model_copy(update={"num_attention_experts": 8}))
    assert counts.total == 8_031_309_824 + routers and counts.attention_experts == parameter_counts(dense).attention
    assert counts.active == 3_803_451_392 + routers - counts.attention_experts * 6 // 8
    copied = parameter_counts(dense.model_copy(update={"num_attention_experts": 16}))
    assert copied.attention_experts - counts.attention_experts == 32 * 8 * 2 * 128 * 4096  # a second k and v of each


def test_llama_moe_is_counted_without_its_routers() -> None:
    two_of_eight = preset("llama-moe-3.5b")
    counts = parameter_counts(two_of_eight)
    assert counts.active - counts.routers == 3_492_024_320
    assert counts.total - counts.routers == 6_738_415_616
    sixteen = {"num_local_experts": 16, "moe_intermediate_size": 688}
    for top_k, active in ((4, 3_492_024_320), (2, 2_950_959_104)):
        counts = parameter_counts(two_of_eight.model_copy(update=sixteen | {"num_experts_per_tok": top_k}))
        assert counts.active - counts.routers == active


def test_parts_of_mixtral_and_its_ranks() -> None:
    model = preset("mixtral-8x7b")
    counts = parameter_counts(model)
    assert (counts.dense, counts.experts) == (1_605_636_096, 45_097_156_608)
    for ep, gib in ((1, 86.99), (2, 44.99), (4, 23.99), (8, 13.49)):
        rank = rank_parameters(model, Parallel(dp=8 // ep, ep=ep))
        assert rank.resident * 2 / 2**30 == pytest.approx(gib, abs=0.006)
        assert rank.owned == counts.total // 8
    rank = rank_parameters(model, Parallel(dp=4, ep=2))
    assert (2 * rank.resident + 18 * rank.owned) / 1e9 == pytest.approx(153.4, abs=0.05)


def weights(model: Model, ep: int, tp: int) -> list[tuple[tuple[int, ...], int, int, bool]]:
    """(shape, ways that ep cuts it, ways that tp cuts it, is an expert) of every weight of a model."""
    d, c, v = model.hidden_size, model.head_dim, model.vocab_size
    found: list[tuple[tuple[int, ...], int, int, bool]] = [((v, d), 1, tp, False), ((d,), 1, 1, False)]
    if not model.tie_word_embeddings:
        found.append(((v, d), 1, tp, False))
    for layer in range(model.num_hidden_layers):
        found += [((d,), 1, 1, False)] * 2
        if model.is_attention_moe(layer):
            heads = model.num_attention_heads // model.num_attention_experts
            found.append(((model.num_attention_experts, d), 1, 1, False))
            found += [((heads * c, d), ep, tp, True)] * (2 * model.num_attention_experts)
            found += [((c, d), ep, 1, True)] * (2 * model.num_attention_experts)
        else:
            found += [((model.num_attention_heads * c, d), 1, tp, False)] * 2
            found += [((model.num_key_value_heads * c, d), 1, tp, False)] * 2
        if model.qk_norm == "head":
            found += [((c,), 1, 1, False)] * 2
        elif model.qk_norm == "projection":
            found += [((n * c,), 1, tp, False) for n in (model.num_attention_heads, model.num_key_value_heads)]
        if model.is_moe(layer):
            found.append(((model.num_local_experts, d), 1, 1, False))
            found += [((model.shared_intermediate_size, d), 1, tp, False)] * 3
            found += [((model.moe_intermediate_size, d), ep, tp, True)] * (3 * model.num_local_experts)
        else:
            found += [((model.intermediate_size, d), 1, tp, False)] * 3
    return found


@pytest.mark.parametrize(
    ("tied", "extra"), [(True, {}), (False, HEAD_NORMS), (True, WIDE_NORMS), (False, ROUTED_HEADS)]
)
@pytest.mark.parametrize("moe_layers", ["all", (1,), ()])
@pytest.mark.parametrize(("dp", "ep", "tp"), [(1, 1, 1), (3, 2, 2), (5, 3, 1), (2, 1, 2)])
def test_counts_equal_an_enumeration(tied: bool, extra: dict, moe_layers: object, dp: int, ep: int, tp: int) -> None:
    model = Model.model_validate(
        {"vocab_size": 34, "hidden_size": 24, "intermediate_size": 22, "num_hidden_layers": 3, "num_attention_heads": 4}
        | {"num_key_value_heads": 2, "head_dim": 10, "num_local_experts": 6, "moe_intermediate_size": 14}
        | {"tie_word_embeddings": tied, "moe_layers": moe_layers, "num_experts_per_tok": 3}
        | extra
    )
    listed = weights(model, ep, tp)
    counts = parameter_counts(model)
    assert counts.total == sum(math.prod(shape) for shape, *_ in listed)
    idle = sum(math.prod(shape) for shape, _, _, expert in listed if expert) // 2
    assert counts.active == counts.total - idle
    rank = rank_parameters(model, Parallel(dp=dp, ep=ep, tp=tp))
    dense = sum(math.prod(shape) // (e * t) for shape, e, t, expert in listed if not expert)
    experts = sum(math.prod(shape) // (e * t) for shape, e, t, expert in listed if expert)
    assert (rank.dense, rank.expert) == (dense, experts)
    whole = rank_parameters(model, Parallel(dp=dp, ep=ep, tp=tp, replicate_attention_experts=True))
    moved = sum(math.prod(shape) // t for shape, _, t, expert in listed if expert and shape[0] % 10 == 0)  # C is 10
    assert (whole.dense, whole.expert) == (dense + moved, experts - moved // ep)
    assert 0 <= rank.owned_dense * dp * ep - dense < dp * ep and 0 <= rank.owned_expert * dp - experts < dp
