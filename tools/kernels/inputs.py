"""What every contender is given: tokens whose router logits are made to choose the experts of a routing.

    balanced    k distinct experts, all equally likely
    zipf        k distinct experts drawn in turn, each with probability 1 / rank among those that are left
    one-hot     the same k experts for every token

The router's rows are orthonormal, and x holds, besides noise orthogonal to them, the logits that are wanted: 2 to 3 for
a chosen expert, -1 to 0 for the others. So the whole layer is measured, its router included, and rounding to bf16
cannot change what is chosen.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from tools.kernels.shapes import Shape

ROUTINGS = ("balanced", "zipf", "one-hot")


class Inputs(NamedTuple):
    """x, dy [T, D]; router [E, D]; gate_up [E, 2F, D] (gate rows, then up rows); down [E, D, F]: one floating dtype.

    All but dy require a gradient, and the weights are Parameters. counts_E: rows of each expert, int64 on CPU.
    """

    x: Tensor
    router: Parameter
    gate_up: Parameter
    down: Parameter
    dy: Tensor
    top_k: int
    counts: Tensor

    @property
    def leaves(self) -> tuple[Tensor, Parameter, Parameter, Parameter]:
        return self.x, self.router, self.gate_up, self.down


def choose(routing: str, tokens: int, experts: int, top_k: int, generator: torch.Generator) -> Tensor:
    """index_TK int64: the experts of each token, distinct, on the device of the generator."""
    if routing == "one-hot":
        return torch.arange(top_k, device=generator.device).expand(tokens, top_k)
    rank_E = torch.arange(1.0, experts + 1, device=generator.device)
    likely_E = torch.ones_like(rank_E) if routing == "balanced" else 1 / rank_E
    return torch.multinomial(likely_E.expand(tokens, experts), top_k, generator=generator)


def make_inputs(shape: Shape, tokens: int, routing: str, dtype: torch.dtype, device: torch.device) -> Inputs:
    """The same numbers at each call on one kind of device."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    index_TK = choose(routing, tokens, shape.experts, shape.top_k, generator)
    logits_TE = -torch.rand(tokens, shape.experts, generator=generator, device=device)
    chosen_TK = 2 + torch.rand(index_TK.shape, generator=generator, device=device)
    logits_TE.scatter_(1, index_TK, chosen_TK)
    router_ED = torch.linalg.qr(normal(shape.hidden, shape.experts)).Q.T.contiguous()
    x_TD = normal(tokens, shape.hidden)
    x_TD += (logits_TE - x_TD @ router_ED.T) @ router_ED
    gate_up_EFD = normal(shape.experts, 2 * shape.ffn, shape.hidden).mul_(shape.hidden**-0.5)
    down_EDF = normal(shape.experts, shape.hidden, shape.ffn).mul_(shape.ffn**-0.5)
    dy_TD = normal(tokens, shape.hidden)
    counts_E = index_TK.flatten().bincount(minlength=shape.experts).cpu()
    return Inputs(
        x_TD.to(dtype).requires_grad_(), Parameter(router_ED.to(dtype)), Parameter(gate_up_EFD.to(dtype)),
        Parameter(down_EDF.to(dtype)), dy_TD.to(dtype), shape.top_k, counts_E,
    )  # fmt: skip
