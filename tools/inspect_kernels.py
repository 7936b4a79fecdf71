"""What the compiler makes of the Triton kernels, without a GPU: `python tools/inspect_kernels.py [--arch 80 90]`

Every kernel of the ops, in every tile that could be chosen for it, is compiled for sm_80 and sm_90 by the launches that
a training step would make, and its machine code is read. A row is one kernel in one tile:

    tile            m x n x k, warps, stages, and programs that run on a processor at once
    regs, spills    registers of a thread, and stores of those that found no room
    shared          bytes of shared memory
    HGMMA HMMA      tensor-core instructions of Hopper (wgmma) and Ampere (mma.sync)
    TMA cp.async    loads that overlap with them: bulk by descriptor, 16 bytes by address
    loop            instructions of the loop over products, those two among them
    stalls          of these, what keeps the next product waiting: loads into registers, stores to shared memory,
                    spills, and waits for the last product rather than the one before

The exit code is 1 if a kernel spills, has more programs than there is room for, or multiplies 16-bit matrices without
tensor cores or with stalls in the loop. Widths that are no multiple of 16 (--sizes) must compile and are not judged:
their rows are loaded one number at a time, which is slow and spills. Compiled code lands in Triton's cache, so that a
second run is quick. Bandwidth and speed take a GPU: tools/bench_kernels.py.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

SHARED_BYTES = {80: 167_936, 90: 233_472}  # of a processor: 164 and 228 KiB, of which each program takes 1 for itself
REGISTERS = 65_536  # of a processor
MATRIX_KERNELS = ("up_kernel", "down_kernel", "matmul_kernel", "dw_kernel", "router_logits_kernel")
STALLS = r"\b(LDG|STS|LDL|STL)\b|WARPGROUP\.DEPBAR\.LE gsb0, 0x0"


class Row(NamedTuple):
    """One compiled kernel."""

    arch: int
    kernel: str
    flags: str
    dtype: str
    tile: str
    programs: int
    warps: int
    regs: int
    spills: int
    shared: int
    hgmma: int
    hmma: int
    tma: int
    cp_async: int
    loop: int
    stalls: int

    def problem(self) -> str | None:
        if self.spills:
            return f"{self.spills} spills"
        if self.programs * (self.shared + 1024) > SHARED_BYTES[self.arch]:
            return f"no room in shared memory: {SHARED_BYTES[self.arch]} bytes"
        if self.programs * self.warps * 32 * (-(-self.regs // 8) * 8) > REGISTERS:
            return "no room in registers"
        # m = 32 is below what wgmma takes (64 rows): such tiles multiply by mma.sync on Hopper too
        wanted = self.hgmma if self.arch >= 90 and not self.tile.startswith("32x") else self.hmma
        if self.kernel not in MATRIX_KERNELS or self.dtype == "float32":
            return None
        if not wanted or not self.loop:
            return "no tensor-core instruction" if not wanted else "no loop over products"
        return f"{self.stalls} stalls" if self.stalls else None


def compile_all(arch: int, dtype_name: str, names: list[str], sizes: list[int]) -> list[Row]:
    """Compile what the named ops launch; in a process of its own, because some compiler errors abort it."""
    import torch
    import triton
    from triton.runtime.jit import JITFunction

    from moe_engine.ops import tune

    triton.runtime.driver.set_active(offline_driver(arch))
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
        rows.append(Row(arch, self.__name__, flags, dtype_name, text, programs, *machine_code(compiled)))
        return compiled

    def every_tile(kernel: str, device: Any, dtype: Any, sizes: Any, rows_per_expert: Any, tiles: Any, run: Any) -> Any:
        candidates = tiles.single if dtype == torch.float32 else tiles.hopper if arch >= 90 else tiles.ampere
        for tile in candidates:
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


def offline_driver(arch: int) -> Any:
    """A driver for Triton that knows its target and has no device."""
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase

    class Offline(DriverBase):
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device=0: 0)

        def __init__(self) -> None:  # the base class asks for a device
            pass

        @classmethod
        def is_active(cls) -> bool:
            return False

        def map_python_to_cpp_type(self, ty: str) -> str:
            return ty

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", arch, 32)

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

        def get_benchmarker(self) -> Any:
            raise RuntimeError("there is no device to measure on")

    return Offline()


def machine_code(compiled: Any) -> tuple[int, ...]:
    """The numbers of a Row from warps on for a compiled kernel, by the disassemblers in Triton's wheel."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run([str(tools / tool), *flags, file.name], capture_output=True, text=True, check=True).stdout
            for tool, *flags in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c", "-ndf"))
        )
    found = re.search(r"REG:(\d+)", usage)
    assert found, usage
    codes = ("STL", "HGMMA", "HMMA", "UTMALDG", "LDGSTS")
    spills, *others = (len(re.findall(rf"\b{code}\b", sass)) for code in codes)
    loop = loop_of_products(sass)
    stalls = sum(re.search(STALLS, line) is not None for line in loop)
    return compiled.metadata.num_warps, int(found[1]), spills, compiled.metadata.shared, *others, len(loop), stalls


def loop_of_products(sass: str) -> list[str]:
    """The instructions of the shortest loop with tensor-core instructions in it; none if there is no such loop."""
    code, labels, loops = list[str](), dict[str, int](), list[list[str]]()
    for label, instruction in re.findall(r"^(\.L_x_\d+):|^\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", sass, re.MULTILINE):
        if label:
            labels[label] = len(code)
            continue
        code.append(instruction)
        back = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", instruction)
        if back and back[1] in labels:
            loops.append(code[labels[back[1]] :])
    return min((loop for loop in loops if re.search(r"\bHG?MMA\b", " ".join(loop))), key=len, default=[])


def in_own_process(arch: int, dtype: str, names: list[str], sizes: list[int]) -> list[Row]:
    """compile_all in a child; its report comes back as JSON on the last line."""
    command = [sys.executable, __file__, "--child", "--arch", str(arch), "--dtype", dtype, "--ops", *names]
    command += ["--sizes", *map(str, sizes)]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    child = subprocess.run(command, capture_output=True, text=True, env=environment)
    if child.returncode:
        raise SystemExit(
            f"error: compiling {' '.join(names) or 'the ops'} for sm_{arch}, {dtype}:\n{child.stderr[-3000:]}"
        )
    return [Row(*row) for row in json.loads(child.stdout.splitlines()[-1])]


def main() -> int:
    from moe_engine.config import torch_dtype

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", choices=sorted(SHARED_BYTES), default=sorted(SHARED_BYTES))
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
    parser.add_argument("--json", type=Path, help="also write the rows here")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(compile_all(options.arch[0], options.dtype[0], options.ops, options.sizes)))
        return 0
    jobs = [(arch, dtype) for arch in options.arch for dtype in options.dtype]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        parts = pool.map(lambda job: in_own_process(job[0], job[1], options.ops, options.sizes), jobs)
        rows = [row for part in parts for row in part]
    judged = all(width % 16 == 0 for width in options.sizes[1:3])
    name = max(len(f"{row.kernel} {row.flags}") for row in rows)
    print(f"{'':5} {'kernel':{name}} {'dtype':8} {'tile':20} regs spills shared HGMMA HMMA TMA cp.async loop stalls")
    for row in rows:
        print(
            f"sm_{row.arch} {f'{row.kernel} {row.flags}':{name}} {row.dtype:8} {row.tile:20} {row.regs:4} "
            f"{row.spills:6} {row.shared:6} {row.hgmma:5} {row.hmma:4} {row.tma:3} {row.cp_async:8} {row.loop:4} "
            f"{row.stalls:6}",
            (judged and row.problem()) or "",
        )
    problems = sum(row.problem() is not None for row in rows) if judged else 0
    print(f"kernels {len(rows)}, problems {problems}")
    if options.json:
        options.json.write_text(json.dumps([row._asdict() for row in rows], indent=1))
    return int(problems > 0)


if __name__ == "__main__":
    sys.exit(main())
