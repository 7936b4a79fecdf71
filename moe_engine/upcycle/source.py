"""An upcycled model as a source of weights: a layer is made when one of its weights is asked for.

Only the layer made last is kept, so that a model of any size is written layer by layer. What a layer is made of comes
from the dense parent's folder; what is left alone is read from there, or, of several parents, averaged.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from moe_engine.checkpoint.finite import nonfinite, refusal
from moe_engine.checkpoint.hf.folder import HfFolder
from moe_engine.checkpoint.pieces import Box, Piece
from moe_engine.checkpoint.weights_only import WHOLE_COPY
from moe_engine.config import Model
from moe_engine.config.weights import weight_shapes
from moe_engine.upcycle import attention, mix
from moe_engine.upcycle.layer import Dense
from moe_engine.upcycle.methods import METHODS
from moe_engine.upcycle.options import Options
from moe_engine.upcycle.transplant import attention_weights, routed_weights

RouterRows = Callable[[int, int], Tensor]  # (layer, experts) -> [experts, D]


class Parent(HfFolder):
    """A dense folder that is read once and checked on the way: unless `allow_nonfinite`, what it gives is finite."""

    def __init__(self, folder: Path, allow_nonfinite: bool):
        super().__init__(folder)
        self.allow_nonfinite = allow_nonfinite

    def fill(self, kind: str, wanted: Piece, out: Tensor) -> None:
        """As that of any source; DataError says how many of the weight's numbers are NaN or infinite."""
        super().fill(kind, wanted, out)
        if not self.allow_nonfinite and (said := nonfinite(out)):
            raise refusal(self, {wanted.name: said}, WHOLE_COPY)


class Upcycled:
    """The child of one dense folder, or of several of the same shape (mix).

    router, attention_router: the first rows of a layer's router. scores: importance[N, E, F] of the methods that need
    it.
    """

    def __init__(
        self,
        parents: Sequence[HfFolder],
        child: Model,
        method: str,
        options: Options,
        router: RouterRows,
        attention_router: RouterRows,
        scores: Tensor | None = None,
    ):
        self.parents, self.child, self.method, self.options = parents, child, method, options
        self.router, self.attention_router, self.scores = router, attention_router, scores
        self.shapes: Mapping[str, tuple[int, ...]] = weight_shapes(child)
        self._layer, self._made = -1, dict[str, Tensor]()

    def __str__(self) -> str:
        return f"the {self.method} of {self.parents[0]}"

    def part(self, name: str, box: Box, dtype: torch.dtype | None = None) -> Tensor:
        """The elements of a box of one weight."""
        whole = self._whole(name)
        found = whole[tuple(slice(start, stop) for start, stop in box)]
        return found.to(dtype or whole.dtype).contiguous()

    def dtype(self, name: str, box: Box) -> torch.dtype:
        """That of the parent, whose FFN decides for experts and routers."""
        if name in self.parents[0].shapes:
            return self.parents[0].dtype(name, tuple((0, side) for side in self.parents[0].shapes[name]))
        like = f"layers.{name.split('.')[1]}." + ("attention.q.weight" if ".attention." in name else "ffn.w_gate_up")
        return self.parents[0].dtype(like, tuple((0, side) for side in self.parents[0].shapes[like]))

    def _whole(self, name: str) -> Tensor:
        if name in self.parents[0].shapes:
            found = [parent.whole(name, dtype=None) for parent in self.parents]
            return mix.average(found) if len(found) > 1 else found[0]
        layer = int(name.split(".")[1])
        if layer != self._layer:
            self._made = {}  # the layer before goes first
            self._layer, self._made = layer, self._make(layer)
        return self._made[name]

    def _make(self, layer: int) -> dict[str, Tensor]:
        made: dict[str, Tensor] = {}
        if self.child.is_moe(layer):
            dense, *others = [dense_of(parent, layer) for parent in self.parents]
            more = [self.scores[layer]] if self.scores is not None else [others] if self.method == "mix" else []
            routed = METHODS[self.method].build(layer, dense, self.options, *more)
            made |= routed_weights(layer, routed, self.router(layer, self.options.experts))
        if f"layers.{layer}.attention.experts.w_q" in self.shapes:
            names = [f"layers.{layer}.attention.{letter}.weight" for letter in "qkvo"]
            q, k, v, o = (mix.average([p.whole(name, dtype=None) for p in self.parents]) for name in names)
            experts = attention.build(self.parents[0].model, self.options, q, k, v, o)
            made |= attention_weights(layer, experts, self.attention_router(layer, self.options.attention_experts))
        return made


def dense_of(folder: HfFolder, layer: int) -> Dense:
    """One dense feed-forward layer of a folder, in its own dtype."""
    gate_FD, up_FD = folder.whole(f"layers.{layer}.ffn.w_gate_up", dtype=None)
    return Dense(gate_FD, up_FD, folder.whole(f"layers.{layer}.ffn.down.weight", dtype=None))
