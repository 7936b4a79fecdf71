"""A small dense Llama with every awkward trait, and what becomes of it: for the tests of upcycling."""

from typing import Any

import torch
from torch import Tensor

from moe_engine.config import Model, RopeScaling
from moe_engine.model.transformer import Transformer
from moe_engine.parallel.mesh import Mesh
from moe_engine.parallel.weight import initialise
from moe_engine.upcycle.layer import Dense, Routed
from moe_engine.upcycle.methods import METHODS
from moe_engine.upcycle.options import Options
from moe_engine.upcycle.routers import drawn
from moe_engine.upcycle.transplant import dense_layer, routed_weights, transplant

ROPE = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
DENSE = Model(
    vocab_size=99, hidden_size=48, intermediate_size=40, num_hidden_layers=3, num_attention_heads=6,
    num_key_value_heads=2, head_dim=10, rope_scaling=ROPE, tie_word_embeddings=True, initializer_range=0.05,
)  # fmt: skip


def dense_model(config: Model = DENSE, seed: int = 0) -> Transformer:
    model = Transformer(config, Mesh())
    initialise(model, seed)
    return model


def tokens(sequences: int = 4, length: int = 33, vocab_size: int = DENSE.vocab_size) -> Tensor:
    return torch.randint(vocab_size, (sequences, length), generator=torch.Generator().manual_seed(1))


def upcycle(
    parent: Transformer, method: str, options: Options, router: Any = "normal", scores: Tensor | None = None
) -> Transformer:
    """The child; router: a kind of `drawn`, or a function of the layer."""
    module = METHODS[method]
    child = Transformer(module.child(parent.config, options), Mesh())
    parts: dict[str, Tensor] = {}
    for layer in range(parent.config.num_hidden_layers):
        if child.config.is_moe(layer):
            rows = (
                drawn(router, options.experts, parent.config.hidden_size, layer, 0)
                if isinstance(router, str)
                else router(layer)
            )
            extra = [] if scores is None else [scores]
            parts |= routed_weights(layer, module.build(layer, dense_layer(parent, layer), options, *extra), rows)
    transplant(parent, child, parts)
    return child


def random_dense(neurons: int = 40, hidden: int = 48, dtype: torch.dtype = torch.float32, seed: int = 0) -> Dense:
    draw = torch.Generator().manual_seed(seed)
    shapes = (neurons, hidden), (neurons, hidden), (hidden, neurons)
    return Dense(*(torch.randn(shape, generator=draw).to(dtype) for shape in shapes))


def scores(experts: int, neurons: int = 40, seed: int = 3) -> Tensor:
    return torch.rand(experts, neurons, generator=torch.Generator().manual_seed(seed))


def swiglu_ffn(x: Tensor, dense: Dense) -> Tensor:
    """y = down (silu(gate x) * up x), in fp64."""
    gate, up, down = (w.double() for w in dense)
    return (torch.nn.functional.silu(x.double() @ gate.T) * (x.double() @ up.T)) @ down.T


def expert(routed: Routed, e: int) -> Dense:
    return Dense(routed.w_gate_up[e, 0], routed.w_gate_up[e, 1], routed.w_down[e])


def experts_sum(x: Tensor, routed: Routed) -> Tensor:
    return sum((swiglu_ffn(x, expert(routed, e)) for e in range(len(routed.w_down))), torch.zeros(()))


def neurons_of(routed: Routed, dense: Dense) -> list[list[int]]:
    """Which neurons of the dense layer each expert holds, found by their gate rows; up and down must agree."""
    found = []
    for e in range(len(routed.w_down)):
        gate, up, down = expert(routed, e)
        rows = [int((dense.gate_FD == row).all(dim=1).nonzero()) for row in gate]
        assert torch.equal(up, dense.up_FD[rows]) and torch.equal(down, dense.down_DF[:, rows])
        found.append(rows)
    return found


def relative(ours: Tensor, truth: Tensor) -> float:
    return float((ours.double() - truth.double()).norm() / truth.double().norm())
