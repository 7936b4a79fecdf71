"""What the compiler makes of the Triton kernels, without a GPU: `python tools/inspect_kernels.py [--targets gfx942]`

Every kernel of the ops, in every tile that could be chosen for it, is compiled for sm_80 and sm_90, or the targets
named, by the launches that a training step would make, and its machine code is read. A row is one kernel in one tile:

    tile            m x n x k, warps, stages, and programs that run on a processor at once
    regs, spills    registers of a thread, and stores of those that found no room
    shared          bytes of shared memory
    HGMMA HMMA MMA  tensor-core instructions of Hopper (wgmma), Ampere (mma.sync), and Blackwell (tcgen05) or AMD (mfma)
    TMA cp.async    loads that overlap with them: bulk by descriptor, 16 bytes by address
    loop            instructions of the loop over products, those two among them
    stalls          of these, what keeps the next product waiting: loads into registers, stores to shared memory,
                    spills, and waits for the last product rather than the one before

The exit code is 1 if a kernel spills, has more programs than there is room for, or multiplies 16-bit matrices without
tensor cores; on sm_80 and sm_90 also with stalls in the loop. On other targets a program alone has to fit. Widths that
are no multiple of 16 (--sizes) must compile and are not judged: their rows are loaded one number at a time, which is
slow and spills. `--targets --markdown` prints the table of docs/kernels.md: every kernel on every target. Compiled code
lands in Triton's cache, so that a second run is quick. Bandwidth and speed take a GPU: tools/bench_kernels.py.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from moe_engine.host.console import run_program  # noqa: E402
from tools.kernels.targets import TARGETS, Usage, offline_driver, usage  # noqa: E402

MATRIX_KERNELS = ("up_kernel", "down_kernel", "matmul_kernel", "dw_kernel", "router_logits_kernel")
STUDIED = ("sm_80", "sm_90")  # whose loops are read


class Row(NamedTuple):
    """One compiled kernel."""

    target: str
    kernel: str
    flags: str
    dtype: str
    tile: str
    programs: int
    used: Usage

    def problem(self) -> str | None:
        target, used = TARGETS[self.target], self.used
        programs = self.programs if self.target in STUDIED else 1
        if used.spills:
            return f"{used.spills} spills"
        if programs * (used.shared + target.reserved) > target.shared:
            return f"no room in shared memory: {target.shared} bytes"
        if programs * used.warps * target.warp_size * (-(-used.regs // 8) * 8) > target.registers:
            return "no room in registers"
        if self.kernel not in MATRIX_KERNELS or self.dtype == "float32":
            return None
        # m = 32 is below what wgmma takes (64 rows): such tiles multiply by mma.sync on Hopper too
        wgmma = self.target == "sm_90" and not self.tile.startswith("32x")
        if not (used.hgmma if wgmma else used.hgmma + used.hmma + used.mma):
            return "no tensor-core instruction"
        if self.target not in STUDIED:
            return None
        if not used.loop:
            return "no loop over products"
        return f"{used.stalls} stalls" if used.stalls else None


def compile_all(target: str, dtype_name: str, names: list[str], sizes: list[int], most: int | None) -> list[Row]:
    """Compile what the named ops launch; in a process of its own, because some compiler errors abort it."""
    import torch
    import triton
    from triton.runtime.jit import JITFunction

    from moe_engine.ops import tune

    triton.runtime.driver.set_active(offline_driver(TARGETS[target]))
    rows: list[Row] = []
    tile_now: list[tune.Tile | None] = [None]
    compile_or_launch, seen = JITFunction.run, set[int]()

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled = compile_or_launch(self, *args, grid=grid, warmup=True, **options)
        if id(compiled) in seen:  # Triton keeps what it has compiled
            return compiled
        seen.add(id(compiled))
        values = dict(zip(self.arg_names, args, strict=False))
        flags = " ".join(name.lower() for name, value in values.items() if value is True)
        tile = tile_now[0]
        text, programs = ("{}x{}x{} w{} s{} p{}".format(*tile), tile.programs) if tile else ("", 1)
        rows.append(Row(target, self.__name__, flags, dtype_name, text, programs, usage(compiled)))
        return compiled

    def every_tile(kernel: str, device: Any, dtype: Any, sizes: Any, rows_per_expert: Any, tiles: Any, run: Any) -> Any:
        candidates = tiles.candidates(dtype)
        for tile in candidates[:most]:
            tile_now[0] = tile
            run(tile)
        tile_now[0] = None
        return candidates[0]

    JITFunction.run, tune.choose = compile_only, every_tile
    for name, launch in launches(getattr(torch, dtype_name), *sizes):
        if name in names or not names:
            launch()
    return rows


def launches(dtype: Any, tokens: int, d: int, f: int, e: int, k: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """Every op's launches at these sizes; the contents do not matter."""
    import torch

    from moe_engine.ops.cross_entropy import triton as cross_entropy
    from moe_engine.ops.experts import triton as experts
    from moe_engine.ops.grouped_mm import triton as grouped
    from moe_engine.ops.permute import triton as permute
    from moe_engine.ops.router_logits import triton as router_logits
    from moe_engine.ops.router_topk import triton as router_topk
    from moe_engine.ops.swiglu import triton as swiglu

    x, h = torch.zeros(tokens, d, dtype=dtype), torch.zeros(tokens * k, 2 * f, dtype=dtype)
    w_in, w_out = torch.zeros(e, 2 * f, d, dtype=dtype), torch.zeros(e, d, f, dtype=dtype)
    weight, index = torch.zeros(tokens, k), torch.zeros(tokens, k, dtype=torch.int32)
    counts, of_row = index.new_zeros(e), index.new_zeros(tokens * k)
    probs, lse, label = torch.zeros(tokens, e), torch.zeros(tokens), torch.zeros(tokens, dtype=torch.int64)
    layer = (x, weight, w_in, w_out, counts, of_row, index)
    yield "experts", lambda: experts.experts(*layer, True)
    yield "experts", lambda: experts.experts(*layer, False)
    yield "experts", lambda: experts.experts_backward(x, *layer, h, True, True)
    yield "experts", lambda: experts.experts_backward(x, *layer, h[:0], False, False)
    alone = (x.new_zeros(tokens * k, d), weight.view(-1, 1), w_in, w_out, counts, of_row, of_row[:, None])
    yield "experts", lambda: experts.experts_backward(alone[0], *alone, h, True, True)
    yield "experts", lambda: experts.experts(*alone, True)
    yield "grouped_mm", lambda: grouped.grouped_mm_dw(h, h, counts)
    yield "permute", lambda: permute.sort_by_expert(index, e)
    yield "permute", lambda: permute.permute(x, of_row, index)
    yield "swiglu", lambda: swiglu.swiglu_backward(swiglu.swiglu(h), h)
    yield "router_logits", lambda: router_logits.router_logits_backward(probs, x, w_in[0, :e], True, True)
    yield "router_logits", lambda: router_logits.router_logits(x, w_in[0, :e])
    for renormalize in (False, True):
        yield "router_topk", lambda r=renormalize: router_topk.router_topk(probs, k, r, lse[:e])
        yield "router_topk", lambda r=renormalize: router_topk.router_topk_backward(weight, probs, lse, index, probs, r)
    yield "cross_entropy", lambda: cross_entropy.cross_entropy_stats(x, label, 0)
    yield "cross_entropy", lambda: cross_entropy.cross_entropy_grad(x, label, 0, lse, lse)


def in_own_process(target: str, dtype: str, names: list[str], sizes: list[int], most: int | None) -> list[Row]:
    """compile_all in a child; its report comes back as JSON on the last line."""
    command = [sys.executable, __file__, "--child", "--targets", target, "--dtype", dtype, "--ops", *names]
    command += ["--sizes", *map(str, sizes), *(["--tiles", str(most)] if most else [])]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    child = subprocess.run(command, capture_output=True, text=True, env=environment)
    if child.returncode:
        what = " ".join(names) or "the ops"
        raise SystemExit(f"error: compiling {what} for {target}, {dtype}:\n{child.stderr[-3000:]}")
    return [Row(*row, used=Usage(*used)) for *row, used in json.loads(child.stdout.splitlines()[-1])]


def print_rows(rows: list[Row], judged: bool) -> None:
    name = max(len(f"{row.kernel} {row.flags}") for row in rows)
    print(
        f"{'':6} {'kernel':{name}} {'dtype':8} {'tile':20} regs spills shared HGMMA HMMA MMA TMA cp.async loop stalls"
    )
    for row in rows:
        used = row.used
        print(
            f"{row.target:6} {f'{row.kernel} {row.flags}':{name}} {row.dtype:8} {row.tile:20} {used.regs:4} "
            f"{used.spills:6} {used.shared:6} {used.hgmma:5} {used.hmma:4} {used.mma:3} {used.tma:3} "
            f"{used.cp_async:8} {used.loop:4} {used.stalls:6}",
            (judged and row.problem()) or "",
        )


def print_table(rows: list[Row]) -> None:
    """A line for each kernel and dtype; for each target the most registers and shared memory of its tiles, and how many
    of them have a problem."""
    targets = list(dict.fromkeys(row.target for row in rows))
    print(f"| Triton {version('triton')} | dtype | {' | '.join(targets)} |")
    print("|---" * (2 + len(targets)) + "|")
    for kernel, dtype in sorted({(row.kernel, row.dtype) for row in rows}):
        cells = []
        for target in targets:
            here = [row for row in rows if (row.target, row.kernel, row.dtype) == (target, kernel, dtype)]
            regs, shared = max(row.used.regs for row in here), max(row.used.shared for row in here)
            problems = [problem.lstrip("0123456789 ") for row in here if (problem := row.problem())]
            found = "".join(f"; {problems.count(p)} of {len(here)}: {p}" for p in dict.fromkeys(problems))
            cells.append(f"{regs}, {-(-shared // 1024)} KiB{found}")
        print(f"| {kernel.removesuffix('_kernel')} | {dtype} | {' | '.join(cells)} |")


def arguments() -> argparse.Namespace:
    from moe_engine.config import torch_dtype

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--targets", nargs="*", choices=[*TARGETS], default=STUDIED,
        help=f"GPUs to compile for: some of {' '.join(TARGETS)}, or all if none is named (default: sm_80 sm_90)",
    )  # fmt: skip
    parser.add_argument(
        "--dtype",
        nargs="+",
        type=torch_dtype,
        choices=["bfloat16", "float16", "float32"],
        default=["bfloat16", "float32"],
    )
    folders = sorted(path.parent.name for path in (ROOT / "moe_engine" / "ops").glob("*/triton.py"))
    parser.add_argument("--ops", nargs="*", choices=folders, default=[], help="names of op folders; all by default")
    parser.add_argument(
        "--sizes", type=int, nargs=5, metavar=("TOKENS", "D", "F", "EXPERTS", "K"), default=[512, 1024, 512, 256, 8],
        help="sizes to compile for; all but dw_kernel tell apart 1, multiples of 16, and the rest "
        "(default: 512 1024 512 256 8)",
    )  # fmt: skip
    parser.add_argument("--tiles", type=int, metavar="N", help="compile the first N tiles of a kernel (default: all)")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    parser.add_argument("--markdown", action="store_true", help="print a table of kernels and targets, as in the docs")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    options = arguments()
    if options.child:
        print(json.dumps(compile_all(options.targets[0], options.dtype[0], options.ops, options.sizes, options.tiles)))
        return 0
    jobs = [(target, dtype) for target in options.targets or TARGETS for dtype in options.dtype]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        parts = pool.map(lambda job: in_own_process(job[0], job[1], options.ops, options.sizes, options.tiles), jobs)
        rows = [row for part in parts for row in part]
    judged = all(width % 16 == 0 for width in options.sizes[1:3])
    problems = sum(row.problem() is not None for row in rows) if judged else 0
    if options.json:
        options.json.write_text(json.dumps([row._asdict() | row.used._asdict() for row in rows], indent=1))
    if options.markdown:
        print_table(rows)
    else:
        print_rows(rows, judged)
        print(f"kernels {len(rows)}, problems {problems}")
    return int(problems > 0)


if __name__ == "__main__":
    run_program(main)
