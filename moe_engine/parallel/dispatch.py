"""Dispatch and combine: rows travel to the ranks that hold their experts, and back.

    rows[R, D] of this rank's tokens (T/tp of them), sorted by expert, and columns[R, X] of each: its weight, ...
      all_to_all over ep    each row goes to the ep rank of its expert     rows arrive by (source rank, expert)
      all_gather over tp    every tp rank holds a slice of every expert    M = tp * (most rows of a tp rank), padded
    combine is the reverse, for rows alone; the experts' partial sums {tp} are reduce-scattered on the way back.

Both all-to-alls are under way when dispatch returns, so that the caller computes until it waits for the rows.

Sending before gathering puts R rows on the wire; gathering first would send every row tp times between nodes. Which
rows go where follows from one [ep, tp, E] table of counts: the only host synchronisation of an MoE layer, on its way
while the rows are put in order. Rows past sum(counts) (dropped assignments) are not sent and come back as zeros. When
ep = tp = 1 every row stays, the dropped ones as padding, and the host waits for nothing.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_engine.parallel.collectives import (
    PendingRows,
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


class Dispatched:
    """Rows on their way to the experts, with the columns of each.

    expert_M int32: the local expert of each row that will arrive, 0 .. L-1; L marks padding."""

    def __init__(self, rows: PendingRows, columns: PendingRows, expert_M: Tensor, route: Route, tp: Axis):
        self.rows, self.columns, self.expert_M, self.route, self.tp = rows, columns, expert_M, route, tp

    def wait(self) -> tuple[Tensor, Tensor]:
        """rows_MD and columns_MX, when they have arrived."""
        return self._on_plane(self.rows), self._on_plane(self.columns)

    def _on_plane(self, pending: PendingRows) -> Tensor:
        rows = pending.wait()
        if self.tp.size == 1:
            return rows
        return all_gather(F.pad(rows, (0, 0, 0, self.route.rows_padded - rows.shape[0])), self.tp)


class Counts:
    """Rows of every expert from every rank of an ep x tp plane, counts[ep, tp, E] int32, on their way to the host.

    Made before the rows are put in order, it is there by the time that they are."""

    def __init__(self, counts_E: Tensor, ep: Axis, tp: Axis):
        self.here = gather_rows(gather_rows(counts_E.unsqueeze(0), tp).unsqueeze(0), ep)
        self.host, self.arrived = self.here, None
        if self.here.is_cuda and ep.size * tp.size > 1:
            self.host = torch.empty(self.here.shape, dtype=torch.int32, pin_memory=True)
            self.host.copy_(self.here, non_blocking=True)
            self.arrived = torch.cuda.Event()
            self.arrived.record()

    def read(self) -> Tensor:
        """The counts on the host: what a MoE layer waits for."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.host


def dispatch(rows_RD: Tensor, columns_RX: Tensor, counts: Counts, ep: Axis, tp: Axis) -> Dispatched:
    """Start to send rows to the experts of this ep x tp plane; `wait` returns those that arrive.

    rows_RD: sorted by expert. columns_RX: what travels with each row in fp32, its weight first. Rows past this rank's
    counts are dropped.
    """
    route = _route(rows_RD.shape[0], counts, ep, tp)
    rows = start_all_to_all(rows_RD[: sum(route.send)], route.send, route.recv, ep)
    columns = start_all_to_all(columns_RX[: sum(route.send)], route.send, route.recv, ep)
    mine = counts.here[:, :, ep.cut(counts.here.shape[2])]
    return Dispatched(rows, columns, _expert_of_row(mine, route.rows_padded), route, tp)


def combine(rows_MD: Tensor, route: Route, ep: Axis, tp: Axis) -> Tensor:
    """The experts' outputs rows_MD{tp}, in the order in which they arrived, back to the senders -> rows_RD."""
    rows = reduce_scatter(rows_MD, tp)[: sum(route.recv)]
    rows = all_to_all(rows, route.recv, route.send, ep)
    dropped = route.rows_here - rows.shape[0]
    return F.pad(rows, (0, 0, 0, dropped)) if dropped else rows


def _route(rows_here: int, counts: Counts, ep: Axis, tp: Axis) -> Route:
    if ep.size == tp.size == 1:
        return Route([rows_here], [rows_here], rows_here, rows_here)
    host = counts.read()
    experts = host.shape[2]
    send = host[ep.rank, tp.rank].view(ep.size, experts // ep.size).sum(1).tolist()
    mine = host[:, :, ep.cut(experts)]  # [source ep, source tp, L]
    return Route(send, mine[:, tp.rank].sum(1).tolist(), rows_here, int(mine.sum((0, 2)).max()))


def _expert_of_row(counts: Tensor, rows_padded: int) -> Tensor:
    """counts[source ep, source tp, L] -> expert_M int32, in arrival order (tp, then ep, then expert)."""
    sources, tp_size, local = counts.shape
    counts = counts.transpose(0, 1).reshape(tp_size, sources * local)
    padding = rows_padded - counts.sum(1, keepdim=True)
    expert = torch.arange(local + 1, dtype=torch.int32, device=counts.device)
    experts = torch.cat([expert[:local].repeat(sources), expert[local:]]).repeat(tp_size)
    return experts.repeat_interleave(torch.cat([counts, padding], 1).flatten(), output_size=tp_size * rows_padded)
