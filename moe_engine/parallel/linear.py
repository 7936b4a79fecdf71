"""Linear layers cut along tp. Tokens are cut along tp outside them (x[T/tp, D]); inside, all tokens meet cut weights:

h[T, D]      = all_gather(x[T/tp, D])          written at the call, not hidden in the layer
q[T, H*C/tp] = ColumnLinear(h)
y[T, D]{tp}  = RowLinear(a[T, H*C/tp])         a partial sum
y[T/tp, D]   = reduce_scatter(y)               written at the call
"""

import torch.nn.functional as F
from torch import Tensor, nn

from moe_engine.parallel.mesh import Axis
from moe_engine.parallel.weight import weight


class ColumnLinear(nn.Module):
    """y[T, N/tp] = x[T, K] @ weight[N/tp, K].T"""

    def __init__(self, in_features: int, out_features: int, tp: Axis, std: float):
        super().__init__()
        self.weight = weight((out_features, in_features), cut={0: tp}, std=std)

    def forward(self, x_TK: Tensor) -> Tensor:
        """x[T, K], the same on all tp ranks -> y[T, N/tp]. dx[T, K]{tp} is left to the backward of what made x."""
        return F.linear(x_TK, self.weight)


class RowLinear(nn.Module):
    """y[T, N]{tp} = x[T, K/tp] @ weight[N, K/tp].T; the caller reduces."""

    def __init__(self, in_features: int, out_features: int, tp: Axis, std: float):
        super().__init__()
        self.weight = weight((out_features, in_features), cut={1: tp}, std=std)

    def forward(self, x_TK: Tensor) -> Tensor:
        """x[T, K/tp] -> y[T, N]{tp}."""
        return F.linear(x_TK, self.weight)


class VocabEmbedding(nn.Module):
    """x[T, D]{tp} = the rows of weight[V/tp, D] that this rank holds, zero for other ids; the caller reduces."""

    def __init__(self, vocab_size: int, hidden_size: int, tp: Axis, std: float):
        super().__init__()
        self.tp = tp
        self.weight = weight((vocab_size, hidden_size), cut={0: tp}, std=std)
        self.first_id = tp.cut(vocab_size).start

    def forward(self, token_T: Tensor) -> Tensor:
        """token[T] int64, ids of the whole vocabulary -> x[T, D]{tp}; other ranks than the row's add 0."""
        if self.tp.size == 1:
            return F.embedding(token_T, self.weight)
        local_T = token_T - self.first_id
        elsewhere_T = (local_T < 0) | (local_T >= self.weight.shape[0])
        x_TD = F.embedding(local_T.masked_fill(elsewhere_T, 0), self.weight)
        return x_TD.masked_fill(elsewhere_T.unsqueeze(-1), 0.0)
