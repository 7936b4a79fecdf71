"""What the ops promise beyond their values: errors, back-ends, dropped slots, recompute, and no need but torch."""

import contextlib
import itertools
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from moe_engine import ops


def test_ops_import_with_torch_alone() -> None:
    heavy = {"deepspeed", "transformers", "datasets", "pydantic", "matplotlib"}
    check = f"import sys, moe_engine.ops; print(sorted({heavy} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_use_names_the_backends_that_can_be_forced() -> None:
    with pytest.raises(ValueError, match=r"found backend 'cuda', expected one of \['reference', 'triton'\]"):
        ops.use("cuda")


@pytest.mark.skipif(not ops.compiled, reason="moe_engine._C was not built")
def test_use_reference_changes_the_kernel_inside_the_block_only() -> None:
    x = torch.randn(64, 2 * 333)
    gate, up = x.chunk(2, -1)
    plain = gate * torch.sigmoid(gate) * up
    with ops.use("reference"):
        assert torch.equal(ops.swiglu(x), plain)
    assert not torch.equal(ops.swiglu(x), plain)  # another exp: equal to 1e-7, not in every bit


def experts_of(w_gate_up: Tensor, dtype: torch.dtype = torch.int32) -> Tensor:
    """Two tokens of width 4 through 3 experts of width 2, given one of the matrices."""
    routing = [x.to(dtype) for x in ops.sort_by_expert(torch.zeros(2, 1).int(), 3)]
    return ops.experts(torch.zeros(2, 4), torch.ones(2, 1), w_gate_up, torch.zeros(3, 4, 2), *routing)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.router_topk(torch.zeros(2, 4), 5, True), "found k = 5, expected 1 to 4"),
        (lambda: ops.router_topk(torch.zeros(2, 4).bfloat16(), 2, True), "bfloat16"),
        (lambda: ops.sort_by_expert(torch.zeros(2, 4), 4), "expected .T, K. int32"),
        (
            lambda: ops.permute(torch.zeros(2, 4), torch.zeros(3).int(), torch.zeros(2, 2).int()),
            "assignment_of_row .3,",
        ),
        (lambda: ops.unpermute(torch.zeros(3, 4), torch.zeros(4).int(), torch.zeros(2, 2).int()), "expected 4 rows"),
        (lambda: ops.permute(torch.zeros(2, 4), torch.zeros(4).long(), torch.zeros(2, 2).int()), "expected int32"),
        (lambda: experts_of(torch.zeros(3, 4, 4), torch.int64), "as sort_by_expert gives them"),
        (lambda: ops.router_logits(torch.zeros(2, 4), torch.zeros(3, 5)), "expected .T, D. and .E, D."),
        (lambda: experts_of(torch.zeros(3, 2, 5)), "expected .T, D., .E, 2F, D."),
        (lambda: experts_of(torch.zeros(3, 4, 4).bfloat16()), "expected one dtype"),
        (lambda: experts_of(torch.zeros(2, 4, 4)), "expected .T, D., .E, 2F, D."),
        (lambda: ops.grouped_mm(torch.zeros(2, 4), torch.zeros(1, 3, 5), torch.ones(1).int()), "expected .R, K."),
        (lambda: ops.grouped_mm(torch.zeros(2, 4), torch.zeros(1, 3, 4), torch.ones(2).int()), "one per expert"),
        (lambda: ops.swiglu(torch.zeros(2, 3)), "expected .R, 2F."),
        (lambda: ops.cross_entropy_stats(torch.zeros(2, 3), torch.zeros(3).long(), 0), "expected .T, V."),
    ],
)
def test_a_caller_is_told_what_was_found_and_expected(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.skipif(not ops.compiled, reason="moe_engine._C was not built")
def test_kernels_refuse_experts_and_counts_out_of_range() -> None:
    with pytest.raises(ValueError, match="found expert 5, expected 0 to 4"):
        ops.sort_by_expert(torch.tensor([[5]], dtype=torch.int32), 4)
    with pytest.raises(ValueError, match="sum to 3, expected at most 2"):
        ops.grouped_mm(torch.zeros(2, 4), torch.zeros(1, 3, 4), torch.tensor([3], dtype=torch.int32))


@pytest.mark.skipif(not ops.compiled, reason="moe_engine._C was not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_do_not_depend_on_the_number_of_threads(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    index = torch.randint(6, (150, 2)).masked_fill(torch.rand(150, 2) < 0.5, 4).int()
    counts, *orders = ops.sort_by_expert(index, 6)
    shapes = [(150, 128), (6, 640, 128), (6, 128, 320)]
    x, gate_up, down = (torch.randn(shape).to(dtype).requires_grad_() for shape in shapes)
    weight = torch.rand(150, 2).requires_grad_()
    before, results = torch.get_num_threads(), []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        rows = ops.grouped_mm(ops.permute(x, *orders), gate_up, counts)
        y = ops.experts(x, weight, gate_up, down, counts, *orders)
        loss = y.float().square().sum() + rows.float().square().sum()
        results.append([y.detach(), rows.detach(), *torch.autograd.grad(loss, (x, weight, gate_up, down))])
    torch.set_num_threads(before)
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_ties_choose_the_lowest_index_in_order() -> None:
    index = ops.router_topk(torch.zeros(3, 8), 4, True)[1]
    assert index.tolist() == [[0, 1, 2, 3]] * 3


def moe_layer(k: int, drop: Tensor, x_TD: Tensor, logits_TE: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """A whole MoE feed-forward of ops; slots where `drop` is true are dropped."""
    weight, index, _, _ = ops.router_topk(logits_TE, k, True)
    index, weight = index.masked_fill(drop, gate_up.shape[0]), weight.masked_fill(drop, 0)
    return ops.experts(x_TD, weight, gate_up, down, *ops.sort_by_expert(index, gate_up.shape[0]))


def dense_layer(k: int, drop: Tensor, x_TD: Tensor, logits_TE: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """The same, every expert on every token."""
    probs = torch.softmax(logits_TE, -1)
    weight, index = probs.topk(k)
    weight = (weight / weight.sum(-1, keepdim=True)) * ~drop
    y_TD = torch.zeros_like(x_TD)
    for e, (w_in, w_out) in enumerate(zip(gate_up.unbind(), down.unbind(), strict=True)):
        gate, up = (x_TD @ w_in.T).chunk(2, -1)
        y_TD = y_TD + (weight * (index == e)).sum(-1, keepdim=True) * ((torch.nn.functional.silu(gate) * up) @ w_out.T)
    return y_TD


@pytest.mark.parametrize("experts", [2, 8, 40])
def test_the_layer_equals_every_expert_on_every_token(experts: int) -> None:
    torch.manual_seed(experts)
    tokens, width, ffn, k = 30, 24, 20, 2
    shapes = [(tokens, width), (tokens, experts), (experts, 2 * ffn, width), (experts, width, ffn)]
    leaves = [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes]
    drop, seed = torch.rand(tokens, k) < 0.2, torch.randn(tokens, width, dtype=torch.float64)
    found, truth = (layer(k, drop, *leaves) for layer in (moe_layer, dense_layer))
    torch.testing.assert_close(found, truth)
    for one, other in zip(
        torch.autograd.grad(found, leaves, seed), torch.autograd.grad(truth, leaves, seed), strict=True
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("backend", ["reference", "dispatcher"])
@pytest.mark.parametrize("keep_h", [True, False])
@pytest.mark.parametrize("needed", [needed for n in range(1, 5) for needed in itertools.combinations(range(4), n)])
def test_frozen_inputs_get_no_gradient_and_change_none(needed: tuple[int, ...], keep_h: bool, backend: str) -> None:
    """Any of x, the weights and the two matrices may be frozen: the gradients of the others stay what they are."""
    torch.manual_seed(0)
    index = torch.randint(5, (9, 2), dtype=torch.int32)  # 4 is dropped
    shapes = [(9, 8), (9, 2), (4, 12, 8), (4, 8, 6)]
    values = [torch.randn(shape) for shape in shapes]
    values[1] = values[1].masked_fill(index == 4, 0)
    grads = []
    with ops.use("reference") if backend == "reference" else contextlib.nullcontext():
        for wanted in (range(4), needed):
            leaves = [value.clone().requires_grad_(i in wanted) for i, value in enumerate(values)]
            ops.experts(*leaves, *ops.sort_by_expert(index, 4), keep_h).sum().backward()
            grads.append([leaf.grad for leaf in leaves])
    for i, (all_needed, some_needed) in enumerate(zip(*grads, strict=True)):
        assert (some_needed is None) == (i not in needed)
        assert some_needed is None or torch.equal(some_needed, all_needed)


def test_a_frozen_router_and_frozen_tokens_get_no_gradient() -> None:
    for need_x, need_w in ((True, False), (False, True)):
        x, w = torch.randn(5, 8, requires_grad=need_x), torch.randn(3, 8, requires_grad=need_w)
        ops.router_logits(x, w).sum().backward()
        assert (x.grad is not None, w.grad is not None) == (need_x, need_w)


def test_selective_recompute_can_save_the_routing() -> None:
    routed = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            routed.append(func is torch.ops.moe_engine.router_topk.default)
            return func(*args, **(kwargs or {}))

    def policy(ctx, func, *args, **kwargs) -> CheckpointPolicy:
        saved = func is torch.ops.moe_engine.router_topk.default
        return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE

    torch.manual_seed(0)
    leaves = [torch.randn(shape).requires_grad_() for shape in [(9, 8), (9, 4), (4, 12, 8), (4, 8, 6)]]
    drop = torch.zeros(9, 2, dtype=torch.bool)
    expected = torch.autograd.grad(moe_layer(2, drop, *leaves).sum(), leaves)
    with Count():
        y = checkpoint(
            moe_layer,
            2,
            drop,
            *leaves,
            use_reentrant=False,
            context_fn=lambda: create_selective_checkpoint_contexts(policy),
        )
        found = torch.autograd.grad(y.sum(), leaves)
    assert sum(routed) == 1  # once in the forward pass, not again in the recompute
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
