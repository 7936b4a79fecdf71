"""Router and MoE layer: loops over tokens and experts as the truth."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moe_engine.config import Model
from moe_engine.model.moe import MoE
from moe_engine.model.router import RouterStats, Routing, router_stats
from moe_engine.parallel.collectives import PendingRows
from moe_engine.parallel.local_ranks import run_on_ranks
from moe_engine.parallel.mesh import Axis, Mesh, build_mesh
from moe_engine.parallel.weight import initialise, note_of

EXPERTS, HIDDEN = 8, 16
BASE = Model(
    vocab_size=8, hidden_size=HIDDEN, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
    num_local_experts=EXPERTS, num_experts_per_tok=2, initializer_range=0.4,
)  # fmt: skip


def config(**changes: object) -> Model:
    return Model(**BASE.model_dump() | changes)


def layer(model: Model, mesh: Mesh | None = None, dtype: torch.dtype = torch.float32) -> MoE:
    moe = MoE(model, mesh or Mesh())
    initialise(moe, 0)
    return moe.to(dtype)


def tokens(count: int, seed: int = 1) -> Tensor:
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(seed))


def stats_of(routing: Routing, group_T: Tensor | None = None, groups: int = 1, tp: Axis | None = None) -> RouterStats:
    """The statistics of one layer; of all tokens together unless they are in groups."""
    group_T = torch.zeros(len(routing.lse_T), dtype=torch.int64) if group_T is None else group_T
    (stats,) = router_stats([[routing]], group_T, groups, tp or Axis("tp"))
    return stats


def route_by_loop(model: Model, probs_TE: Tensor, bias_E: Tensor | None = None) -> tuple[Tensor, Tensor, int]:
    """weight[T, E] and the choices [T, E] as dense 0/1, token by token in order, with capacity; and the drop count."""
    count, experts = probs_TE.shape
    k = model.num_experts_per_tok
    room = math.inf if model.capacity_factor is None else math.ceil(model.capacity_factor * count * k / experts)
    weight, chosen, used, dropped = (
        torch.zeros(count, experts).to(probs_TE),
        torch.zeros(count, experts),
        [0] * experts,
        0,
    )
    for t in range(count):
        score = probs_TE[t] if bias_E is None else probs_TE[t] + bias_E
        best = sorted(range(experts), key=lambda e: (-float(score[e]), e))[:k]
        total = sum(probs_TE[t, e] for e in best) if model.norm_topk_prob else 1.0
        for e in best:
            if used[e] < room:
                used[e] += 1
                weight[t, e] = probs_TE[t, e] / total * model.routed_scaling_factor
                chosen[t, e] = 1
            else:
                dropped += 1
    return weight, chosen, dropped


def moe_by_loop(moe: MoE, model: Model, x_TD: Tensor, probs_TE: Tensor) -> Tensor:
    """Every expert on every token, weighted: no permutation, no grouping."""
    weight, _, _ = route_by_loop(model, probs_TE, moe.router.expert_bias)
    y = torch.zeros_like(x_TD)
    if moe.shared is not None:
        gate, up = moe.shared.w_gate_up
        y = F.linear(F.silu(F.linear(x_TD, gate)) * F.linear(x_TD, up), moe.shared.down.weight)
    for e in range(model.num_local_experts):
        gate, up = moe.experts.w_gate_up[e]
        out = F.linear(F.silu(F.linear(x_TD, gate)) * F.linear(x_TD, up), moe.experts.w_down[e])
        y = y + weight[:, e : e + 1] * out
    return y


CHANGES = {
    "top2": {},
    "top1": {"num_experts_per_tok": 1},
    "all": {"num_experts_per_tok": 8},
    "as they are": {"norm_topk_prob": False, "num_experts_per_tok": 3},
    "scaled": {"routed_scaling_factor": 2.5, "norm_topk_prob": False},
    "shared": {"shared_intermediate_size": 10, "num_experts_per_tok": 1, "norm_topk_prob": False},
    "narrow": {"moe_intermediate_size": 5},
    "biased": {"expert_bias_update_rate": 0.1},
    "capacity 1": {"capacity_factor": 1.0},
    "capacity 0.5": {"capacity_factor": 0.5, "num_experts_per_tok": 3},
    "capacity 4": {"capacity_factor": 4.0},
}


@pytest.mark.parametrize("case", CHANGES)
def test_output_and_gradients_equal_the_loop(case: str):
    model = config(**CHANGES[case])
    moe = layer(model)
    if moe.router.expert_bias is not None:
        moe.router.expert_bias.copy_(torch.linspace(-0.3, 0.3, EXPERTS))
    x, upstream = tokens(37), tokens(37, seed=2)
    mine = x.clone().requires_grad_()
    y, _ = moe(mine)
    y.backward(upstream)
    ours = [mine.grad, *(p.grad for p in moe.parameters())]
    moe.zero_grad()
    theirs = x.clone().requires_grad_()
    truth = moe_by_loop(moe, model, theirs, F.linear(theirs, moe.router.weight).softmax(-1))
    torch.testing.assert_close(y, truth, atol=1e-5, rtol=1e-5)
    truth.backward(upstream)
    for a, b in zip(ours, [theirs.grad, *(p.grad for p in moe.parameters())], strict=True):
        assert a is not None and b is not None
        assert (
            float((a - b).norm()) <= 1e-5 * float(b.norm()) + 1e-4
        )  # top1 renormalised: the router's is rounding alone


def test_ties_go_to_the_lowest_index():
    router = layer(config(num_experts_per_tok=3)).router
    torch.nn.init.zeros_(router.weight)
    routing = router(tokens(5))
    assert routing.index_TK.tolist() == [[0, 1, 2]] * 5
    router.weight.data[5] = router.weight.data[2] = 1.0  # two equal winners, then the lowest of the rest
    routing = router(tokens(9).abs())
    assert routing.index_TK.tolist() == [[2, 5, 0]] * 9
    assert routing.index_TK.dtype == torch.int32


@pytest.mark.parametrize("factor", [0.25, 0.5, 1.0, 1.3, 8.0])
@pytest.mark.parametrize("count", [1, 7, 64])
def test_capacity_drops_exactly_the_later_tokens(factor: float, count: int):
    model = config(capacity_factor=factor)
    moe, x = layer(model), tokens(count) + 0.7  # a common offset makes some experts popular
    routing = moe.router(x)
    weight, chosen, dropped = route_by_loop(model, routing.probs_TE)
    kept = torch.zeros(count, EXPERTS + 1).scatter(1, routing.index_TK.long(), 1.0)[:, :EXPERTS]
    assert torch.equal(kept, chosen)
    assert routing.dropped_T.sum() == dropped and (routing.weight_TK[routing.index_TK == EXPERTS] == 0).all()
    assert dropped > 0 or factor >= 1.3 or count == 1
    dense = torch.zeros(count, EXPERTS + 1).scatter_add(1, routing.index_TK.long(), routing.weight_TK)[:, :EXPERTS]
    torch.testing.assert_close(dense, weight)
    stats = stats_of(moe(x)[1])
    assert stats.dropped_NB.item() == dropped
    wanted = torch.zeros(count, EXPERTS).scatter(1, routing.chosen_TK.long(), 1.0).sum(0)
    assert torch.equal(stats.count_NBE[0, 0], wanted)  # the load is what the router asked for, drops included


def test_dropped_token_passes_nothing_and_gets_no_gradient():
    moe = layer(config(capacity_factor=0.5, num_experts_per_tok=1))
    x = tokens(1).expand(16, HIDDEN).clone().requires_grad_()  # all want one expert; room for one token
    y, routing = moe(x)
    assert routing.dropped_T.sum() == 15 and (y[1:] == 0).all() and (y[0] != 0).any()
    y.sum().backward()
    assert x.grad is not None and (x.grad[1:] == 0).all()


def test_jitter_moves_the_router_alone_and_in_training_alone():
    moe = layer(config(router_jitter_noise=0.3))
    plain = layer(config())
    x = tokens(200)
    moe.eval()
    truth, _ = plain(x)
    assert torch.equal(moe(x)[0], truth)
    moe.train()
    torch.manual_seed(7)
    noisy = moe.router(x)
    torch.manual_seed(7)
    factor = torch.empty(200, HIDDEN).uniform_(0.7, 1.3)
    torch.testing.assert_close(noisy.probs_TE, F.linear(x * factor, moe.router.weight).softmax(-1))
    torch.manual_seed(7)
    y, _ = moe(x)  # experts see x itself under the noisy routing
    torch.testing.assert_close(y, moe_by_loop(moe, config(), x, noisy.probs_TE), atol=1e-5, rtol=1e-5)
    assert not torch.equal(noisy.probs_TE, plain.router(x).probs_TE)


def test_bias_changes_the_choice_and_never_the_weights():
    moe = layer(config(expert_bias_update_rate=0.1, norm_topk_prob=False))
    bias = moe.router.expert_bias
    assert bias is not None and not bias.requires_grad and bias.dtype == torch.float32
    x = tokens(50)
    before = moe.router(x)
    bias[6] = 10.0
    after = moe.router(x)
    assert (after.index_TK[:, 0] == 6).all() and not (before.index_TK[:, 0] == 6).all()
    torch.testing.assert_close(after.probs_TE, before.probs_TE)
    torch.testing.assert_close(after.weight_TK, before.probs_TE.gather(1, after.index_TK.long()))
    assert layer(config()).router.expert_bias is None


def test_router_decides_in_fp32_under_bf16():
    """With weights and tokens in bf16 the probabilities are those of an fp32 product of the same numbers."""
    moe = layer(config(), dtype=torch.bfloat16)
    x = tokens(64).bfloat16()
    routing = moe.router(x)
    assert routing.probs_TE.dtype == routing.weight_TK.dtype == torch.float32
    wanted = (x.double() @ moe.router.weight.double().T).softmax(-1)
    torch.testing.assert_close(routing.probs_TE.double(), wanted, atol=1e-6, rtol=1e-5)
    assert moe(x)[0].dtype == torch.bfloat16


def test_expert_without_tokens_gets_zero_gradient_not_none():
    moe = layer(config(expert_bias_update_rate=0.1))
    assert moe.router.expert_bias is not None
    moe.router.expert_bias[3] = -10.0
    y, _ = moe(tokens(20))
    y.sum().backward()
    for p in moe.experts.parameters():
        assert p.grad is not None and (p.grad[3] == 0).all() and (p.grad[[0, 1, 2, 4, 5, 6, 7]] != 0).any()


def test_statistics_sum_tokens_per_sequence():
    moe, x = layer(config()), tokens(12)
    group = torch.tensor([0] * 5 + [1] * 5 + [-1, 2])  # the last two are of no sequence
    stats = stats_of(moe(x)[1], group, 2)
    for row, part in enumerate((slice(0, 5), slice(5, 10))):
        routing = moe.router(x[part])
        torch.testing.assert_close(stats.prob_NBE[0, row], routing.probs_TE.sum(0))
        counts = torch.bincount(routing.index_TK.flatten(), minlength=EXPERTS)
        assert stats.count_NBE[0, row].tolist() == counts.tolist() and stats.tokens_NB[0, row] == 5


@pytest.mark.parametrize("shared", [0, 12])
@pytest.mark.parametrize(("dp", "ep", "tp"), [(1, 2, 1), (1, 1, 2), (1, 2, 2), (2, 2, 1), (1, 4, 1)])
def test_layouts_equal_one_process(dp: int, ep: int, tp: int, shared: int):
    """Output, input gradient and weight gradients (summed over the ranks that share a weight) on real ranks."""

    def on_rank(rank: int) -> None:
        mesh = build_mesh(dp, ep, tp)
        model = config(shared_intermediate_size=shared)
        whole, part = layer(model), layer(model, mesh)
        world = dp * ep * tp
        x, upstream = tokens(8 * world), tokens(8 * world, seed=2)
        leaf = x.clone().requires_grad_()
        y, _ = whole(leaf)
        y.backward(upstream)
        here = mesh.world.cut(8 * world)
        mine = x[here].clone().requires_grad_()
        ours, routing = part(mine)
        ours.backward(upstream[here])
        torch.testing.assert_close(ours, y[here], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(mine.grad, leaf.grad[here], atol=1e-5, rtol=1e-5)
        assert stats_of(routing, tp=mesh.tp).tokens_NB.item() == 8 * tp  # complete over tp
        for p, q in zip(part.parameters(), whole.parameters(), strict=True):
            axis = mesh.dp if note_of(p).expert else mesh.data
            grad = p.grad.clone()
            if axis.size > 1:
                torch.distributed.all_reduce(grad, group=axis.group)
            torch.testing.assert_close(grad, q.grad[note_of(p).local_slices()], atol=1e-5, rtol=1e-5)

    run_on_ranks(on_rank, dp * ep * tp)


@pytest.mark.parametrize(("ep", "tp"), [(1, 2), (2, 2)])
def test_capacity_is_that_of_each_rank(ep: int, tp: int):
    """A rank drops what one process drops that has its tokens alone, and the rest is as there."""

    def on_rank(rank: int) -> None:
        model = config(capacity_factor=0.5)
        mesh = build_mesh(1, ep, tp)
        whole, part = layer(model), layer(model, mesh)
        leaves = [tokens(16, seed=rank).requires_grad_() for _ in range(2)]
        (y, routing), (truth, alone) = (moe(x) for moe, x in zip((part, whole), leaves, strict=True))
        (y * tokens(16, seed=9)).sum().backward()
        (truth * tokens(16, seed=9)).sum().backward()
        dropped, here = float(stats_of(routing, tp=mesh.tp).dropped_NB), float(alone.dropped_T.sum())
        assert here > 0 and (tp > 1) == (dropped > here)
        torch.testing.assert_close(y, truth, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(leaves[0].grad, leaves[1].grad, atol=1e-5, rtol=1e-5)

    run_on_ranks(on_rank, ep * tp)


class Gathered(TorchDispatchMode):
    """The number of elements of every all-gather's result."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name() == "c10d::_allgather_base_":
            self.sizes.append(args[0].numel())
        return func(*args, **(kwargs or {}))


def test_over_tp_alone_each_token_travels_once():
    """All 16 tokens, with the weights and the numbers of their three experts; no row per expert, no table of counts."""

    def on_rank(rank: int) -> None:
        moe = layer(config(num_experts_per_tok=3), build_mesh(1, 1, 2))
        with Gathered() as gathered:
            moe(tokens(8))
        assert sorted(gathered.sizes) == [16 * 3, 16 * 3, 16 * HIDDEN]

    run_on_ranks(on_rank, 2)


def test_shared_expert_and_order_of_rows_are_computed_while_rows_travel():
    """The rows and their weights have left, and have not been waited for."""

    def on_rank(rank: int) -> None:
        moe = layer(config(shared_intermediate_size=12), build_mesh(1, 2, 1))
        assert moe.shared is not None
        pending: list[PendingRows] = []
        make, order, seen = PendingRows.__init__, moe.experts.order, []

        def look(*_: object) -> None:
            seen.append([rows.under_way is not None for rows in pending])

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(PendingRows, "__init__", lambda rows, *args: (pending.append(rows), make(rows, *args))[1])
            patch.setattr(moe.experts, "order", lambda index_TK: (look(), order(index_TK))[1])
            moe.shared.register_forward_hook(look)
            moe(tokens(8))
        assert seen == [[True, True]] * 2

    run_on_ranks(on_rank, 2)
