"""What a MoE layer keeps for backward: d + 2kf elements a token, the routing, and nothing else."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moe_engine.config import Model
from moe_engine.model.moe import MoE
from moe_engine.model.router import router_stats
from moe_engine.parallel.mesh import Axis, Mesh
from moe_engine.parallel.weight import initialise

TOKENS, D, F = 96, 64, 40


def saved_bytes(layer: MoE, x_TD: Tensor) -> int:
    """Bytes of the storages that autograd keeps for backward and of the routing, each once, without the parameters."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y_TD, routing = layer(x_TD)
        (stats,) = router_stats([[routing]], torch.zeros(TOKENS, dtype=torch.int64), 1, Axis("tp"))
    for tensor in routing:
        pack(tensor)
    parameters = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    assert y_TD.requires_grad and stats.prob_NBE.requires_grad
    return sum(size for pointer, size in kept.items() if pointer not in parameters)


class Hidden(TorchDispatchMode):
    """The shapes of h that the experts op returns."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.name() == "moe_engine::experts":
            self.shapes.append(tuple(out[1].shape))
        return out


def layer_of(experts: int, k: int, keep_h: bool) -> MoE:
    config = Model(
        vocab_size=8, hidden_size=D, intermediate_size=F, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, num_local_experts=experts, num_experts_per_tok=k, moe_intermediate_size=F,
    )  # fmt: skip
    layer = MoE(config, Mesh(), keep_h)
    initialise(layer, 0)
    return layer


@pytest.mark.parametrize("keep_h", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("experts", "k"), [(4, 2), (16, 8), (3, 1)])
def test_a_token_keeps_d_plus_2kf_elements(experts: int, k: int, dtype: torch.dtype, keep_h: bool) -> None:
    layer = layer_of(experts, k, keep_h).to(dtype)
    x_TD = torch.randn(TOKENS, D).to(dtype).requires_grad_()
    activations = D + (2 * k * F if keep_h else 0)
    routing = 4 * (2 * experts + 2 + 4 * k)  # logits, probabilities, log-sum-exp, drops; weights, experts, two orders
    member_and_counts = 4 * (TOKENS + experts)
    assert saved_bytes(layer, x_TD) == TOKENS * (activations * dtype.itemsize + routing) + member_and_counts


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("keep_h", [True, False])
def test_h_is_written_only_where_a_backward_may_read_it(keep_h: bool, grad: bool) -> None:
    layer = layer_of(4, 2, keep_h)
    with torch.set_grad_enabled(grad), Hidden() as h:
        layer(torch.randn(TOKENS, D))
    assert h.shapes == [(TOKENS * 2 if keep_h and grad else 0, 2 * F)]
