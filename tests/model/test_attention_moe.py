"""Attention experts: a loop over experts, sequences and documents as the truth, dense attention, and real ranks."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe_engine.config import Model
from moe_engine.model.attention import inverse_frequencies, places, rotate, turns
from moe_engine.model.attention_moe import AttentionMoE
from moe_engine.model.router_losses import balance_loss
from moe_engine.model.transformer import Transformer
from moe_engine.parallel.local_ranks import run_on_ranks
from moe_engine.parallel.mesh import Mesh
from moe_engine.parallel.weight import initialise
from tests.model.layouts import batch, compare, router_loss

SIZES = dict(
    vocab_size=60, hidden_size=32, intermediate_size=40, num_hidden_layers=3, num_attention_heads=16,
    num_key_value_heads=2, head_dim=4, initializer_range=0.2, num_attention_experts=4,
)  # fmt: skip
MIXED = dict(
    num_local_experts=8, moe_layers=(1, 2), attention_moe_layers=(0, 2), moe_intermediate_size=24,
    router_aux_loss="sequence", router_aux_loss_coef=0.1, router_z_loss_coef=0.01, attention_scaling_factor=2.0,
)  # fmt: skip


def layer(config: Model, dtype: torch.dtype = torch.float64) -> AttentionMoE:
    attention = AttentionMoE(config, Mesh())
    initialise(attention, 0)
    return attention.to(dtype)


def by_loop(layer: AttentionMoE, x_BSD: Tensor, positions_BS: Tensor) -> Tensor:
    """Expert by expert, sequence by sequence: the tokens of the expert alone, as one short sequence."""
    config, w, frequency = layer.config, layer.experts, inverse_frequencies(layer.config)
    probs = F.linear(x_BSD, layer.router.weight).softmax(-1)
    best, chosen = probs.topk(config.num_attention_experts_per_tok, -1)
    weight = torch.zeros_like(probs).scatter(-1, chosen, config.attention_scaling_factor * best / best.sum(-1, True))
    y = torch.zeros_like(x_BSD)
    for e in range(config.num_attention_experts):
        for b, positions in enumerate(positions_BS):
            mine = (chosen[b] == e).any(-1).nonzero().flatten()
            x, cos_sin = x_BSD[b, mine], turns(positions[mine], frequency, x_BSD.dtype)
            k, v, document = rotate(layer.k_norm(x @ w.w_k[e].T), *cos_sin), x @ w.w_v[e].T, mine - positions[mine]
            sees = (mine[:, None] >= mine) & (document[:, None] == document)
            for w_q, w_o in zip(w.w_q[e], w.w_o[e].unbind(1), strict=True):
                score = rotate(layer.q_norm(x @ w_q.T), *cos_sin) @ k.T / config.head_dim**0.5
                out = score.masked_fill(~sees, -math.inf).softmax(-1) @ v @ w_o.T
                y[b] = y[b].index_add(0, mine, weight[b, mine, e : e + 1] * out)
    return y


DOCUMENTS: dict[str, Callable[[], Tensor]] = {
    "whole": lambda: torch.arange(17).expand(3, 17),
    "documents": lambda: torch.tensor([[*range(5), *range(12)], [*range(1), *range(1), *range(15)], [*range(9, 26)]]),
}


@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("starved", [(), (1,), (0, 3)])
@pytest.mark.parametrize(
    "changes", [{}, {"num_attention_experts_per_tok": 1, "qk_norm": "head"}, {"attention_scaling_factor": 3.0}]
)
def test_output_and_gradients_equal_the_loop(changes: dict, starved: tuple[int, ...], documents: str):
    config, positions = Model(**SIZES | changes), DOCUMENTS[documents]()
    attention = layer(config)
    draw = torch.Generator().manual_seed(1)
    x, upstream = torch.randn(2, 3, 17, 32, generator=draw, dtype=torch.float64)
    x[..., 0] = 1.0
    attention.router.weight.data[list(starved), 0] = -100.0
    at = places(positions, inverse_frequencies(config), torch.float64)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    y, routing = attention(leaves[0].flatten(0, 1), at)
    count_E = torch.bincount(routing.chosen_TK.flatten(), minlength=config.num_attention_experts)
    assert [e for e, count in enumerate(count_E.tolist()) if not count] == list(starved)
    y.backward(upstream.flatten(0, 1))
    ours = [leaves[0].grad, *(p.grad for p in attention.parameters())]
    attention.zero_grad()
    truth = by_loop(attention, leaves[1], positions)
    truth.backward(upstream)
    torch.testing.assert_close(y, truth.flatten(0, 1), atol=1e-10, rtol=1e-10)
    for a, b in zip(ours, [leaves[1].grad, *(p.grad for p in attention.parameters())], strict=True):
        assert a is not None and b is not None
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("experts", [2, 4, 16])
def test_all_experts_with_equal_weights_are_dense_attention(experts: int, dtype: torch.dtype, close: float):
    """A = G kv heads, or more: then experts share copies of a kv head. Documents included."""
    config = Model(
        **SIZES | {"num_attention_experts": experts}, num_attention_experts_per_tok=experts,
        attention_scaling_factor=float(experts), qk_norm="head", attention_moe_layers=(1,),
    )  # fmt: skip
    model = Transformer(config, Mesh())
    initialise(model, 0)
    dense, sparse = model.to(dtype).layers[0].attention, model.layers[1].attention
    heads, copies = 16 // experts, experts // 2
    sparse.router.weight.data.zero_()
    sparse.experts.w_q.data.copy_(dense.q.weight.data.view(experts, heads, 4, 32))
    for name, matrix in (("w_k", dense.k), ("w_v", dense.v)):
        sparse.experts.get_parameter(name).data.copy_(matrix.weight.data.view(2, 4, 32).repeat_interleave(copies, 0))
    sparse.experts.w_o.data.copy_(dense.o.weight.data.view(32, experts, heads, 4).transpose(0, 1))
    positions = DOCUMENTS["documents"]()
    x = torch.randn(51, 32, generator=torch.Generator().manual_seed(2), dtype=dtype)
    at = places(positions, inverse_frequencies(config), dtype)
    truth = dense(x, at).detach()
    y = sparse(x, at)[0].detach()
    assert float((y - truth).norm() / truth.norm()) < close


LAYOUTS = [((1, 4, 1), "none"), ((1, 2, 2), "full"), ((2, 2, 1), "selective"), ((1, 1, 4), "none")]


@pytest.mark.parametrize(("layout", "recompute"), LAYOUTS)
@pytest.mark.parametrize("replicated", [False, True])
@pytest.mark.parametrize("qk_norm", ["none", "head"])
def test_layouts_equal_one_process(layout: tuple[int, int, int], recompute: str, replicated: bool, qk_norm: str):
    """Attention experts and feed-forward experts of different numbers; layers with either, both and none."""
    config = Model(**SIZES | MIXED | {"num_key_value_heads": 4}, qk_norm=qk_norm)
    run_on_ranks(lambda rank: compare(config, layout, recompute, replicate_attention_experts=replicated), 4)


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recompute_changes_nothing(recompute: str, dtype: torch.dtype):
    config = Model(**SIZES, **MIXED, router_jitter_noise=0.1)

    def gradients(how: str) -> list[Tensor]:
        model = Transformer(config, Mesh(), how).to(dtype)
        initialise(model, 0)
        torch.manual_seed(3)  # jitter
        output = model(*batch(60))
        (output.loss_T.mean() + router_loss(config, output)).backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    for ours, truth in zip(gradients(recompute), gradients("none"), strict=True):
        assert torch.equal(ours, truth)


def test_router_losses_are_means_of_each_kind():
    """Two attention routers of 4 experts, two feed-forward routers of 8; the loss of each kind alone, added."""
    config = Model(**SIZES, **MIXED | {"num_attention_experts_per_tok": 3})
    model = Transformer(config, Mesh())
    initialise(model, 0)
    output = model(*batch(60))
    ffn, attention = output.stats
    assert (ffn.top_k, attention.top_k) == (2, 3)
    assert ffn.count_NBE.shape == (2, 8, 8) and attention.count_NBE.shape == (2, 8, 4)
    for part in (ffn, attention):  # 8 sequences of 12 tokens
        assert part.count_NBE.sum(-1).tolist() == [[part.top_k * 12.0] * 8] * 2
        torch.testing.assert_close(part.prob_NBE.sum(-1), torch.full((2, 8), 12.0))
    for name in ("micro_batch", "hf_mixtral"):
        wanted = balance_loss(name, [ffn]) + balance_loss(name, [attention])
        torch.testing.assert_close(balance_loss(name, output.stats), wanted)


def test_an_expert_sees_its_own_tokens_alone():
    """A token that goes elsewhere changes nothing, a token that goes here changes those after it."""
    config = Model(**SIZES, num_attention_experts_per_tok=1)
    attention = layer(config)
    x = torch.randn(12, 32, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    x[:, :4] = F.one_hot(torch.tensor([0, 1, 0, 1, 2, 0, 1, 2, 0, 0, 1, 2]), 4)
    attention.router.weight.data.zero_()[:, :4] = 50 * torch.eye(4)
    at = places(torch.arange(12).unsqueeze(0), inverse_frequencies(config), torch.float64)
    changed = x.clone()
    changed[3, 4:] += 1.0  # a token of expert 1
    before, after = (attention(t, at)[0] for t in (x, changed))
    assert ((before - after).abs().amax(1) > 1e-9).nonzero().flatten().tolist() == [3, 6, 10]
