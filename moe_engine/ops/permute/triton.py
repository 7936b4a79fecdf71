"""sort_by_expert, permute and unpermute on CUDA.

Sorting is a stable counting sort in three launches and no wait for the host:

    count    each block of assignments counts its experts                     counts of blocks [blocks, E + 1]
    scan     each expert adds up its counts over the blocks before            and writes its total
    place    row = rows of the experts before + of this expert in the blocks before + in this block before

Expert E, the dropped assignments, is sorted like the others. Copies and sums of rows are one program for each block of
1,024 numbers; a sum has one writer, which adds in the order of the choices.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_engine.ops.tune import FUSED

BLOCK, SCAN, WIDE = 128, 256, 1024


@triton.jit(do_not_specialize=["total"])
def count_kernel(index, in_block, total, experts, BLOCK: tl.constexpr, E_PAD: tl.constexpr):
    """One program per block of BLOCK assignments: in_block[block, e] is how many of them chose e = 0 .. E."""
    block, e = tl.program_id(0), tl.arange(0, E_PAD)
    i = block * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(index + i, mask=i < total, other=E_PAD)
    count = tl.sum((expert[:, None] == e[None, :]).to(tl.int32), 0)
    tl.store(in_block + block * (experts + 1) + e, count, mask=e <= experts)


@triton.jit(do_not_specialize=["blocks"])
def scan_kernel(in_block, counts, blocks, experts, SCAN: tl.constexpr):
    """One program per e = 0 .. E: in_block[:, e] becomes its exclusive sum over blocks, in place; counts[e], the
    total."""
    e, before = tl.program_id(0), 0
    for first in range(0, blocks, SCAN):
        b = first + tl.arange(0, SCAN)
        at = in_block + b * (experts + 1) + e
        count = tl.load(at, mask=b < blocks, other=0)
        tl.store(at, before + tl.cumsum(count, 0) - count, mask=b < blocks)
        before += tl.sum(count, 0)
    tl.store(counts + e, before)


@triton.jit(do_not_specialize=["total"])
def place_kernel(
    index, before_block, counts, assignment_of_row, row_of, total, experts, BLOCK: tl.constexpr, E_PAD: tl.constexpr
):
    """One program per block of BLOCK assignments: the row of each, and at that row the number of the assignment."""
    block, e, j = tl.program_id(0), tl.arange(0, E_PAD), tl.arange(0, BLOCK)
    i = block * BLOCK + j
    expert = tl.load(index + i, mask=i < total, other=E_PAD)
    counts_E = tl.load(counts + e, mask=e < experts, other=0)
    start = tl.sum(tl.where(e[None, :] < expert[:, None], counts_E[None, :], 0), 1)
    here = tl.load(before_block + block * (experts + 1) + expert, mask=i < total, other=0)
    others = tl.load(index + block * BLOCK + j, mask=i < total, other=E_PAD)
    earlier = tl.sum(((others[None, :] == expert[:, None]) & (j[None, :] < j[:, None])).to(tl.int32), 1)
    row = start + here + earlier
    tl.store(row_of + i, row, mask=i < total)
    tl.store(assignment_of_row + row, i, mask=i < total)


@triton.jit(do_not_specialize=["rows"])
def permute_kernel(x, out, of_row, rows, D, BY: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr):
    """out[r] = x[of_row[r] // BY] for ROWS rows by WIDE columns a program; BY is K."""
    r, d = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    inside = (r < rows)[:, None] & (d < D)[None, :]
    token = (tl.load(of_row + r, mask=r < rows, other=0) // BY).to(tl.int64)
    values = tl.load(x + token[:, None] * D + d[None, :], mask=inside)
    tl.store(out + r.to(tl.int64)[:, None] * D + d[None, :], values, mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def unpermute_kernel(rows, out, row_of, tokens, D, BY: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr):
    """out[t] = sum of the BY rows[row_of[t, :]], in fp32, for ROWS tokens by WIDE columns a program; BY is K."""
    t, d = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    inside, at = (t < tokens)[:, None] & (d < D)[None, :], t.to(tl.int64)
    total = tl.zeros((ROWS, WIDE), tl.float32)
    for choice in tl.static_range(BY):
        row = tl.load(row_of + at * BY + choice, mask=t < tokens, other=0).to(tl.int64)
        total += tl.load(rows + row[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at[:, None] * D + d[None, :], total.to(out.dtype.element_ty), mask=inside)


def sort_by_expert(index: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """(counts_E, assignment_of_row_R, row_of_TK) int32. Inside, counts has a place E for the dropped; the result is a
    copy without it."""
    index, total = index.contiguous(), index.numel()
    blocks, e_pad = triton.cdiv(total, BLOCK), triton.next_power_of_2(num_experts + 1)
    in_block, counts = index.new_empty(blocks, num_experts + 1), index.new_empty(num_experts + 1)
    assignment_of_row, row_of = index.new_empty(total), torch.empty_like(index)
    if total:
        count_kernel[(blocks,)](index, in_block, total, num_experts, BLOCK, e_pad, **FUSED)
    scan_kernel[(num_experts + 1,)](in_block, counts, blocks, num_experts, SCAN, **FUSED)
    if total:
        place_kernel[(blocks,)](
            index, in_block, counts, assignment_of_row, row_of, total, num_experts, BLOCK, e_pad, **FUSED
        )
    return counts[:num_experts].clone(), assignment_of_row, row_of


def permute(x: Tensor, assignment_of_row: Tensor, row_of: Tensor) -> Tensor:
    """rows_RD in the dtype of x. Of row_of only K is read."""
    x, rows, D = x.contiguous(), assignment_of_row.shape[0], x.shape[1]
    out = x.new_empty(rows, D)
    if out.numel():
        grid, block = _blocks(rows, D)
        permute_kernel[grid](x, out, assignment_of_row.contiguous(), rows, D, row_of.shape[1], *block, **FUSED)
    return out


def unpermute(rows: Tensor, assignment_of_row: Tensor, row_of: Tensor) -> Tensor:
    """y_TD in the dtype of rows, summed in fp32. assignment_of_row is not read."""
    rows, (tokens, k), D = rows.contiguous(), row_of.shape, rows.shape[1]
    out = rows.new_empty(tokens, D)
    if out.numel():
        grid, block = _blocks(tokens, D)
        unpermute_kernel[grid](rows, out, row_of.contiguous(), tokens, D, k, *block, **FUSED)
    return out


def _blocks(rows: int, D: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """The grid, and rows and columns of one program: narrow rows share one."""
    wide = min(WIDE, triton.next_power_of_2(D))
    return (triton.cdiv(rows, WIDE // wide), triton.cdiv(D, wide)), (WIDE // wide, wide)
