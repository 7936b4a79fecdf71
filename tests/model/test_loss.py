"""The cut cross-entropy against torch's own, on one and on several tp ranks."""

import pytest
import torch
import torch.nn.functional as F

from moe_engine.labels import IGNORE
from moe_engine.model.loss import vocab_cross_entropy
from moe_engine.parallel.local_ranks import run_on_ranks
from moe_engine.parallel.mesh import Axis, build_mesh


def case(name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """logits[T, V], labels with holes, and an upstream gradient per token."""
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(13, 24, generator=draw) * 4
    labels = torch.randint(24, (13,), generator=draw)
    labels[[0, 5, 12]] = IGNORE
    if name == "large":  # overflows without the maximum; the maximum lies in another shard than the label
        logits[1, 3], logits[2, 20] = 3e4, -3e4
        labels[1], labels[2] = 23, 20
    if name == "nothing counted":
        labels[:] = IGNORE
    return logits, labels, torch.rand(13, generator=draw) + 0.1


def check(tp: Axis, name: str, dtype: torch.dtype) -> None:
    logits, labels, upstream = case(name)
    truth = logits.to(dtype).float().clone().requires_grad_()
    wanted = F.cross_entropy(truth, labels, ignore_index=IGNORE, reduction="none")
    wanted.backward(upstream)
    mine = logits.to(dtype)[:, tp.cut(24)].clone().requires_grad_()
    loss = vocab_cross_entropy(mine, labels, tp)
    assert loss.dtype == torch.float32 and (loss[labels == IGNORE] == 0).all()
    torch.testing.assert_close(loss, wanted.detach(), atol=2e-6, rtol=2e-6)
    loss.backward(upstream)
    assert mine.grad is not None and truth.grad is not None and mine.grad.dtype == dtype
    assert (mine.grad[labels == IGNORE] == 0).all()
    tolerance = 1e-6 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(mine.grad.float(), truth.grad[:, tp.cut(24)], atol=tolerance, rtol=tolerance)


CASES = [(name, dtype) for name in ("usual", "large", "nothing counted") for dtype in (torch.float32, torch.bfloat16)]


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_equals_torch(tp: int):
    def on_rank(rank: int) -> None:
        axis = build_mesh(1, 1, tp).tp
        for name, dtype in CASES:
            check(axis, name, dtype)

    run_on_ranks(on_rank, tp)


def test_no_rank_is_needed_for_one():
    for name, dtype in CASES:
        check(Axis("tp"), name, dtype)
