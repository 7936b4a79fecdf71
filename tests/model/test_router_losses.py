"""Every balancing loss against a loop over tokens: value, gradient, and what it is at uniform and collapsed routing."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moe_engine.model.router import RouterStats, Routing, router_stats
from moe_engine.model.router_losses import balance_loss, z_loss
from moe_engine.parallel.mesh import Axis

LAYERS, SEQUENCES, LENGTH, EXPERTS, K = 3, 4, 6, 5, 2
NAMES = ("micro_batch", "sequence", "global_batch", "layerwise", "hf_mixtral", "deepspeed_top2")


def random_logits(tilt: float = 1.5) -> Tensor:
    return torch.randn(LAYERS, SEQUENCES, LENGTH, EXPERTS, generator=torch.Generator().manual_seed(0)).double() * tilt


def chosen(logits: Tensor, k: int = K) -> Tensor:
    return logits.softmax(-1).topk(k, -1).indices


def routing_of(logits_TE: Tensor, index_TK: Tensor) -> Routing:
    """What a router returns that chose index_TK; weights are no part of the statistics."""
    lse_T, none = logits_TE.logsumexp(-1), torch.empty(0)
    return Routing(logits_TE, logits_TE.softmax(-1), lse_T, index_TK, index_TK, none, torch.zeros_like(lse_T))


def stats_of(logits: Tensor, index: Tensor, counted: Tensor | None = None) -> tuple[RouterStats, ...]:
    """What the model hands over: the routings of all layers, summed per sequence."""
    layers, sequences, length, _ = logits.shape
    group = torch.arange(sequences).repeat_interleave(length)
    group = group if counted is None else group.masked_fill(counted.flatten() == 0, -1)
    routings = [routing_of(logits[i].flatten(0, 1), index[i].flatten(0, 1)) for i in range(layers)]
    return router_stats([routings], group, sequences, Axis("tp"))


def load_of(index: Tensor, experts: int) -> list[Tensor]:
    count = torch.stack([torch.bincount(layer.flatten(), minlength=experts) for layer in index]).double()
    return [count / count.sum(1, keepdim=True)]


def fp(probs: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """f_e = share of the assignments, P_e = mean probability, over a list of tokens, one token at a time."""
    f, p = torch.zeros(probs.shape[-1]).double(), torch.zeros(probs.shape[-1]).double()
    for row, choice in zip(probs, index, strict=True):
        p = p + row / len(probs)
        for e in choice.tolist():
            f[e] += 1 / index.numel()
    return f, p


def micro_batch(logits: Tensor, index: Tensor, experts: int, k: int) -> Tensor:
    pairs = [fp(a.flatten(0, 1).softmax(-1), b.flatten(0, 1)) for a, b in zip(logits, index)]
    return torch.stack([experts * sum(f * p for f, p in [pair]).sum() for pair in pairs]).mean()  # type: ignore[union-attr]


def sequence(logits: Tensor, index: Tensor, experts: int, k: int) -> Tensor:
    pairs = [fp(row.softmax(-1), choice) for a, b in zip(logits, index) for row, choice in zip(a, b)]
    return torch.stack([experts * (f * p).sum() for f, p in pairs]).mean()


def hf_mixtral(logits: Tensor, index: Tensor, experts: int, k: int) -> Tensor:
    f, p = fp(logits.flatten(0, 2).softmax(-1), index.flatten(0, 2))
    return k * experts * (f * p).sum()


def deepspeed_top2(logits: Tensor, index: Tensor, experts: int, k: int) -> Tensor:
    return micro_batch(logits, index[..., :1], experts, 1)


LOOPS: dict[str, Callable[[Tensor, Tensor, int, int], Tensor]] = {
    "micro_batch": micro_batch,
    "sequence": sequence,
    "global_batch": micro_batch,  # with one micro-batch f is that of the global batch
    "layerwise": lambda *a: a[3] * micro_batch(*a),
    "hf_mixtral": hf_mixtral,
    "deepspeed_top2": deepspeed_top2,
}


@pytest.mark.parametrize("name", NAMES)
def test_value_and_gradient_equal_the_loop(name: str):
    ours, theirs = random_logits().requires_grad_(), random_logits().requires_grad_()
    index = chosen(ours.detach())
    value = balance_loss(name, stats_of(ours, index), load_of(index, EXPERTS))
    truth = LOOPS[name](theirs, index, EXPERTS, K)
    torch.testing.assert_close(value, truth)
    value.backward()
    truth.backward()
    assert theirs.grad is not None and float(theirs.grad.norm()) > 1e-3
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_global_batch_takes_its_load_from_elsewhere():
    """f of two micro-batches with P of one: the mean over both equals the loss of the whole."""
    logits = random_logits()
    index = chosen(logits)
    load = load_of(index, EXPERTS)
    halves = [
        balance_loss("global_batch", stats_of(logits[:, a], index[:, a]), load) for a in (slice(0, 1), slice(1, 4))
    ]
    whole = balance_loss("micro_batch", stats_of(logits, index))
    torch.testing.assert_close(halves[0] / 4 + halves[1] * 3 / 4, whole)
    with pytest.raises(AssertionError, match="global_batch needs the load"):
        balance_loss("global_batch", stats_of(logits, index))


@pytest.mark.parametrize(("experts", "k"), [(8, 2), (6, 3), (5, 1)])
@pytest.mark.parametrize("name", NAMES)
def test_uniform_routing_is_one_or_k(name: str, experts: int, k: int):
    index = (torch.arange(experts * 2).unsqueeze(1) + torch.arange(k)).remainder(experts).expand(2, 3, -1, k)
    logits = torch.zeros(2, 3, 2 * experts, experts).double()
    value = balance_loss(name, stats_of(logits, index), load_of(index, experts))
    assert value == pytest.approx(k if name in ("hf_mixtral", "layerwise") else 1.0, abs=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_collapse_is_the_largest_value(name: str):
    """All of the probability and the first choices on expert 0; with k = 2 half of the assignments go to expert 1."""
    logits = torch.zeros(1, 2, 10, 8).double()
    logits[..., 0] = 60.0
    index = torch.tensor([0, 1]).expand(1, 2, 10, 2)
    value = float(balance_loss(name, stats_of(logits, index), load_of(index, 8)))
    assert value == pytest.approx({"hf_mixtral": 8.0, "layerwise": 8.0, "deepspeed_top2": 8.0}.get(name, 4.0), rel=1e-9)
    one = torch.zeros(1, 2, 10, 1, dtype=torch.int64)
    assert float(balance_loss(name, stats_of(logits, one), load_of(one, 8))) == pytest.approx(8.0, rel=1e-9)


def test_pooling_hides_opposite_tilts():
    tilt = torch.linspace(-1.5, 1.5, EXPERTS).double()
    logits = random_logits(0.3)[:2] + torch.stack([tilt, -tilt]).view(2, 1, 1, -1)
    stats = stats_of(logits, chosen(logits))
    pooled, layerwise = (float(balance_loss(name, stats)) for name in ("hf_mixtral", "layerwise"))
    assert K * 0.999 < pooled < 0.9 * layerwise


def test_hf_mixtral_is_transformers():
    modeling = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    logits = random_logits()
    truth = modeling.load_balancing_loss_func(tuple(layer.flatten(0, 1) for layer in logits), EXPERTS, K)
    torch.testing.assert_close(balance_loss("hf_mixtral", stats_of(logits, chosen(logits))), truth, check_dtype=False)
    mask = torch.ones(SEQUENCES, LENGTH)
    mask[0, 4:] = mask[2, 1:] = 0
    masked = modeling.load_balancing_loss_func(tuple(layer.flatten(0, 1) for layer in logits), EXPERTS, K, mask)
    ours = balance_loss("hf_mixtral", stats_of(logits, chosen(logits), mask))
    torch.testing.assert_close(ours, masked, check_dtype=False)


def test_deepspeed_top2_is_deepspeed():
    gating = pytest.importorskip("deepspeed.moe.sharded_moe")
    logits = random_logits()[:1].float()
    truth, *_ = gating.top2gating(logits.flatten(0, 2), 1.0, 0, drop_tokens=False, top2_2nd_expert_sampling=False)
    ours = balance_loss("deepspeed_top2", stats_of(logits, chosen(logits)))
    torch.testing.assert_close(ours, truth, check_dtype=False)


@pytest.mark.parametrize("name", NAMES)
def test_padding_counts_for_nothing(name: str):
    """Masked tokens change no loss and get no gradient, wherever they would have gone."""
    logits = random_logits().requires_grad_()
    index = chosen(logits.detach())
    kept = LENGTH - 2
    counted = torch.ones(SEQUENCES, LENGTH)
    counted[:, kept:] = 0
    load = load_of(index[:, :, :kept], EXPERTS)
    stats = stats_of(logits, index, counted)
    truth = stats_of(logits[:, :, :kept], index[:, :, :kept])
    torch.testing.assert_close(balance_loss(name, stats, load), balance_loss(name, truth, load))
    torch.testing.assert_close(z_loss(stats), z_loss(truth))
    (balance_loss(name, stats, load) + z_loss(stats)).backward()
    assert logits.grad is not None
    assert (logits.grad[:, :, kept:] == 0).all() and (logits.grad[:, :, :kept] != 0).any()


def test_z_loss_and_unknown_names():
    logits = random_logits()
    stats = stats_of(logits, chosen(logits))
    z = sum(float(torch.logsumexp(row, 0)) ** 2 for row in logits.flatten(0, 2)) / logits[..., 0].numel()
    assert float(z_loss(stats)) == pytest.approx(z)
    with pytest.raises(ValueError, match="unknown balancing loss 'switch'"):
        balance_loss("switch", stats)


def test_statistics_count_the_choices_of_dropped_tokens_too():
    index = torch.tensor([[0, 2], [0, 1], [3, 1]], dtype=torch.int32)
    routing = routing_of(torch.randn(3, EXPERTS), index)._replace(dropped_T=torch.tensor([1.0, 2.0, 0.0]))
    (stats,) = router_stats([[routing], []], torch.zeros(3, dtype=torch.int64), 1, Axis("tp"))
    assert stats.count_NBE.flatten().tolist() == [2, 2, 1, 1, 0]
    assert stats.first_NBE.flatten().tolist() == [2, 0, 0, 1, 0]
    assert (stats.dropped_NB.item(), stats.tokens_NB.item()) == (3, 3)
    torch.testing.assert_close(stats.z_NB.item(), float(routing.lse_T.square().sum()))
