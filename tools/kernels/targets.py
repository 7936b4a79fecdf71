"""The GPUs that Triton's kernels are compiled for without one, what each has room for, and what its machine code says.

Triton's wheel compiles for NVIDIA and AMD to the binary that a GPU loads (cubin, hsaco) by itself. NVIDIA's is
disassembled by the tools in the wheel; AMD's assembly says what a kernel takes.
"""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple


class Target(NamedTuple):
    """A processor is NVIDIA's SM or AMD's CU. `registers` of its threads together, 32 bits each."""

    backend: str
    arch: int | str
    warp_size: int
    shared: int  # bytes of a processor
    reserved: int  # bytes of it that each program takes for itself
    registers: int


TARGETS = {
    "sm_80": Target("cuda", 80, 32, 167_936, 1024, 65_536),
    "sm_90": Target("cuda", 90, 32, 233_472, 1024, 65_536),
    "sm_100": Target("cuda", 100, 32, 233_472, 1024, 65_536),
    "sm_120": Target("cuda", 120, 32, 102_400, 1024, 65_536),
    "gfx90a": Target("hip", "gfx90a", 64, 65_536, 0, 131_072),
    "gfx942": Target("hip", "gfx942", 64, 65_536, 0, 131_072),
}


class Usage(NamedTuple):
    """What a compiled kernel takes: registers of a thread, stores of those that found no room, bytes of shared memory,
    and instructions: tensor-core ones of Hopper, of Ampere, of Blackwell and of AMD, loads in bulk, loads of 16 bytes,
    those of the loop over products, and of these what stalls it (read for sm_80 and sm_90)."""

    warps: int
    regs: int
    spills: int
    shared: int
    hgmma: int
    hmma: int
    mma: int
    tma: int
    cp_async: int
    loop: int
    stalls: int


STALLS = r"\b(LDG|STS|LDL|STL)\b|WARPGROUP\.DEPBAR\.LE gsb0, 0x0"


def usage(compiled: Any) -> Usage:
    return _of_amd(compiled) if "amdgcn" in compiled.asm else _of_nvidia(compiled)


def _of_amd(compiled: Any) -> Usage:
    text = compiled.asm["amdgcn"]
    regs, spills = (int(re.findall(rf"\.{name}:\s+(\d+)", text)[-1]) for name in ("vgpr_count", "vgpr_spill_count"))
    products = len(re.findall(r"\bv_mfma", text))
    return Usage(compiled.metadata.num_warps, regs, spills, compiled.metadata.shared, 0, 0, products, 0, 0, 0, 0)


def _of_nvidia(compiled: Any) -> Usage:
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        resources, sass = (
            subprocess.run([str(tools / tool), *flags, file.name], capture_output=True, text=True, check=True).stdout
            for tool, *flags in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c", "-ndf"))
        )
    found = re.search(r"REG:(\d+)", resources)
    assert found, resources
    codes = ("STL", "HGMMA", "HMMA", "UTC[A-Z]*MMA", "UTMALDG", "LDGSTS")
    spills, hgmma, hmma, mma, tma, cp_async = (len(re.findall(rf"\b{code}\b", sass)) for code in codes)
    loop = loop_of_products(sass)
    stalls = sum(re.search(STALLS, line) is not None for line in loop)
    warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
    return Usage(warps, int(found[1]), spills, shared, hgmma, hmma, mma, tma, cp_async, len(loop), stalls)


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


def offline_driver(target: Target) -> Any:
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
            return GPUTarget(*target[:3])

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

        def get_benchmarker(self) -> Any:
            raise RuntimeError("there is no device to measure on")

    return Offline()
