"""grouped_mm on CUDA: two kernels, which `experts` builds on too.

    matmul    out[rows of e] = a[rows of e] @ b[e]          tiles of rows never cross an expert
    dw        out[e] = a[rows of e].T @ b[rows of e]        sums over an expert's rows, of any number

Programs are persistent and find their tiles in the counts on the device, so nothing waits for the host. Tiles are
taken m first within a group of m tiles, so that the tile of b that they share stays in L2. The rows past sum(counts)
are those of one more expert, whose sums have no terms: they become zeros. In `matmul` descriptors (TMA on Hopper,
plain addresses before) carry operands whose sizes allow it; others go through masked pointers. Sums are fp32; for fp32
operands torch.set_float32_matmul_precision chooses between exact products ("highest", the default) and TF32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from moe_engine.ops import tune
from moe_engine.ops.tune import Tile, Tiles

MATMUL = Tiles(
    hopper=(
        Tile(128, 256, 64, 8, 4), Tile(256, 128, 64, 8, 4), Tile(128, 128, 64, 8, 3, 2), Tile(64, 256, 64, 4, 4),
        Tile(64, 128, 64, 4, 4, 2), Tile(32, 128, 64, 4, 4, 2),
    ),
    ampere=(
        Tile(128, 256, 32, 8, 3), Tile(128, 128, 64, 8, 3), Tile(128, 128, 32, 4, 4, 2), Tile(64, 128, 32, 4, 4, 2),
        Tile(32, 128, 64, 4, 3, 2),
    ),
    single=(Tile(32, 64, 32, 4, 3, 2), Tile(32, 32, 32, 4, 3, 2)),
)  # fmt: skip
DW = Tiles(
    hopper=(
        Tile(128, 256, 64, 8, 4), Tile(256, 128, 64, 8, 4), Tile(128, 128, 64, 8, 3, 2), Tile(64, 128, 64, 4, 4, 2),
    ),
    ampere=(Tile(128, 128, 64, 8, 3), Tile(128, 128, 32, 8, 4), Tile(64, 128, 32, 8, 4, 2)),
    single=(Tile(64, 64, 16, 8, 3), Tile(32, 64, 16, 4, 3, 2)),
)  # fmt: skip


@triton.jit
def experts_of(counts, rows, experts, m: tl.constexpr, E_PAD: tl.constexpr):
    """First row, end and last tile + 1 of each expert; expert number `experts` has the rows past the counts."""
    e = tl.arange(0, E_PAD)
    count_E = tl.load(counts + e, mask=e < experts, other=0)
    count_E = tl.where(e == experts, rows - tl.sum(count_E, 0), count_E)
    end_E = tl.cumsum(count_E, 0)
    return end_E - count_E, end_E, tl.cumsum(tl.cdiv(count_E, m), 0)


@triton.jit
def locate(tile, n_tiles, start_E, end_E, tiles_E, m: tl.constexpr, group: tl.constexpr, E_PAD: tl.constexpr):
    """Tile number -> expert, first row, the expert's end, column tile."""
    m_tiles = tl.max(tiles_E, 0)
    first = tile // (group * n_tiles) * group
    among, within = tl.minimum(m_tiles - first, group), tile % (group * n_tiles)
    m_tile = first + within % among
    e = tl.sum((tiles_E <= m_tile).to(tl.int32), 0)
    here = tl.arange(0, E_PAD) == e
    start, end = tl.sum(tl.where(here, start_E, 0), 0), tl.sum(tl.where(here, end_E, 0), 0)
    last = tl.sum(tl.where(here, tiles_E, 0), 0)
    return e, start + (m_tile - last + tl.cdiv(end - start, m)) * m, end, within // among


@triton.jit
def block(source, row, column, rows, columns, R: tl.constexpr, C: tl.constexpr, TMA: tl.constexpr):
    """source[row : row + R, column : column + C], zeros past its edges. A descriptor if TMA, else a pointer."""
    if TMA:
        return source.load([row, column])
    else:
        r, c = row + tl.arange(0, R), column + tl.arange(0, C)
        inside = (r < rows)[:, None] & (c < columns)[None, :]
        return tl.load(source + r.to(tl.int64)[:, None] * columns + c[None, :], mask=inside, other=0.0)


@triton.jit(do_not_specialize=["rows"])
def matmul_kernel(
    a, b, out, counts, of_row, rows, experts, N, K,
    TRANSPOSED: tl.constexpr, SCATTER: tl.constexpr, TMA: tl.constexpr, E_PAD: tl.constexpr, PRECISION: tl.constexpr,
    m: tl.constexpr, n: tl.constexpr, k: tl.constexpr, group: tl.constexpr,
):  # fmt: skip
    """out[R, N] = a[R, K] times the matrix of the row's expert, m x n at a time; b is [E * N, K] if TRANSPOSED, else
    [E * K, N]. With SCATTER row r goes to out[of_row[r]]."""
    start_E, end_E, tiles_E = experts_of(counts, rows, experts, m, E_PAD)
    n_tiles = tl.cdiv(N, n)
    for tile in tl.range(tl.program_id(0), tl.max(tiles_E, 0) * n_tiles, tl.num_programs(0)):
        e, row, end, n_tile = locate(tile, n_tiles, start_E, end_E, tiles_E, m, group, E_PAD)
        steps = tl.where(e < experts, tl.cdiv(K, k), 0)
        sums = tl.zeros((m, n), tl.float32)
        for step in range(steps):
            left = block(a, row, step * k, rows, K, m, k, TMA)
            if TRANSPOSED:
                right = block(b, e * N + n_tile * n, step * k, experts * N, K, n, k, TMA).T
            else:
                right = block(b, e * K + step * k, n_tile * n, e * K + K, N, k, n, TMA)
            sums = tl.dot(left, right, sums, input_precision=PRECISION)
        r, c = row + tl.arange(0, m), n_tile * n + tl.arange(0, n)
        there = r < end
        if SCATTER:
            r = tl.load(of_row + r, mask=there, other=0)
        to = out + r.to(tl.int64)[:, None] * N + c[None, :]
        tl.store(to, sums.to(out.dtype.element_ty), mask=there[:, None] & (c < N)[None, :])


@triton.jit
def dw_kernel(
    a, b, out, counts, of_row, experts, N: tl.constexpr, K: tl.constexpr,
    A_BY: tl.constexpr, B_BY: tl.constexpr, E_PAD: tl.constexpr, PRECISION: tl.constexpr,
    m: tl.constexpr, n: tl.constexpr, k: tl.constexpr, group: tl.constexpr,
):  # fmt: skip
    """out[E, N, K], m x n of one expert at a time, summed k rows a step. A_BY and B_BY: how rows of a and b are found
    (`offsets`)."""
    e_E = tl.arange(0, E_PAD)
    count_E = tl.load(counts + e_E, mask=e_E < experts, other=0)
    m_tiles, n_tiles = tl.cdiv(N, m), tl.cdiv(K, n)
    for tile in tl.range(tl.program_id(0), experts * m_tiles * n_tiles, tl.num_programs(0)):
        e, within = tile // (m_tiles * n_tiles), tile % (m_tiles * n_tiles)
        first = within // (group * n_tiles) * group
        among, within = tl.minimum(m_tiles - first, group), within % (group * n_tiles)
        row = tl.sum(tl.where(e_E < e, count_E, 0), 0)
        end = row + tl.sum(tl.where(e_E == e, count_E, 0), 0)
        i = (first + within % among) * m + tl.arange(0, m)
        j = within // among * n + tl.arange(0, n)
        sums = tl.zeros((m, n), tl.float32)
        for at in range(row, end, k):
            r = at + tl.arange(0, k)
            there = r < end
            left = tl.load(
                a + offsets(r, there, of_row, N, A_BY)[None, :] + i[:, None],
                mask=there[None, :] & (i < N)[:, None], other=0.0,
            )  # fmt: skip
            right = tl.load(
                b + offsets(r, there, of_row, K, B_BY)[:, None] + j[None, :],
                mask=there[:, None] & (j < K)[None, :], other=0.0,
            )  # fmt: skip
            sums = tl.dot(left, right, sums, input_precision=PRECISION)
        to = out + (tl.cast(e, tl.int64) * N + i)[:, None] * K + j[None, :]
        tl.store(to, sums.to(out.dtype.element_ty), mask=(i < N)[:, None] & (j < K)[None, :])


@triton.jit
def offsets(r, there, of_row, width: tl.constexpr, BY: tl.constexpr):
    """Where rows r begin: in place for BY 0, else at the token of their assignment among BY choices a token."""
    if BY:
        r = tl.load(of_row + r, mask=there, other=0) // BY
    return r.to(tl.int64) * width


def programs(device: torch.device, tiles: int, each: int) -> tuple[int]:
    """The grid of a persistent kernel that has at most `tiles` tiles to work on, `each` programs a processor."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
    return (max(1, min(tiles, processors * each)),)


def descriptors_can(*operands: Tensor) -> bool:
    """Whether the operands can go through descriptors: 16-byte addresses and row lengths."""
    aligned = all(x.data_ptr() % 16 == 0 and x.shape[-1] * x.element_size() % 16 == 0 for x in operands)
    return aligned and all(x.numel() for x in operands) and tune.has_descriptors()


def padded(experts: int) -> int:
    """A power of two with room for one expert more than there are."""
    return triton.next_power_of_2(experts + 1)


def matmul(a: Tensor, b: Tensor, counts: Tensor, transposed: bool, of_row: Tensor | None = None) -> Tensor:
    """out[R, N]: rows a[R, K] times b[E, K, N], or b[E, N, K] transposed; row r lands in out[of_row[r]] if given."""
    a, b, counts = a.contiguous(), b.contiguous(), counts.contiguous()
    of_row = None if of_row is None else of_row.contiguous()
    (rows, K), experts, N = a.shape, b.shape[0], b.shape[1 if transposed else 2]
    out = a.new_empty(rows, N)

    def run(tile: Tile) -> None:
        # a descriptor gives zeros past the last dimension, K of both if transposed; else b goes on with the next expert
        tma = (transposed or K % tile.k == 0) and descriptors_can(a, b)
        left, right = a, b.view(-1, b.shape[2])
        if tma:
            left = TensorDescriptor.from_tensor(left, [tile.m, tile.k])
            right = TensorDescriptor.from_tensor(right, [tile.n, tile.k] if transposed else [tile.k, tile.n])
        tiles = (triton.cdiv(rows, tile.m) + experts) * triton.cdiv(N, tile.n)
        matmul_kernel[programs(a.device, tiles, tile.programs)](
            left, right, out, counts, counts if of_row is None else of_row, rows, experts, N, K, transposed,
            of_row is not None, tma, padded(experts), tune.precision(a.dtype),
            *tile[:3], tile.group, **tile.options(),
        )  # fmt: skip

    if rows and N:
        name = "grouped_mm" if transposed else "grouped_mm_dx"
        run(tune.choose(name, a.device, a.dtype, (N, K), rows / experts, MATMUL, run))
    return out


def dw(a: Tensor, b: Tensor, counts: Tensor, of_row: Tensor, a_by: int = 0, b_by: int = 0) -> Tensor:
    """out[E, N, K] = a[rows of e].T @ b[rows of e]. With a_by = k, row r of a is a[of_row[r] // k]; b_by likewise."""
    a, b, counts, of_row = a.contiguous(), b.contiguous(), counts.contiguous(), of_row.contiguous()
    N, K, experts = a.shape[1], b.shape[1], counts.shape[0]
    out = a.new_empty(experts, N, K)

    def run(tile: Tile) -> None:
        tiles = experts * triton.cdiv(N, tile.m) * triton.cdiv(K, tile.n)
        dw_kernel[programs(a.device, tiles, tile.programs)](
            a, b, out, counts, of_row, experts, N, K, a_by, b_by, padded(experts), tune.precision(a.dtype),
            *tile[:3], tile.group, **tile.options(indexed=bool(a_by or b_by)),
        )  # fmt: skip

    if N and K:
        sizes = (N, K, a_by, b_by)
        rows = max(a.shape[0], b.shape[0]) / experts
        run(tune.choose("grouped_mm_dw", a.device, a.dtype, sizes, rows, DW, run))
    return out


def grouped_mm(x: Tensor, w: Tensor, counts: Tensor) -> Tensor:
    """y_RN = x_RK times w_ENK transposed, in the dtype of x."""
    return matmul(x, w, counts, transposed=True)


def grouped_mm_dx(grad: Tensor, w: Tensor, counts: Tensor) -> Tensor:
    """dx_RK = grad_RN times w_ENK, in the dtype of grad."""
    return matmul(grad, w, counts, transposed=False)


def grouped_mm_dw(grad: Tensor, x: Tensor, counts: Tensor) -> Tensor:
    """dw_ENK from grad_RN and x_RK, in the dtype of grad."""
    return dw(grad, x, counts, of_row=counts)  # not read
