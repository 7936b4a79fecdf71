"""A weight declares itself once: its whole shape, where it is cut, how it starts.

    self.weight = weight((V, D), cut={0: mesh.tp}, std=0.02)      # weight[V/tp, D]

Initialisation, the optimizer's parameter groups, the gradient norm and the checkpoint all read that note. Starting
values depend on the seed, the parameter's name and the element's place in the *whole* tensor, never on the layout:
element i of parameter p is a function of splitmix64(key(seed, p) + i), so a rank draws just the part that it owns.
"""

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from moe_engine.hashing import GAMMA, mix64
from moe_engine.parallel.mesh import Axis

CHUNK = 1 << 18  # elements drawn at a time: the scratch of int64 stays in cache


@dataclass(frozen=True)
class WeightNote:
    """shape: of the whole weight.  cut: dimension -> axis.  std: of its normal start; bound: of an even start within
    +-bound; with neither it starts at `fill`.

    expert: the weight is owned by one rank of the ep axis, so that its gradient is reduced over dp, not over data.
    """

    shape: tuple[int, ...]
    cut: Mapping[int, Axis] = field(default_factory=dict)
    std: float | None = None
    fill: float = 0.0
    bound: float | None = None

    @property
    def expert(self) -> bool:
        """Whether the ep axis cuts the weight."""
        return any(axis.name == "ep" for axis in self.cut.values())

    @property
    def tensor_parallel(self) -> bool:
        """Whether the tp axis cuts the weight; if not, each tp rank holds all of it."""
        return any(axis.name == "tp" for axis in self.cut.values())

    def local_slices(self) -> tuple[slice, ...]:
        """The part of the whole weight that this rank holds, one slice a dimension."""
        return tuple(self.cut[d].cut(n) if d in self.cut else slice(0, n) for d, n in enumerate(self.shape))


def weight(
    shape: tuple[int, ...],
    *,
    cut: Mapping[int, Axis] | None = None,
    std: float | None = None,
    fill: float = 0.0,
    bound: float | None = None,
) -> nn.Parameter:
    """A parameter holding this rank's part of a weight of `shape`; values come later, from `initialise`."""
    note = WeightNote(shape, cut or {}, std, fill, bound)
    parameter = nn.Parameter(torch.empty([s.stop - s.start for s in note.local_slices()]))
    setattr(parameter, "note", note)  # noqa: B010 (a Parameter has no declared field for it)
    return parameter


def note_of(parameter: Tensor) -> WeightNote:
    """The note of a parameter made by `weight`."""
    return getattr(parameter, "note")  # noqa: B009


@torch.no_grad()
def initialise(model: nn.Module, seed: int) -> None:
    """Fill every parameter from (seed, name, global place); a tied parameter is filled once, under its first name."""
    for name, parameter in model.named_parameters():
        note = note_of(parameter)
        if note.bound is not None:
            draw_(parameter, note, key_of(seed, name), _even)
            parameter.mul_(note.bound)
        elif note.std is not None:
            draw_normal_(parameter, note, key_of(seed, name))
            parameter.mul_(note.std)
        else:
            parameter.fill_(note.fill)


def key_of(seed: int, name: str) -> int:
    """A 63-bit key for the stream of one named thing."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little") >> 1


def draw_normal_(out: Tensor, note: WeightNote, key: int) -> None:
    """Standard normal values of this rank's part of the whole tensor, written into `out`."""
    draw_(out, note, key, _normal)


def draw_(out: Tensor, note: WeightNote, key: int, values: Callable[[Tensor, int], Tensor]) -> None:
    """values(index, key) of the elements of this rank's part, by their places in the whole tensor, CHUNK at a time."""
    strides = [math.prod(note.shape[d + 1 :]) for d in range(len(note.shape))]
    places = [torch.arange(s.start, s.stop, device=out.device) * strides[d] for d, s in enumerate(note.local_slices())]
    first = torch.zeros(1, dtype=torch.int64, device=out.device)  # the number of each row's first element
    for place in places[:-1]:
        first = (first.unsqueeze(-1) + place).flatten()
    table, row = out.view(first.numel(), -1), places[-1]
    rows = max(1, CHUNK // row.numel())
    for start in range(0, len(first), rows):
        index = first[start : start + rows].unsqueeze(1) + row
        table[start : start + rows].copy_(values(index, key))


def _even(index: Tensor, key: int) -> Tensor:
    """Numbers within +-1, from the upper half of one 64-bit hash per element; int64 -> float32."""
    word = mix64((index + key) * GAMMA)
    return (((word >> 32) & 0xFFFFFFFF).double().add_(0.5).mul_(2.0**-31) - 1).float()


def _normal(index: Tensor, key: int) -> Tensor:
    """Box-Muller on the two 32-bit halves of one 64-bit hash per element; int64 -> float32."""
    word = mix64((index + key) * GAMMA)
    u = ((word >> 32) & 0xFFFFFFFF).double().add_(0.5).mul_(2.0**-32)
    v = (word & 0xFFFFFFFF).double().mul_(2.0**-32)
    return (u.log_().mul_(-2).sqrt_() * v.mul_(2 * math.pi).cos_()).float()
