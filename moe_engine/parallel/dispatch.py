"""Dispatch and combine: rows travel to the ranks that hold their experts, and back.

    rows[R, D] of this rank's tokens (T/tp of them), sorted by expert, and the weight of each
      all_to_all over ep    each row goes to the ep rank of its expert     rows arrive by (source rank, expert)
      all_gather over tp    every tp rank holds a slice of every expert    M = tp * (most rows of a tp rank), padded
    combine is the reverse, for rows alone; the experts' partial sums {tp} are reduce-scattered on the way back.

The two all-to-alls are under way when dispatch returns, so that the caller computes until it lands the flight.

Sending before gathering puts R rows on the wire; gathering first would send every row tp times between nodes. Which
rows go where follows from one [ep, tp, E] table of counts: the only host synchronisation of an MoE layer, and none
when ep = tp = 1. Rows past sum(counts) (dropped assignments) are not sent and come back as zeros.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_engine.parallel.collectives import (
    Trip,
    all_gather,
    all_to_all,
    gather_rows,
    reduce_scatter,
    start_all_to_all,
)
from moe_engine.parallel.mesh import Axis


class Route(NamedTuple):
    """How the rows of one layer travelled, in rows. `send` and `recv` are per ep rank, the rest are totals."""

    send: list[int]
    recv: list[int]
    rows_here: int  # R, with dropped rows
    rows_padded: int  # per tp rank, after padding to the fullest one


class Flight:
    """Rows on their way to the experts, with the weight of each."""

    def __init__(self, rows: Trip, weight: Trip, expert_M: Tensor, route: Route, tp: Axis):
        self.rows, self.weight, self.expert_M, self.route, self.tp = rows, weight, expert_M, route, tp

    def land(self) -> tuple[Tensor, Tensor, Tensor]:
        """rows_MD, weight_M1 and expert_M1 int32: the local expert of each row, 0 .. L-1; L marks padding."""
        return self._on_plane(self.rows), self._on_plane(self.weight), self.expert_M.unsqueeze(1)

    def _on_plane(self, trip: Trip) -> Tensor:
        rows = trip.wait()
        if self.tp.size == 1:
            return rows
        return all_gather(F.pad(rows, (0, 0, 0, self.route.rows_padded - rows.shape[0])), self.tp)


def dispatch(rows_RD: Tensor, weight_R1: Tensor, counts_E: Tensor, ep: Axis, tp: Axis) -> Flight:
    """Rows leave for the experts of this ep x tp plane; `land` the flight to have those that arrive.

    rows_RD: sorted by expert, weight_R1 fp32, counts_E int32 rows of each expert (the rest of R is dropped).
    """
    local = counts_E.shape[0] // ep.size
    table = gather_rows(gather_rows(counts_E.unsqueeze(0), tp).unsqueeze(0), ep)  # [ep, tp, E] on every rank
    host = table.cpu()
    send = host[ep.rank, tp.rank].view(ep.size, local).sum(1).tolist()
    mine = host[:, :, ep.cut(counts_E.shape[0])]  # [source ep, source tp, L]
    recv = mine[:, tp.rank].sum(1).tolist()
    route = Route(send, recv, rows_RD.shape[0], int(mine.sum((0, 2)).max()))
    rows = start_all_to_all(rows_RD[: sum(send)], send, recv, ep)
    weight = start_all_to_all(weight_R1[: sum(send)], send, recv, ep)
    expert_M = _expert_of_row(mine, route.rows_padded).to(rows_RD.device, non_blocking=True)
    return Flight(rows, weight, expert_M, route, tp)


def combine(rows_MD: Tensor, route: Route, ep: Axis, tp: Axis) -> Tensor:
    """The experts' outputs rows_MD{tp}, in the order in which they landed, back to the senders -> rows_RD."""
    rows = reduce_scatter(rows_MD, tp)[: sum(route.recv)]
    rows = all_to_all(rows, route.recv, route.send, ep)
    dropped = route.rows_here - rows.shape[0]
    return F.pad(rows, (0, 0, 0, dropped)) if dropped else rows


def _expert_of_row(counts: Tensor, rows_padded: int) -> Tensor:
    """counts[source ep, source tp, L] on the host -> expert_M int32, in arrival order (tp, then ep, then expert)."""
    sources, tp_size, local = counts.shape
    counts = counts.transpose(0, 1).reshape(tp_size, sources * local)
    padding = rows_padded - counts.sum(1, keepdim=True)
    experts = torch.cat([torch.arange(local).repeat(sources), torch.tensor([local])])
    return experts.repeat(tp_size).repeat_interleave(torch.cat([counts, padding], 1).flatten().long()).int()
