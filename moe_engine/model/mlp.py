"""The dense SwiGLU feed-forward layer, its width F cut along tp: y = down(silu(gate x) * (up x))."""

import torch.nn.functional as F
from torch import Tensor, nn

from moe_engine.ops import swiglu
from moe_engine.parallel.collectives import all_gather, reduce_scatter
from moe_engine.parallel.linear import RowLinear
from moe_engine.parallel.mesh import Mesh
from moe_engine.parallel.weight import weight


class DenseMLP(nn.Module):
    """w_gate_up[2, F/tp, D] holds gate, then up; down[D, F/tp]."""

    def __init__(self, hidden: int, width: int, std: float, mesh: Mesh):
        super().__init__()
        self.tp = mesh.tp
        self.w_gate_up = weight((2, width, hidden), cut={1: mesh.tp}, std=std)
        self.down = RowLinear(width, hidden, mesh.tp, std)

    def forward(self, x_TD: Tensor) -> Tensor:
        """x[T/tp, D], normalised -> the layer's contribution [T/tp, D]."""
        h_TD = all_gather(x_TD, self.tp)
        a_TF = swiglu(F.linear(h_TD, self.w_gate_up.flatten(0, 1)))
        return reduce_scatter(self.down(a_TF), self.tp)
