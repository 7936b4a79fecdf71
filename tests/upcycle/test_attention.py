"""The split of attention: all experts with equal weights and scale A are dense attention."""

import pytest
import torch
from torch import Tensor

from moe_engine.config import Model
from moe_engine.errors import ConfigError
from moe_engine.model.transformer import Transformer
from moe_engine.parallel.mesh import Mesh
from moe_engine.upcycle import attention
from moe_engine.upcycle.attention import AttentionExperts
from moe_engine.upcycle.methods import METHODS
from moe_engine.upcycle.options import Options
from moe_engine.upcycle.receipt import receipt
from moe_engine.upcycle.transplant import attention_weights, dense_layer, routed_weights, transplant
from tests.upcycle.small import DENSE, dense_model, tokens

HEADS, KV, DIM, HIDDEN, LENGTH = 12, 3, 10, 28, 9
MODEL = Model(
    vocab_size=9, hidden_size=HIDDEN, intermediate_size=8, num_hidden_layers=3, num_attention_heads=HEADS,
    num_key_value_heads=KV, head_dim=DIM,
)  # fmt: skip


def projections() -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = (HEADS * DIM, HIDDEN), (KV * DIM, HIDDEN), (KV * DIM, HIDDEN), (HIDDEN, HEADS * DIM)
    return [torch.randn(shape, generator=draw, dtype=torch.float64) / 5 for shape in shapes]


def heads_attend(x: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor) -> Tensor:
    """Causal attention of query heads q[h, C, D] to one KV head k, v[C, D], then o[D, h, C]; positions left out."""
    keys, values = x @ k.T, x @ v.T
    total = torch.zeros_like(x)
    for head in range(q.shape[0]):
        score = (x @ q[head].T) @ keys.T / DIM**0.5
        score = score.masked_fill(torch.ones(LENGTH, LENGTH).triu(1).bool(), -torch.inf)
        total += score.softmax(dim=1) @ values @ o[:, head].T
    return total


@pytest.mark.parametrize("experts", [3, 6, 12])
def test_all_experts_with_equal_weights_and_scale_a_are_dense_attention(experts: int) -> None:
    q, k, v, o = projections()
    x = torch.randn(LENGTH, HIDDEN, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    dense = torch.nn.functional.scaled_dot_product_attention(
        (x @ q.T).view(1, LENGTH, HEADS, DIM).transpose(1, 2), (x @ k.T).view(1, LENGTH, KV, DIM).transpose(1, 2),
        (x @ v.T).view(1, LENGTH, KV, DIM).transpose(1, 2), is_causal=True, enable_gqa=True,
    ).transpose(1, 2).reshape(LENGTH, -1) @ o.T  # fmt: skip
    parts = attention.build(MODEL, Options(attention_experts=experts), q, k, v, o)
    h = HEADS // experts
    assert [tuple(w.shape) for w in parts] == [
        (experts, h, DIM, HIDDEN), (experts, DIM, HIDDEN), (experts, DIM, HIDDEN), (experts, HIDDEN, h, DIM)
    ]  # fmt: skip
    moe = sum(experts * (1 / experts) * heads_attend(x, *(w[a] for w in parts)) for a in range(experts))
    assert float((moe - dense).norm() / dense.norm()) < 1e-14


def test_slices_are_the_published_ones_and_copies() -> None:
    q, k, v, o = (w.bfloat16() for w in projections())
    parts = attention.build(MODEL, Options(attention_experts=6), q, k, v, o)
    for a in range(6):
        rows = slice(a * 2 * DIM, (a + 1) * 2 * DIM)
        assert torch.equal(parts.w_q[a].flatten(0, 1), q[rows])
        assert torch.equal(parts.w_o[a].flatten(1, 2), o[:, rows])
        kv = slice(a // 2 * DIM, (a // 2 + 1) * DIM)
        assert torch.equal(parts.w_k[a], k[kv]) and torch.equal(parts.w_v[a], v[kv])
    assert all(w.dtype == torch.bfloat16 and w.is_contiguous() for w in parts)
    before = [w.clone() for w in (q, k, v, o)]
    for w in parts:
        w.zero_()
    assert all(torch.equal(a, b) for a, b in zip(before, (q, k, v, o)))


@pytest.mark.parametrize("experts", [0, 2, 4, 5, 9, 24])
def test_impossible_numbers_of_experts(experts: int) -> None:
    with pytest.raises(ConfigError, match=f"attention_experts {experts}: .* 3 KV heads .* 12 .* valid are 3, 6, 12"):
        attention.build(MODEL, Options(attention_experts=experts, attention_top_k=1), *projections())


def test_names() -> None:
    parts = AttentionExperts(*(torch.zeros(1, dtype=torch.bfloat16) for _ in range(4)))
    named = attention_weights(4, parts, torch.ones(3, 5))
    assert set(named) == {f"layers.4.attention.{n}" for n in ("router.weight", *(f"experts.w_{c}" for c in "qkvo"))}
    assert named["layers.4.attention.router.weight"].dtype == torch.bfloat16


def test_child() -> None:
    child = attention.child(MODEL, Options(attention_experts=6, attention_top_k=2, dense_ends=1)).model_dump()
    assert child["num_attention_experts"] == 6 and child["num_attention_experts_per_tok"] == 2
    assert child["attention_scaling_factor"] == 3 and child["attention_moe_layers"] == (1,)


@pytest.mark.parametrize("experts", [2, 6])
def test_in_the_engine_all_experts_are_the_dense_model(experts: int) -> None:
    options = Options(attention_experts=experts, attention_top_k=experts, attention_scale=experts, top_k=3)
    parent = dense_model()
    child = Transformer(attention.child(METHODS["copy"].child(DENSE, options), options), Mesh())
    parts: dict[str, Tensor] = {}
    for layer in range(3):
        weights = [parent.get_parameter(f"layers.{layer}.attention.{name}.weight").detach() for name in "qkvo"]
        split = attention.build(DENSE, options, *weights)
        parts |= attention_weights(layer, split, torch.zeros(experts, DENSE.hidden_size))
        routed = METHODS["copy"].build(layer, dense_layer(parent, layer), options)
        parts |= routed_weights(layer, routed, torch.zeros(8, DENSE.hidden_size))
    transplant(parent, child, parts)
    assert receipt(parent, child, tokens()).max <= 2e-6
