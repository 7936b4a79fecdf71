"""experts on CUDA, in the kernels of SonicMoE (arXiv 2512.14080) as far as Triton can express them:

    up      h, a     tokens gathered in the load, both halves of w_gate_up, s * SwiGLU in the epilogue
    matmul  o        a @ w_down.T                                                   (grouped_mm)
    sum     y        each token's rows, in the order of its choices                 (permute)

    down    dh, a, dweight   dy gathered in the load; da = dy @ w_down never leaves the chip: the epilogue reads h,
                             computes a again, and writes the gradients of gate and up and a's row sums with da
    weights dw_down          dy gathered in the load                                (grouped_mm)
    weights dw_gate_up       x gathered in the load                                 (grouped_mm)
    matmul  dx of rows       dh @ w_gate_up                                         (grouped_mm)
    sum     dx               each token's rows                                      (permute)

The epilogue of `down` works on a quarter of its columns at a time: on all of them it would need more registers than
there are. What each tile adds to dweight goes to a place of its own, and the places are summed in order.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from moe_engine.ops import tune
from moe_engine.ops.grouped_mm import triton as grouped
from moe_engine.ops.grouped_mm.triton import block, experts_of, locate
from moe_engine.ops.permute.triton import unpermute
from moe_engine.ops.tune import Tile, Tiles

UP = Tiles(
    hopper=(
        Tile(128, 128, 64, 8, 4), Tile(128, 64, 64, 8, 4), Tile(64, 128, 64, 8, 4), Tile(64, 64, 64, 4, 4, 2),
        Tile(32, 64, 64, 4, 4, 2),
    ),
    ampere=(
        Tile(128, 64, 64, 8, 3), Tile(128, 64, 32, 8, 4), Tile(64, 64, 32, 4, 3, 2), Tile(32, 64, 64, 4, 3, 2),
    ),
    single=(Tile(64, 32, 16, 8, 3), Tile(32, 32, 16, 4, 3, 2)),
)  # fmt: skip
DOWN = Tiles(
    hopper=(
        Tile(128, 128, 64, 8, 4), Tile(128, 64, 64, 8, 4, 2), Tile(64, 128, 64, 4, 4, 2), Tile(64, 64, 64, 4, 4, 2),
        Tile(32, 64, 64, 4, 4, 2),
    ),
    ampere=(
        Tile(128, 128, 32, 8, 3), Tile(128, 64, 64, 8, 3), Tile(64, 64, 32, 4, 4, 2), Tile(32, 64, 64, 4, 3, 2),
    ),
    single=(Tile(64, 64, 16, 8, 3), Tile(32, 64, 32, 4, 3, 2)),
)  # fmt: skip


@triton.jit
def halves(x, m: tl.constexpr, n: tl.constexpr):
    """x[m, n] -> its left and right half."""
    return tl.split(tl.permute(tl.reshape(x, (m, 2, n // 2)), (0, 2, 1)))


@triton.jit(do_not_specialize=["rows"])
def up_kernel(
    x, weight, w, h, a, counts, of_row, rows, experts, D, F,
    KEEP: tl.constexpr, ACTIVATE: tl.constexpr, BY: tl.constexpr, TMA: tl.constexpr, E_PAD: tl.constexpr,
    PRECISION: tl.constexpr, m: tl.constexpr, n: tl.constexpr, k: tl.constexpr, group: tl.constexpr,
):  # fmt: skip
    """h[R, 2F] if KEEP and a[R, F] if ACTIVATE, m rows by n columns of gate and the same n of up at a time; w is
    [2E, F, D], a descriptor if TMA. BY is K."""
    start_E, end_E, tiles_E = experts_of(counts, rows, experts, m, E_PAD)
    n_tiles = tl.cdiv(F, n)
    for tile in tl.range(tl.program_id(0), tl.max(tiles_E, 0) * n_tiles, tl.num_programs(0)):
        e, row, end, n_tile = locate(tile, n_tiles, start_E, end_E, tiles_E, m, group, E_PAD)
        r, c = row + tl.arange(0, m), n_tile * n + tl.arange(0, n)
        there, inside = r < end, (r < end)[:, None] & (c < F)[None, :]
        assignment = tl.load(of_row + r, mask=there, other=0)
        s = tl.load(weight + assignment, mask=there, other=0.0)[:, None]
        token, at_k = (assignment // BY).to(tl.int64)[:, None] * D, tl.arange(0, k)
        both = tl.arange(0, 2 * n)  # columns of gate, then of up
        column = n_tile * n + both % n
        of_w = (e * 2 * F + both // n * F + column).to(tl.int64)[:, None] * D
        sums = tl.zeros((m, 2 * n), tl.float32)
        for step in range(tl.where(e < experts, tl.cdiv(D, k), 0)):
            d = step * k + at_k
            left = tl.load(x + token + d[None, :], mask=there[:, None] & (TMA | (d < D)[None, :]), other=0.0)
            if TMA:
                right = w.load([2 * e, n_tile * n, step * k]).reshape(2 * n, k)
            else:
                right = tl.load(w + of_w + d[None, :], mask=(column < F)[:, None] & (d < D)[None, :], other=0.0)
            sums = tl.dot(left, right.T, sums, input_precision=PRECISION)
        gate, up = halves(sums, m, 2 * n)
        to = r.to(tl.int64)[:, None]
        if KEEP:
            tl.store(h + to * 2 * F + c[None, :], gate.to(h.dtype.element_ty), mask=inside)
            tl.store(h + to * 2 * F + F + c[None, :], up.to(h.dtype.element_ty), mask=inside)
        if ACTIVATE:
            # from the rounded h, as backward will see it
            gate, up = gate.to(a.dtype.element_ty).to(tl.float32), up.to(a.dtype.element_ty).to(tl.float32)
            tl.store(a + to * F + c[None, :], (s * gate * tl.sigmoid(gate) * up).to(a.dtype.element_ty), mask=inside)


@triton.jit
def hidden(h, r, c, end, F):
    """Columns c of gate and up of rows r."""
    inside, at = (r < end)[:, None] & (c < F)[None, :], h + r.to(tl.int64)[:, None] * 2 * F + c[None, :]
    return tl.load(at, mask=inside, other=0.0), tl.load(at + F, mask=inside, other=0.0)


@triton.jit
def differentiate(da, s, gate, up, dh, a, r, c, end, F):
    """Some columns c of rows r: gate, up and da give dh, s * a, and the row sums of da * a."""
    inside, to = (r < end)[:, None] & (c < F)[None, :], r.to(tl.int64)[:, None]
    gate, up = gate.to(tl.float32), up.to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    d = da * s
    d_gate = d * up * (sigmoid + silu * (1 - sigmoid))
    tl.store(dh + to * 2 * F + c[None, :], d_gate.to(dh.dtype.element_ty), mask=inside)
    tl.store(dh + to * 2 * F + F + c[None, :], (d * silu).to(dh.dtype.element_ty), mask=inside)
    tl.store(a + to * F + c[None, :], (s * silu * up).to(a.dtype.element_ty), mask=inside)
    return tl.sum(da * silu * up, 1)


@triton.jit(do_not_specialize=["rows"])
def down_kernel(
    dy, weight, w, h, dh, a, dweight, counts, of_row, rows, experts, D, F,
    BY: tl.constexpr, TMA: tl.constexpr, E_PAD: tl.constexpr, PRECISION: tl.constexpr,
    m: tl.constexpr, n: tl.constexpr, k: tl.constexpr, group: tl.constexpr,
):  # fmt: skip
    """dh[R, 2F], a[R, F] and dweight[R, tiles of F], whose columns the caller adds up; m rows by n columns at a time. w
    is [E * D, F], a descriptor if TMA. dweight is in order of assignments. BY is K."""
    start_E, end_E, tiles_E = experts_of(counts, rows, experts, m, E_PAD)
    n_tiles = tl.cdiv(F, n)
    for tile in tl.range(tl.program_id(0), tl.max(tiles_E, 0) * n_tiles, tl.num_programs(0)):
        e, row, end, n_tile = locate(tile, n_tiles, start_E, end_E, tiles_E, m, group, E_PAD)
        r, c = row + tl.arange(0, m), n_tile * n + tl.arange(0, n // 4)
        there = r < end
        assignment = tl.load(of_row + r, mask=there, other=0)
        s = tl.load(weight + assignment, mask=there, other=0.0)[:, None]
        token, at_k = (assignment // BY).to(tl.int64)[:, None] * D, tl.arange(0, k)
        gate, up = hidden(h, r, c, end, F)  # long before its use, and the others below one step before theirs
        da = tl.zeros((m, n), tl.float32)
        for step in range(tl.where(e < experts, tl.cdiv(D, k), 0)):
            d = step * k + at_k
            left = tl.load(dy + token + d[None, :], mask=there[:, None] & (TMA | (d < D)[None, :]), other=0.0)
            right = block(w, e * D + step * k, n_tile * n, e * D + D, F, k, n, TMA)
            da = tl.dot(left, right, da, input_precision=PRECISION)
        left, right = halves(da, m, n)
        first, second = halves(left, m, n // 2)
        third, fourth = halves(right, m, n // 2)
        next_gate, next_up = hidden(h, r, c + n // 4, end, F)
        total = differentiate(first, s, gate, up, dh, a, r, c, end, F)
        gate, up = hidden(h, r, c + n // 2, end, F)
        total += differentiate(second, s, next_gate, next_up, dh, a, r, c + n // 4, end, F)
        next_gate, next_up = hidden(h, r, c + 3 * (n // 4), end, F)
        total += differentiate(third, s, gate, up, dh, a, r, c + n // 2, end, F)
        total += differentiate(fourth, s, next_gate, next_up, dh, a, r, c + 3 * (n // 4), end, F)
        tl.store(dweight + assignment.to(tl.int64) * n_tiles + n_tile, total, mask=there)


class Layer:
    """One layer's operands and the launches of its kernels."""

    def __init__(self, x: Tensor, weight: Tensor, counts: Tensor, of_row: Tensor, row_of: Tensor, F: int):
        self.x, self.weight = x.contiguous(), weight.contiguous()
        self.counts, self.of_row, self.row_of = counts.contiguous(), of_row.contiguous(), row_of.contiguous()
        self.by, self.rows, self.experts, self.D, self.F = row_of.shape[1], len(of_row), len(counts), x.shape[1], F

    def choose(self, name: str, tiles: Tiles, run: Callable[[Tile], object]) -> Tile:
        """The tile for this dtype, D, F, K and mean rows per expert, by tune.choose, which may call run."""
        sizes = (self.D, self.F, self.by)
        return tune.choose(name, self.x.device, self.x.dtype, sizes, self.rows / self.experts, tiles, run)

    def grid(self, tile: Tile) -> tuple[int]:
        """The grid of a persistent launch over [R, F], from an upper bound of its tiles: each expert may end within
        one."""
        tiles = (triton.cdiv(self.rows, tile.m) + self.experts) * triton.cdiv(self.F, tile.n)
        return grouped.programs(self.x.device, tiles, tile.programs)

    def up(self, w_gate_up: Tensor, keep: bool, activate: bool) -> tuple[Tensor, Tensor]:
        """h[R, 2F] if kept and a[R, F] if activated, else without rows."""
        w = w_gate_up.contiguous().view(2 * self.experts, self.F, self.D)
        h = self.x.new_empty(self.rows if keep else 0, 2 * self.F)
        a = self.x.new_empty(self.rows if activate else 0, self.F)

        def run(tile: Tile) -> None:
            tma = self.D % tile.k == 0 and grouped.descriptors_can(w)
            up_kernel[self.grid(tile)](
                self.x, self.weight, TensorDescriptor.from_tensor(w, [2, tile.n, tile.k]) if tma else w, h, a,
                self.counts, self.of_row, self.rows, self.experts, self.D, self.F, keep, activate, self.by, tma,
                grouped.padded(self.experts), tune.precision(w.dtype), *tile[:3], tile.group,
                **tile.options(),
            )  # fmt: skip

        if self.rows and self.F:
            run(self.choose("experts_up", UP, run))
        return h, a

    def down(self, dy: Tensor, w_down: Tensor, h: Tensor, overwrite: bool) -> tuple[Tensor, Tensor, Tensor]:
        """dh[R, 2F], a[R, F] and dweight[T, K]. dh takes the place of h if told to overwrite it: each program reads
        what it replaces, and nothing else, before."""
        dy, w = dy.contiguous(), w_down.contiguous().view(-1, self.F)
        dh, a, dweight = h, h.new_empty(self.rows, self.F), torch.zeros_like(self.weight)

        def run(tile: Tile, dh: Tensor) -> Tensor:
            tma = self.D % tile.k == 0 and grouped.descriptors_can(w)
            parts = self.weight.new_empty(self.rows, triton.cdiv(self.F, tile.n))
            down_kernel[self.grid(tile)](
                dy, self.weight, TensorDescriptor.from_tensor(w, [tile.k, tile.n]) if tma else w, h, dh, a, parts,
                self.counts, self.of_row, self.rows, self.experts, self.D, self.F, self.by, tma,
                grouped.padded(self.experts), tune.precision(w.dtype), *tile[:3], tile.group,
                **tile.options(),
            )  # fmt: skip
            return parts.sum(1).view_as(self.weight)

        if self.rows and self.F:
            # measuring launches many times, and each launch needs h
            tile = self.choose("experts_down", DOWN, lambda tile: run(tile, torch.empty_like(h)))
            dh = h if overwrite else torch.empty_like(h)
            dweight = run(tile, dh)
        return dh, a, dweight

    def sum(self, rows: Tensor, w: Tensor, transposed: bool) -> Tensor:
        """Rows times their matrices, added up token by token. A token with one row needs no sum: its product is stored
        where the token is."""
        if self.by == 1:
            return grouped.matmul(rows, w, self.counts, transposed, self.of_row)
        return unpermute(grouped.matmul(rows, w, self.counts, transposed), self.of_row, self.row_of)


def experts(
    x: Tensor, weight: Tensor, w_gate_up: Tensor, w_down: Tensor, counts: Tensor, assignment_of_row: Tensor,
    row_of: Tensor, keep_h: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y_TD, h_R(2F)); h has no rows unless keep_h."""
    layer = Layer(x, weight, counts, assignment_of_row, row_of, w_down.shape[2])
    h, a = layer.up(w_gate_up, keep=keep_h, activate=True)
    return layer.sum(a, w_down, transposed=True), h


def experts_backward(
    grad: Tensor, x: Tensor, weight: Tensor, w_gate_up: Tensor, w_down: Tensor, counts: Tensor,
    assignment_of_row: Tensor, row_of: Tensor, h: Tensor, need_x: bool, need_matrices: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dx_TD, dweight_TK, dw_gate_up, dw_down); what is not needed has no elements. An h without rows is computed
    again, and dh then overwrites it."""
    layer = Layer(x, weight, counts, assignment_of_row, row_of, w_down.shape[2])
    again = not h.shape[0]
    if again:
        h, _ = layer.up(w_gate_up, keep=True, activate=False)
    dh, a, dweight = layer.down(grad, w_down, h, overwrite=again)
    dx, dw_gate_up, dw_down = (x.new_empty(0) for _ in range(3))
    if need_matrices:
        dw_down = grouped.dw(grad, a, layer.counts, layer.of_row, a_by=layer.by)
        dw_gate_up = grouped.dw(dh, layer.x, layer.counts, layer.of_row, b_by=layer.by)
    del a  # before dx of rows is there
    if need_x:
        dx = layer.sum(dh, w_gate_up, transposed=False)
    return dx, dweight, dw_gate_up, dw_down
