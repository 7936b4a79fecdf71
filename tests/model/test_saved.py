"""What a MoE layer keeps for backward: d + 2kf elements a token, the routing, and nothing else."""

import pytest
import torch
from torch import Tensor

from moe_engine.config import Model
from moe_engine.model.moe import MoE
from moe_engine.parallel.mesh import Mesh
from moe_engine.parallel.weight import initialise

TOKENS, D, F = 96, 64, 40


def saved_bytes(layer: MoE, x_TD: Tensor) -> int:
    """Bytes of the storages that autograd keeps for backward, each once, without the parameters."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y_TD, stats = layer(x_TD, torch.ones(1, TOKENS))
    parameters = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    assert y_TD.requires_grad and stats.requires_grad
    return sum(size for pointer, size in kept.items() if pointer not in parameters)


@pytest.mark.parametrize("keep_h", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("experts", "k"), [(4, 2), (16, 8), (3, 1)])
def test_a_token_keeps_d_plus_2kf_elements(experts: int, k: int, dtype: torch.dtype, keep_h: bool) -> None:
    config = Model(
        vocab_size=8, hidden_size=D, intermediate_size=F, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, num_local_experts=experts, num_experts_per_tok=k, moe_intermediate_size=F,
    )  # fmt: skip
    layer = MoE(config, Mesh(), keep_h).to(dtype)
    initialise(layer, 0)
    x_TD = torch.randn(TOKENS, D).to(dtype).requires_grad_()
    activations = D + (2 * k * F if keep_h else 0)
    routing = 4 * (experts + 1 + 4 * k)  # probabilities, log-sum-exp; weights, experts, and the two orders of rows
    member_and_counts = 4 * (TOKENS + experts)
    assert saved_bytes(layer, x_TD) == TOKENS * (activations * dtype.itemsize + routing) + member_and_counts
