"""Who is measured: the engine's layer, and its peers, each on the same tokens and the same weights.

A contender is a forward, a backward and the leaves that it differentiates. A peer that keeps its weights in another
layout gets a copy in that layout, and its gradients are brought back to ours for the comparison, outside the measured
time. Every layer routes by itself: logits, softmax, top-k, weights that sum to 1. How peers are called follows their
public interfaces: transformers 5, liger-kernel 0.8.5, sonic-moe 0.1.2, megablocks 0.10, ScatterMoE at 47b5e15.
"""

import importlib.metadata
import importlib.util
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_engine.ops import experts, router_logits, router_topk, sort_by_expert
from tools.kernels.inputs import Inputs

LARGEST_COPY = 2**28
"""Bytes of matrices that transformers' batched_mm may copy, one set for each row."""


class Contender(NamedTuple):
    """forward() -> y; backward(y) -> the gradients of `leaves`, of which the first is an activation and the others are
    parameters; in_our_layout(gradients) -> the same in the engine's layout. backward is None if nothing is
    differentiable."""

    name: str
    forward: Callable[[], Tensor]
    leaves: tuple[Tensor, ...] = ()
    backward: Callable[[Tensor], tuple[Tensor, ...]] | None = None
    in_our_layout: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]] = tuple


class Peer(NamedTuple):
    """`module` tells whether it is installed; `builders` has an entry for each of its implementations."""

    name: str
    module: str
    install: str
    builders: dict[str, Callable[[Inputs], Contender]]

    @property
    def installed(self) -> bool:
        return importlib.util.find_spec(self.module) is not None


def differentiable(
    name: str,
    forward: Callable[[], Tensor],
    leaves: tuple[Tensor, ...],
    dy: Tensor,
    in_our_layout: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]] = tuple,
) -> Contender:
    """A contender whose backward is autograd's."""
    return Contender(name, forward, leaves, lambda y: torch.autograd.grad(y, leaves, dy), in_our_layout)


def our_layer(inputs: Inputs) -> Contender:
    """The single-rank layer of moe_engine.model.moe."""
    x, router, gate_up, down = inputs.leaves

    def forward() -> Tensor:
        weight_TK, index_TK, *_ = router_topk(router_logits(x, router), inputs.top_k, True)
        return experts(x, weight_TK, gate_up, down, *sort_by_expert(index_TK, len(router)))

    return differentiable("moe_engine", forward, inputs.leaves, inputs.dy)


def torch_router(x: Tensor, router: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """weight_TK fp32 that sum to 1, and index_TK int64, for the peers that bring no router."""
    weight_TK, index_TK = F.linear(x, router).float().softmax(-1).topk(top_k)
    return weight_TK / weight_TK.sum(-1, keepdim=True), index_TK


def torch_experts(x: Tensor, weight_TK: Tensor, index_TK: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Experts by torch.nn.functional.grouped_mm, without a wait for the device."""
    expert_R, assignment_R = index_TK.flatten().sort(stable=True)
    ends_E = torch.searchsorted(expert_R, torch.arange(len(down), device=x.device), right=True).int()
    rows_RD = x.index_select(0, assignment_R // index_TK.shape[1])
    gate_RF, up_RF = F.grouped_mm(rows_RD, gate_up.mT, offs=ends_E).chunk(2, -1)
    rows_RD = F.grouped_mm(F.silu(gate_RF) * up_RF, down.mT, offs=ends_E)
    rows_TKD = rows_RD.index_select(0, assignment_R.argsort()).view(*index_TK.shape, -1)
    return torch.bmm(weight_TK.to(x.dtype)[:, None], rows_TKD)[:, 0]


def torch_layer(inputs: Inputs) -> Contender:
    x, router, gate_up, down = inputs.leaves

    def forward() -> Tensor:
        return torch_experts(x, *torch_router(x, router, inputs.top_k), gate_up, down)

    return differentiable("torch grouped_mm", forward, inputs.leaves, inputs.dy)


def transformers_layer(inputs: Inputs, implementation: str) -> Contender:
    """Mixtral's block of router and experts."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    x, router, gate_up, down = inputs.leaves
    copied = inputs.counts.sum().item() * (gate_up[0].numel() + down[0].numel()) * x.element_size()
    if implementation == "eager" and len(down) > 16:
        raise ValueError(f"a loop over {len(down)} experts is never the fastest")
    if implementation == "batched_mm" and copied > LARGEST_COPY:
        raise ValueError(f"it would copy {copied / 2**20:.0f} MiB of matrices")
    config = MixtralConfig(
        hidden_size=x.shape[1], intermediate_size=down.shape[2], num_local_experts=len(down),
        num_experts_per_tok=inputs.top_k,
        experts_implementation=implementation,  # pyright: ignore[reportCallIssue]
    )  # fmt: skip
    with torch.device("meta"):
        block = MixtralSparseMoeBlock(config)
    block.gate.weight, block.experts.gate_up_proj, block.experts.down_proj = router, gate_up, down
    return differentiable(f"transformers {implementation}", lambda: block(x[None])[0], inputs.leaves, inputs.dy)


def liger_layer(inputs: Inputs) -> Contender:
    from liger_kernel.ops import LigerFusedMoEFunction  # pyright: ignore[reportMissingImports]

    x, router, gate_up, down = inputs.leaves

    def forward() -> Tensor:
        weight_TK, index_TK = torch_router(x, router, inputs.top_k)
        return LigerFusedMoEFunction.apply(x, gate_up, down, index_TK.int(), weight_TK.to(x.dtype))

    return differentiable("Liger", forward, inputs.leaves, inputs.dy)


def scattermoe_layer(inputs: Inputs) -> Contender:
    """Its gate is the second half of the columns."""
    from scattermoe.mlp import GLUMLP  # pyright: ignore[reportMissingImports]

    x, router, gate_up, down = inputs.leaves
    with torch.device("meta"):
        mlp = GLUMLP(x.shape[1], down.shape[2], len(down), inputs.top_k)
    mlp.experts.weight, mlp.output_experts.weight = torch.nn.Parameter(swap_halves(gate_up.detach())), down
    leaves = x, router, mlp.experts.weight, down

    def forward() -> Tensor:
        weight_TK, index_TK = torch_router(x, router, inputs.top_k)
        return mlp(x, weight_TK.to(x.dtype), index_TK)

    return differentiable("ScatterMoE", forward, leaves, inputs.dy, lambda g: (g[0], g[1], swap_halves(g[2]), g[3]))


def swap_halves(w_E2FD: Tensor) -> Tensor:
    return torch.cat(w_E2FD.chunk(2, 1)[::-1], 1)


def sonicmoe_layer(inputs: Inputs) -> Contender:
    """Its own router and its own layout: rows of gate and up in turn."""
    from sonicmoe import moe_TC_softmax_topk_layer  # pyright: ignore[reportMissingImports]
    from sonicmoe.enums import ActivationType  # pyright: ignore[reportMissingImports]

    x, router, gate_up, down = inputs.leaves
    experts, rows, hidden = gate_up.shape
    in_turn = gate_up.detach().view(experts, 2, rows // 2, hidden).transpose(1, 2).reshape(gate_up.shape)
    leaves = x, router, in_turn.requires_grad_(), down
    stream = torch.cuda.current_stream().cuda_stream

    def forward() -> Tensor:
        return moe_TC_softmax_topk_layer(
            x, router, in_turn.permute(1, 2, 0), None, down.permute(1, 2, 0), None, inputs.top_k, stream,
            ActivationType.SWIGLU,
        )[0]  # fmt: skip

    def in_our_layout(g: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return g[0], g[1], g[2].view(experts, rows // 2, 2, hidden).transpose(1, 2).reshape(gate_up.shape), g[3]

    return differentiable("SonicMoE", forward, leaves, inputs.dy, in_our_layout)


def megablocks_layer(inputs: Inputs) -> Contender:
    """Its own router; gate, up and the transposed down projection are matrices [E * F, D]."""
    from megablocks.layers.arguments import Arguments  # pyright: ignore[reportMissingImports]
    from megablocks.layers.dmoe import dMoE  # pyright: ignore[reportMissingImports]

    x, router, gate_up, down = inputs.leaves
    experts, hidden, ffn = down.shape
    layer = dMoE(
        Arguments(
            hidden_size=hidden, ffn_hidden_size=ffn, moe_num_experts=experts, moe_top_k=inputs.top_k,
            moe_normalize_expert_weights=1, moe_loss_weight=0, bias=False, return_bias=False, activation_fn=F.silu,
            mlp_type="glu", mlp_impl="grouped", fp16=False, bf16=x.dtype == torch.bfloat16, device=x.device,
        )
    )  # fmt: skip
    mlp, gate_up_EFD = layer.experts.mlp, gate_up.detach().chunk(2, 1)
    leaves = x, layer.router.layer.weight, mlp.w1, mlp.v1, mlp.w2
    with torch.no_grad():
        for parameter, ours in zip(leaves[1:], (router, *gate_up_EFD, down.mT)):
            parameter.copy_(ours.reshape(parameter.shape))

    def in_our_layout(g: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        gate, up, down_FD = (tensor.view(experts, ffn, hidden) for tensor in g[2:])
        return g[0], g[1], torch.cat([gate, up], 1), down_FD.mT

    return differentiable("MegaBlocks", lambda: layer(x), leaves, inputs.dy, in_our_layout)


TRANSFORMERS = ("grouped_mm", "eager", "batched_mm")
PEERS = (
    Peer("torch", "torch", "pip install torch", {"torch grouped_mm": torch_layer}),
    Peer(
        "transformers",
        "transformers",
        "pip install transformers",
        {f"transformers {name}": partial(transformers_layer, implementation=name) for name in TRANSFORMERS},
    ),
    Peer(
        "megablocks",
        "megablocks",
        "pip install --no-deps --no-build-isolation megablocks stanford-stk grouped_gemm",
        {"MegaBlocks": megablocks_layer},
    ),
    Peer(
        "scattermoe",
        "scattermoe",
        "pip install git+https://github.com/shawntan/scattermoe",
        {"ScatterMoE": scattermoe_layer},
    ),
    Peer("liger", "liger_kernel", "pip install liger-kernel", {"Liger": liger_layer}),
    Peer(
        "sonicmoe",
        "sonicmoe",
        "pip install --no-deps sonic-moe && pip install quack-kernels",
        {"SonicMoE": sonicmoe_layer},
    ),
)


def versions() -> dict[str, str]:
    """Of every peer that is installed, as its package says."""
    packages = importlib.metadata.packages_distributions()
    return {
        peer.name: importlib.metadata.version(packages[peer.module][0])
        for peer in PEERS
        if peer.installed and peer.module in packages
    }
