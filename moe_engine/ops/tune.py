"""Which tiles a CUDA kernel works in: measured once for each kind of launch, kept on disk, never measured again.

Tile sizes change the order in which sums are added, hence bits, so a choice has to outlive the process that made it.
Each is a small file, named after what it decides, under ~/.cache/moe_engine/tiles:

    experts_up-nvidia_h100_80gb_hbm3-bfloat16-d4096-f14336-rows2e11.json      {"m": 128, "n": 128, "k": 64, ...}

The first process to write a file decides for all; the others adopt what it holds. To pin a choice, edit the file; to
have the same bits on another machine of the same kind, copy the folder.
"""

import functools
import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from triton import knobs, testing
from triton.compiler.errors import CompilationError
from triton.runtime import driver
from triton.runtime.errors import OutOfResources

FOLDER = Path.home() / ".cache" / "moe_engine" / "tiles"


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
    kernel: str, device: torch.device, dtype: torch.dtype, sizes: dict[str, int], rows: float, tiles: Tiles,
    run: Callable[[Tile], object],
) -> Tile:  # fmt: skip
    """The tile for launches of this kind. `rows`: rows per expert, told apart by powers of two; run(tile) launches."""
    if knobs.runtime.interpret:
        return INTERPRETED
    candidates = tiles.single if dtype == torch.float32 else tiles.hopper if has_descriptors() else tiles.ampere
    name = re.sub(r"[^a-z0-9]+", "_", torch.cuda.get_device_name(device).lower())
    parts = [kernel, name, str(dtype).removeprefix("torch."), *(f"{key}{size}" for key, size in sizes.items())]
    path = FOLDER / ("-".join([*parts, f"rows2e{max(0, round(math.log2(max(rows, 1))))}"]) + ".json")
    try:
        return _decided(path)
    except FileNotFoundError:
        _decide(path, min(candidates, key=lambda tile: _milliseconds(tile, run)))
        return _decided(path)


@functools.cache
def _decided(path: Path) -> Tile:
    return Tile(**json.loads(path.read_text()))


def _decide(path: Path, tile: Tile) -> None:
    """Write the file whole, unless another process was first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(f".{os.getpid()}")
    draft.write_text(json.dumps(tile._asdict()))
    try:
        os.link(draft, path)
    except FileExistsError:
        pass
    finally:
        draft.unlink()


def _milliseconds(tile: Tile, run: Callable[[Tile], object]) -> float:
    try:
        return float(testing.do_bench(lambda: run(tile), warmup=5, rep=30, return_mode="median"))  # pyright: ignore[reportArgumentType]
    except (OutOfResources, CompilationError):
        return math.inf
