"""The rank grid: `world = dp * ep * tp`, tp varying fastest, then ep, then dp.

Every rank of one dp x ep plane reads different data. `dp` counts the replicas of each expert; dense weights are
replicated over `data` = dp x ep. Eight ranks, ep 2, dp 4:

    ep   [0,1] [2,3] [4,5] [6,7]        the all-to-all of the experts
    dp   [0,2,4,6] [1,3,5,7]            expert gradients and expert optimizer states
    data [0,1,2,3,4,5,6,7]              dense gradients and dense optimizer states, samples

One rank is the degenerate mesh: every axis has size 1 and no group.
"""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Axis:
    """One direction of the mesh, seen from this rank.

    name: "dp" | "ep" | "tp" | "data" | "world".  size: ranks along it.  rank: this rank's place, 0 .. size-1.
    group: the process group of the ranks that differ from this one along this axis alone; None when size is 1.
    """

    name: str
    size: int = 1
    rank: int = 0
    group: dist.ProcessGroup | None = None

    def cut(self, length: int) -> slice:
        """The part of a dimension of `length` that this rank owns; the size must divide it."""
        assert length % self.size == 0, f"{self.name}={self.size} does not divide {length}"
        part = length // self.size
        return slice(self.rank * part, (self.rank + 1) * part)


@dataclass(frozen=True)
class Mesh:
    """All axes of this rank. Built once by `build_mesh`; a constructor keeps the axes that it uses."""

    dp: Axis = Axis("dp")
    ep: Axis = Axis("ep")
    tp: Axis = Axis("tp")
    data: Axis = Axis("data")
    world: Axis = Axis("world")


def rank_lists(dp: int, ep: int, tp: int) -> dict[str, list[list[int]]]:
    """The groups of every axis as lists of global ranks, in the order in which they are created."""
    grid = torch.arange(dp * ep * tp).view(dp, ep, tp)
    return {
        "dp": grid.permute(1, 2, 0).reshape(-1, dp).tolist(),
        "ep": grid.permute(0, 2, 1).reshape(-1, ep).tolist(),
        "tp": grid.reshape(-1, tp).tolist(),
        "data": grid.permute(2, 0, 1).reshape(-1, dp * ep).tolist(),
        "world": grid.reshape(1, -1).tolist(),
    }


def build_mesh(dp: int, ep: int, tp: int, timeout: timedelta | None = None) -> Mesh:
    """Create the process groups of the grid; collective over all ranks. With one rank nothing is created.

    timeout: of their collectives; None is the backend's own. Raises ValueError when dp * ep * tp is not the world size.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    if dp * ep * tp != world:
        raise ValueError(f"dp {dp} x ep {ep} x tp {tp} = {dp * ep * tp} ranks, but the world has {world}")
    me = dist.get_rank() if world > 1 else 0
    axes = {}
    for name, groups in rank_lists(dp, ep, tp).items():
        for ranks in groups:
            group: Any = dist.new_group(ranks, timeout=timeout) if len(ranks) > 1 else None
            if me in ranks:
                axes[name] = Axis(name, len(ranks), ranks.index(me), group)
    return Mesh(**axes)
