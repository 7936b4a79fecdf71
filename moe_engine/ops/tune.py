"""Which tiles a CUDA kernel works in: measured once for each kind of launch, kept on disk, never measured again.

Tile sizes change the order in which sums are added, hence bits, so a choice has to outlive the process that made it.
Each is a small file beside the kernels that Triton has compiled (TRITON_CACHE_DIR, by default ~/.triton/cache), in the
folder moe_engine_tiles:

    experts_up-nvidia_h100_80gb_hbm3-bfloat16-4096-14336-2-rows2e11-5e0c1f2a.json      {"m": 128, "n": 128, ...}

fp32 is float32_ieee or float32_tf32, by how it is multiplied. The end of the name stands for what else decides: the
candidates and Triton's version. The first process to write a file decides for all; the others adopt what it holds. To
pin a choice, edit the file; to have the same bits on another machine of the same kind, copy the folder. Where no file
can be written a process keeps its choices to itself, and says so; a tile that was not measured is not written.
"""

import fcntl
import functools
import json
import math
import os
import re
import tempfile
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton import knobs, testing
from triton.backends.compiler import GPUTarget
from triton.errors import TritonError
from triton.runtime import driver


class Tile(NamedTuple):
    """m x n results of one program at a time (twice n in `up`: gate and up), summed k at a time in as many `stages`. A
    processor of sm_80 or sm_90 has room for `programs` of them; `group` m tiles in a row share their n tile in L2."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    programs: int = 1
    group: int = 8

    def options(self, indexed: bool = False) -> dict[str, int | bool | None]:
        """Launch options of Triton. Where the loop loads the index of what it loads, each takes half of the stages."""
        registers = 65_536 // (32 * self.warps * self.programs)  # of a thread; it can have 255
        stages = 2 * self.stages - 1 if indexed else self.stages
        return launch_options(stages, self.warps, registers if registers < 255 else None)


HOPPER = GPUTarget("cuda", 90, 32)
FUSED = {"enable_fp_fusion": True}  # said aloud: whether a * b + c is rounded once or twice is Triton's to change
INTERPRETED = Tile(16, 32, 32, 4, 1, group=2)  # small, so that small tests have several tiles in each direction


class Tiles(NamedTuple):
    """What is worth measuring: no tile that spills registers or exceeds shared memory (tools/inspect_kernels.py). The
    last of each is the smallest."""

    hopper: tuple[Tile, ...]  # sm_90 to sm_110, where a processor has 228 KiB of shared memory
    ampere: tuple[Tile, ...]  # others: NVIDIA's before and sm_120, AMD's
    single: tuple[Tile, ...]  # fp32

    def candidates(self, dtype: torch.dtype) -> tuple[Tile, ...]:
        """Those for this dtype on the GPU in use: `single` for fp32, whether multiplied exactly or as TF32."""
        if dtype == torch.float32:
            return self.single
        return self.hopper if 90 <= capability() < 120 else self.ampere


def target() -> GPUTarget:
    """What kernels are compiled for: back-end "cuda", whose arch is a number, or "hip", whose arch is a name. The
    interpreter passes for Hopper."""
    found = HOPPER if knobs.runtime.interpret else driver.active.get_current_target()
    assert found is not None
    return found


def capability() -> int:
    """90 for sm_90, 0 for AMD's."""
    return int(target().arch) if target().backend == "cuda" else 0


def launch_options(stages: int, warps: int = 4, registers: int | None = None) -> dict[str, int | bool | None]:
    """The options of a launch that the target's back-end knows. `registers`: the most of a thread, where it can be
    said. AMD's compiler takes none; it holds one block less in the 64 KiB of a processor, where 2 stages always fit."""
    if target().backend == "hip":
        return {"num_warps": warps, "num_stages": min(stages, 2), **FUSED}
    return {"num_warps": warps, "num_stages": stages, "maxnreg": registers, **FUSED}


def has_descriptors() -> bool:
    """Whether tensor descriptors are hardware (TMA); elsewhere they become loads that nothing overlaps with."""
    return capability() >= 90


def precision(dtype: torch.dtype) -> str:
    """How fp32 operands are multiplied, "ieee" or "tf32"; without effect on others."""
    allowed = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed and (capability() or target().arch == "gfx942") else "ieee"


def mixed_precision(dtype: torch.dtype) -> str:
    """How fp32 numbers are multiplied by those of a narrower dtype: by three TF32 products, good to about 1e-6, or in
    fp32 on AMD's, whose compiler does not know the former and whose matrix cores do the latter."""
    return "ieee" if dtype == torch.float32 or target().backend == "hip" else "tf32x3"


def choose(
    kernel: str, device: torch.device, dtype: torch.dtype, sizes: tuple[int, ...], rows: float, tiles: Tiles,
    run: Callable[[Tile], object],
) -> Tile:  # fmt: skip
    """The tile for launches of this kind. `rows`: rows per expert, told apart by powers of two; run(tile) launches.

    Nothing can be measured while a CUDA graph is captured: without a choice from before, the first candidate serves
    that capture alone."""
    if knobs.runtime.interpret:
        return INTERPRETED
    candidates = tiles.candidates(dtype)
    numbers = str(dtype).removeprefix("torch.") + (f"_{precision(dtype)}" if dtype == torch.float32 else "")
    path = _path(kernel, device, numbers, sizes, max(0, round(math.log2(max(rows, 1)))), candidates)
    if path not in _chosen():
        tile = _read(path)
        if tile is None and torch.cuda.is_current_stream_capturing():
            return candidates[0]
        _chosen()[path] = tile or _measure(path, candidates, run)
    return _chosen()[path]


@functools.cache
def _chosen() -> dict[Path, Tile]:
    """What this process has chosen or read so far."""
    return {}


@functools.cache
def _path(
    kernel: str, device: torch.device, numbers: str, sizes: tuple[int, ...], log2_rows: int,
    candidates: tuple[Tile, ...],
) -> Path:  # fmt: skip
    gpu = re.sub(r"[^a-z0-9]+", "_", torch.cuda.get_device_name(device).lower())
    rest = zlib.crc32(repr((triton.__version__, candidates)).encode())
    parts = [kernel, gpu, numbers, *map(str, sizes), f"rows2e{log2_rows}", f"{rest:08x}"]
    return Path(knobs.cache.dir) / "moe_engine_tiles" / ("-".join(parts) + ".json")


def _read(path: Path) -> Tile | None:
    """What the file says; None if there is none or it is damaged."""
    try:
        tile = Tile(**json.loads(path.read_text()))
        return tile if min(tile) > 0 else None
    except (OSError, ValueError, TypeError):
        return None


def _measure(path: Path, candidates: tuple[Tile, ...], run: Callable[[Tile], object]) -> Tile:
    """The fastest candidate that runs, or what another process has written by then; the last one if none runs."""
    milliseconds, failure = dict[Tile, float](), ""
    for tile in candidates:
        try:
            milliseconds[tile] = _milliseconds(tile, run)
        except (TritonError, RuntimeError) as error:  # out of memory, or a pass of the compiler that fails
            failure = f"{type(error).__name__}: {error}"
    if milliseconds:
        return _store(path, min(milliseconds, key=milliseconds.__getitem__))
    stored = _read(path)
    if stored is None:
        _warn(f"no tile of {path.stem} could be measured ({failure}): this process takes {candidates[-1]}, unwritten")
    return stored or candidates[-1]


def _milliseconds(tile: Tile, run: Callable[[Tile], object]) -> float:
    return float(testing.do_bench(lambda: run(tile), warmup=5, rep=30, return_mode="median"))  # pyright: ignore[reportArgumentType]


def _store(path: Path, tile: Tile) -> Tile:
    """Write the file whole, unless another process was first: what it wrote is returned then."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix="draft-") as folder:
            draft = Path(folder) / path.name
            draft.write_text(json.dumps(tile._asdict()))
            draft.chmod(0o644)  # the folder may serve several users
            try:
                os.link(draft, path)
            except FileExistsError:
                _replace_if_damaged(path, draft)
    except OSError as error:
        _warn(
            f"{path.parent} cannot keep the tiles of kernels ({error}): each process measures them again, and may "
            "choose others and give other last bits. Set TRITON_CACHE_DIR to a folder that can be written to"
        )
    return _read(path) or tile


def _replace_if_damaged(path: Path, draft: Path) -> None:
    """Of the processes that find the same damaged file, the one that locks it first replaces it; to the others it is
    whole then."""
    with path.open("r+") as file:  # NFS locks only what could be written
        fcntl.flock(file, fcntl.LOCK_EX)
        if _read(path) is None:
            os.replace(draft, path)


def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=3)
