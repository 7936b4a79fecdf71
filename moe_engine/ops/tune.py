"""Which tiles a CUDA kernel works in: measured once for each kind of launch, kept on disk, never measured again.

Tile sizes change the order in which sums are added, hence bits, so a choice has to outlive the process that made it.
Each is a small file beside the kernels that Triton has compiled (TRITON_CACHE_DIR, by default ~/.triton/cache), in the
folder moe_engine_tiles:

    experts_up-nvidia_h100_80gb_hbm3-bfloat16-4096-14336-2-rows2e11-5e0c1f2a.json      {"m": 128, "n": 128, ...}

The end of the name stands for what else decides: the candidates and Triton's version. The first process to write a file
decides for all; the others adopt what it holds. To pin a choice, edit the file; to have the same bits on another
machine of the same kind, copy the folder. Where no file can be written a process keeps its choices to itself, and says
so.
"""

import contextlib
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
from triton.errors import TritonError
from triton.runtime import driver


class Tile(NamedTuple):
    """m x n results of one program at a time, summed k at a time; `group` m tiles in a row share their n tile in L2."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    group: int = 8

    def options(self, extra_stages: int = 0) -> dict[str, int | bool]:
        """Launch options of Triton."""
        return {"num_warps": self.warps, "num_stages": self.stages + extra_stages, **FUSED}


FUSED = {"enable_fp_fusion": True}  # said aloud: whether a * b + c is rounded once or twice is Triton's to change
INTERPRETED = Tile(16, 32, 32, 4, 1, 2)  # small, so that small tests have several tiles in each direction


class Tiles(NamedTuple):
    """What is worth measuring: no tile that spills registers or exceeds shared memory (tools/inspect_kernels.py)."""

    hopper: tuple[Tile, ...]  # sm_90 and later, descriptors
    ampere: tuple[Tile, ...]  # sm_80 to sm_89, pointers
    single: tuple[Tile, ...]  # fp32


def has_descriptors() -> bool:
    """Whether tensor descriptors are hardware (TMA); before Hopper they become loads that nothing overlaps with."""
    if knobs.runtime.interpret:
        return True
    target = driver.active.get_current_target()
    return target is not None and target.arch >= 90


def choose(
    kernel: str, device: torch.device, dtype: torch.dtype, sizes: tuple[int, ...], rows: float, tiles: Tiles,
    run: Callable[[Tile], object],
) -> Tile:  # fmt: skip
    """The tile for launches of this kind. `rows`: rows per expert, told apart by powers of two; run(tile) launches."""
    if knobs.runtime.interpret:
        return INTERPRETED
    candidates = tiles.single if dtype == torch.float32 else tiles.hopper if has_descriptors() else tiles.ampere
    path = _path(kernel, device, dtype, sizes, max(0, round(math.log2(max(rows, 1)))), candidates)
    if path not in _chosen():
        stored = _read(path)
        _chosen()[path] = stored or _store(path, _fastest(candidates, run))
    return _chosen()[path]


@functools.cache
def _chosen() -> dict[Path, Tile]:
    """What this process has chosen or read so far."""
    return {}


@functools.cache
def _path(
    kernel: str, device: torch.device, dtype: torch.dtype, sizes: tuple[int, ...], log2_rows: int,
    candidates: tuple[Tile, ...],
) -> Path:  # fmt: skip
    gpu = re.sub(r"[^a-z0-9]+", "_", torch.cuda.get_device_name(device).lower())
    rest = zlib.crc32(repr((triton.__version__, candidates)).encode())
    parts = [kernel, gpu, str(dtype).removeprefix("torch."), *map(str, sizes), f"rows2e{log2_rows}", f"{rest:08x}"]
    return Path(knobs.cache.dir) / "moe_engine_tiles" / ("-".join(parts) + ".json")


def _read(path: Path) -> Tile | None:
    """What the file says; None if there is none or it is damaged."""
    try:
        return Tile(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _store(path: Path, tile: Tile) -> Tile:
    """Write the file whole, unless another process was first: what it wrote is returned then."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".draft") as draft:
            draft.write(json.dumps(tile._asdict()))
            draft.flush()
            if _read(path) is None:
                path.unlink(missing_ok=True)  # damaged
            with contextlib.suppress(FileExistsError):
                os.link(draft.name, path)
    except OSError as error:
        warnings.warn(
            f"{path.parent} cannot keep the tiles of kernels ({error}): each process measures them again, and may "
            "choose others and give other last bits. Set TRITON_CACHE_DIR to a folder that can be written to",
            RuntimeWarning,
            stacklevel=2,
        )
    return _read(path) or tile


def _fastest(candidates: tuple[Tile, ...], run: Callable[[Tile], object]) -> Tile:
    """The fastest that runs; the last candidate, the smallest, if memory is too short to measure any."""
    milliseconds = {tile: _milliseconds(tile, run) for tile in candidates}
    fastest = min(candidates, key=milliseconds.__getitem__)
    return fastest if milliseconds[fastest] < math.inf else candidates[-1]


def _milliseconds(tile: Tile, run: Callable[[Tile], object]) -> float:
    try:
        return float(testing.do_bench(lambda: run(tile), warmup=5, rep=30, return_mode="median"))  # pyright: ignore[reportArgumentType]
    except (TritonError, torch.OutOfMemoryError):
        return math.inf
