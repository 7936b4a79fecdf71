"""Rotary frequencies against the published formula; packed documents against each document alone."""

import math

import pytest
import torch
import torch.nn.functional as F

from moe_engine.config import Model, RopeScaling
from moe_engine.model.attention import inverse_frequencies, places, rotate
from moe_engine.model.transformer import Transformer
from moe_engine.parallel.local_ranks import run_on_ranks
from moe_engine.parallel.mesh import Mesh
from moe_engine.parallel.weight import initialise
from tests.model.layouts import compare

SIZES = dict(
    vocab_size=60, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=4096, initializer_range=0.2,
)  # fmt: skip


def llama3(inverse: float, factor: float, low: float, high: float, original: int) -> float:
    """Llama 3.1's scaling of one frequency, branch by branch as published."""
    wavelength = 2 * math.pi / inverse
    if wavelength > original / low:
        return inverse / factor
    if wavelength < original / high:
        return inverse
    smooth = (original / wavelength - low) / (high - low)
    return (1 - smooth) * inverse / factor + smooth * inverse


@pytest.mark.parametrize(
    ("theta", "head_dim", "factor", "low", "high", "original"),
    [(500_000.0, 128, 32.0, 1.0, 4.0, 8192), (500_000.0, 64, 8.0, 1.0, 4.0, 8192), (1e4, 12, 3.0, 0.5, 7.0, 100)],
)
def test_llama3_frequencies(theta: float, head_dim: int, factor: float, low: float, high: float, original: int):
    scaling = RopeScaling(
        factor=factor, low_freq_factor=low, high_freq_factor=high, original_max_position_embeddings=original
    )
    plain = [theta ** (-2 * i / head_dim) for i in range(head_dim // 2)]
    scaled = [llama3(inverse, factor, low, high, original) for inverse in plain]
    kinds = {(s == p, s == p / factor) for s, p in zip(scaled, plain)}
    assert len(kinds) == 3  # the case has frequencies of all three branches
    config = Model(**SIZES, head_dim=head_dim, rope_theta=theta, rope_scaling=scaling)
    torch.testing.assert_close(
        inverse_frequencies(config).double(), torch.tensor(scaled, dtype=torch.float64), rtol=2e-6, atol=0
    )
    unscaled = inverse_frequencies(config.model_copy(update={"rope_scaling": None}))
    torch.testing.assert_close(unscaled.double(), torch.tensor(plain, dtype=torch.float64), rtol=2e-6, atol=0)


def test_a_model_without_storage_has_its_frequencies():
    config = Model(**SIZES, head_dim=8)
    with torch.device("meta"):
        frequencies = inverse_frequencies(config)
    assert torch.equal(frequencies, inverse_frequencies(config)) and frequencies.device.type == "cpu"


def test_rotation_turns_pairs_and_keeps_relative_places():
    """(i, i + C/2) turns by position * frequency; scores depend on the distance alone."""
    frequency = torch.tensor([1.0, 0.3])
    q, k = torch.randn(2, 1, 1, 9, 4)
    at = places(torch.arange(9).unsqueeze(0), frequency, torch.float32)
    turned = rotate(q, at.cos, at.sin)
    pair = torch.complex(q[..., 1], q[..., 3]) * torch.polar(torch.ones(9), torch.arange(9) * 0.3)
    torch.testing.assert_close(torch.complex(turned[..., 1], turned[..., 3]), pair)
    later = places(torch.arange(9).unsqueeze(0) + 100, frequency, torch.float32)
    torch.testing.assert_close(
        turned @ rotate(k, at.cos, at.sin).mT,
        rotate(q, later.cos, later.sin) @ rotate(k, later.cos, later.sin).mT,
        atol=1e-4,
        rtol=1e-4,
    )


def test_bias_is_none_or_block_triangular():
    frequency = torch.ones(2)
    assert places(torch.arange(5).expand(2, 5), frequency, torch.float32).bias is None
    positions = torch.tensor([[0, 1, 0, 1, 2], [3, 4, 5, 6, 7]])  # the second window starts inside a document
    bias = places(positions, frequency, torch.float32).bias
    assert bias is not None and set(bias.flatten().tolist()) == {0.0, -math.inf}
    document = [[0, 0, 1, 1, 1], [0] * 5]
    wanted = [[[q >= k and d[q] == d[k] for k in range(5)] for q in range(5)] for d in document]
    assert (bias.squeeze(1) == 0).tolist() == wanted


@pytest.mark.parametrize("experts", [0, 4])
@pytest.mark.parametrize("lengths", [(1, 6, 5), (4, 8), (3, 1, 1, 7)])
def test_packed_documents_equal_each_document_alone(lengths: tuple[int, ...], experts: int):
    """Losses and every gradient; a leak of one key across a border would show in both."""
    model = Transformer(Model(**SIZES, num_local_experts=experts), Mesh())
    initialise(model, 0)
    draw = torch.Generator().manual_seed(4)
    tokens, labels = torch.randint(60, (2, 1, sum(lengths)), generator=draw)
    positions = torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0)
    packed = model(tokens, positions, labels).loss_T
    packed.sum().backward()
    together = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    alone = []
    for part, label in zip(tokens.split(lengths, 1), labels.split(lengths, 1)):
        loss = model(part, torch.arange(part.shape[1]).unsqueeze(0), label).loss_T
        loss.sum().backward()
        alone.append(loss.detach())
    torch.testing.assert_close(packed.detach(), torch.cat(alone), atol=1e-5, rtol=1e-5)
    for name, p in model.named_parameters():
        assert p.grad is not None and together[name] is not None
        assert float((together[name] - p.grad).norm() / p.grad.norm()) < 1e-5, name


def test_attention_is_grouped_query_softmax():
    """One layer's attention, head by head in fp64: query head h reads kv head h // (H/G)."""
    config = Model(**SIZES)
    layer = Transformer(config, Mesh()).double()
    initialise(layer, 3)
    attention = layer.layers[0].attention
    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    at = places(torch.arange(7).unsqueeze(0), inverse_frequencies(config), torch.float64)
    q, k, v = ((p(x)).view(7, -1, 8) for p in (attention.q, attention.k, attention.v))
    heads = []
    for h in range(4):
        turned = [rotate(m[:, i], at.cos[0, 0], at.sin[0, 0]) for m, i in ((q, h), (k, h // 2))]
        scores = (turned[0] @ turned[1].T / 8**0.5).masked_fill(torch.ones(7, 7).triu(1).bool(), -math.inf)
        heads.append(F.softmax(scores, -1) @ v[:, h // 2])
    torch.testing.assert_close(attention(x, at), torch.cat(heads, -1) @ attention.o.weight.T)


@pytest.mark.parametrize(("layout", "recompute"), [((1, 2, 2), "none"), ((1, 1, 4), "full"), ((2, 1, 2), "selective")])
@pytest.mark.parametrize("kind", ["head", "projection"])
def test_norms_of_heads_on_several_ranks(kind: str, layout: tuple[int, int, int], recompute: str):
    """tp cuts the heads: the weight of one head is shared by them all, the mean of all heads is taken over ranks.

    With a shared expert beside the routed ones."""
    config = Model(
        **SIZES | {"num_key_value_heads": 4}, qk_norm=kind, num_local_experts=4, moe_layers=(1,),
        shared_intermediate_size=24, router_aux_loss="sequence", router_aux_loss_coef=0.1,
    )  # fmt: skip
    run_on_ranks(lambda rank: compare(config, layout, recompute), 4)
