"""The ops one by one, each against the same thing said in plain torch.

The work of an op is what bounds it: FLOPs of its matrix products, or the least bytes that it has to read and write.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_engine.model.loss import vocab_cross_entropy
from moe_engine.ops import experts, grouped_mm, permute, router_logits, router_topk, sort_by_expert, swiglu, unpermute
from moe_engine.parallel.mesh import Mesh
from tools.kernels.contenders import Contender, differentiable, torch_experts
from tools.kernels.inputs import Inputs
from tools.kernels.shapes import Shape, layer_flops


class Work(NamedTuple):
    """`unit` is "flops" or "bytes"; what forward, and forward and backward together, have to do at least."""

    unit: str
    amount: dict[str, float]


class Op(NamedTuple):
    work: Work
    contenders: tuple[Contender, Contender]


def bytes_of(forward: float, backward: float) -> Work:
    return Work("bytes", {"forward": forward, "forward+backward": forward + backward})


def noise(*size: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Fixed random numbers on the device, and by default in the dtype, of `like`."""
    generator = torch.Generator(like.device).manual_seed(1)
    return torch.randn(*size, generator=generator, device=like.device).to(dtype or like.dtype)


def pair(ours: Callable[[], Tensor], torchs: Callable[[], Tensor], leaves: tuple[Tensor, ...], dy: Tensor):
    return differentiable("moe_engine", ours, leaves, dy), differentiable("torch", torchs, leaves, dy)


def logits_op(i: Inputs, shape: Shape) -> Op:
    (tokens, hidden), width = i.x.shape, i.x.element_size()
    once = (tokens + shape.experts) * hidden * width
    small = 4 * tokens * shape.experts
    dy = noise(tokens, shape.experts, like=i.x, dtype=torch.float32)
    ours, torchs = lambda: router_logits(i.x, i.router), lambda: F.linear(i.x.float(), i.router.float())
    return Op(bytes_of(once + small, 2 * once + small), pair(ours, torchs, (i.x, i.router), dy))


def topk_op(i: Inputs, shape: Shape) -> Op:
    logits = router_logits(i.x, i.router).detach().requires_grad_()
    dy = noise(len(logits), shape.top_k, like=logits)

    def torchs() -> Tensor:
        weight = logits.softmax(-1).topk(shape.top_k).values
        return weight / weight.sum(-1, keepdim=True)

    table, chosen = 4 * logits.numel(), 8 * dy.numel()
    work = bytes_of(2 * table + chosen, 2 * table + chosen)
    return Op(work, pair(lambda: router_topk(logits, shape.top_k, True)[0], torchs, (logits,), dy))


def index_of(i: Inputs) -> Tensor:
    return router_topk(router_logits(i.x, i.router), i.top_k, True)[1].detach()


def sort_op(i: Inputs, shape: Shape) -> Op:
    """Counts, the assignment of each row and the row of each assignment; compared are the rows."""
    index = index_of(i)

    def torchs() -> Tensor:
        order = index.flatten().argsort(stable=True)
        index.flatten().bincount(minlength=shape.experts)
        return order.argsort()

    ours = Contender("moe_engine", lambda: sort_by_expert(index, shape.experts)[2].flatten())
    return Op(bytes_of(12 * index.numel(), 0), (ours, Contender("torch", torchs)))


def permute_op(i: Inputs, shape: Shape) -> Op:
    _, assignment_of_row, row_of = sort_by_expert(index_of(i), shape.experts)
    token_of_row = assignment_of_row // shape.top_k
    dy = noise(len(token_of_row), shape.hidden, like=i.x)
    moved = (i.x.numel() + dy.numel()) * i.x.element_size()
    ours, torchs = lambda: permute(i.x, assignment_of_row, row_of), lambda: i.x.index_select(0, token_of_row)
    return Op(bytes_of(moved, moved), pair(ours, torchs, (i.x,), dy))


def unpermute_op(i: Inputs, shape: Shape) -> Op:
    _, assignment_of_row, row_of = sort_by_expert(index_of(i), shape.experts)
    rows = noise(len(assignment_of_row), shape.hidden, like=i.x).requires_grad_()
    moved = (i.x.numel() + rows.numel()) * i.x.element_size()

    def torchs() -> Tensor:
        return rows.index_select(0, row_of.flatten()).view(*row_of.shape, -1).sum(1)

    ours = pair(lambda: unpermute(rows, assignment_of_row, row_of), torchs, (rows,), i.dy)
    return Op(bytes_of(moved, moved), ours)


def grouped_mm_op(i: Inputs, shape: Shape) -> Op:
    """The product of rows and gate_up, two thirds of a layer's FLOPs."""
    counts = sort_by_expert(index_of(i), shape.experts)[0]
    ends = counts.cumsum(0).int()
    rows = noise(len(i.x) * shape.top_k, shape.hidden, like=i.x).requires_grad_()
    dy = noise(len(rows), 2 * shape.ffn, like=i.x)
    amount = {name: flops * 2 / 3 for name, flops in layer_flops(shape, len(i.x)).items()}
    ours = lambda: grouped_mm(rows, i.gate_up, counts)  # noqa: E731
    torchs = lambda: F.grouped_mm(rows, i.gate_up.mT, offs=ends)  # noqa: E731
    return Op(Work("flops", amount), pair(ours, torchs, (rows, i.gate_up), dy))


def swiglu_op(i: Inputs, shape: Shape) -> Op:
    gate_up = noise(len(i.x) * shape.top_k, 2 * shape.ffn, like=i.x).requires_grad_()
    dy = noise(len(gate_up), shape.ffn, like=i.x)
    part = dy.numel() * dy.element_size()

    def torchs() -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate) * up

    return Op(bytes_of(3 * part, 5 * part), pair(lambda: swiglu(gate_up), torchs, (gate_up,), dy))


def experts_op(i: Inputs, shape: Shape) -> Op:
    """The layer without its router; sorting is part of it for both."""
    weight, index, *_ = router_topk(router_logits(i.x, i.router), shape.top_k, True)
    weight, index = weight.detach().requires_grad_(), index.detach()
    leaves = i.x, weight, i.gate_up, i.down

    def ours() -> Tensor:
        return experts(i.x, weight, i.gate_up, i.down, *sort_by_expert(index, shape.experts))

    both = pair(ours, lambda: torch_experts(i.x, weight, index, i.gate_up, i.down), leaves, i.dy)
    return Op(Work("flops", layer_flops(shape, len(i.x))), both)


def cross_entropy_op(i: Inputs, shape: Shape) -> Op:
    """Both ops of the folder, as moe_engine.model.loss joins them on one rank."""
    logits = noise(len(i.x), shape.vocab, like=i.x).requires_grad_()
    label = torch.arange(len(i.x), device=i.x.device) % shape.vocab
    once, tp = logits.numel() * logits.element_size(), Mesh().tp
    both = pair(
        lambda: vocab_cross_entropy(logits, label, tp),
        lambda: F.cross_entropy(logits.float(), label, reduction="none"),
        (logits,),
        noise(len(i.x), like=i.x, dtype=torch.float32),
    )
    return Op(bytes_of(once, 2 * once), both)


OPS: dict[str, Callable[[Inputs, Shape], Op]] = {
    "router_logits": logits_op,
    "router_topk": topk_op,
    "sort_by_expert": sort_op,
    "permute": permute_op,
    "unpermute": unpermute_op,
    "grouped_mm": grouped_mm_op,
    "swiglu": swiglu_op,
    "experts": experts_op,
    "cross_entropy": cross_entropy_op,
}
