"""The matrix-product peak that MFU is a share of.

Known GPUs use their vendor's dense bf16 figure (fp32 runs: the measured ceiling), so that MFU means what it means in
the literature. Elsewhere the ceiling is measured at start: all ranks multiply at the same time, since they share cores.
"""

import time

import torch

from moe_engine.parallel.collectives import barrier
from moe_engine.parallel.mesh import Mesh

DENSE_BF16 = {
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
}  # FLOP/s, vendor data sheets, no sparsity


def peak_flops(device: torch.device, dtype: torch.dtype, mesh: Mesh) -> float:
    """FLOP/s of this rank; collective over all ranks where it is measured."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for key, value in DENSE_BF16.items():
            if key in name:
                return value
    return measured_ceiling(device, dtype, mesh)


def measured_ceiling(device: torch.device, dtype: torch.dtype, mesh: Mesh, seconds: float = 0.2) -> float:
    """FLOP/s of a square matrix product, all ranks at once for `seconds`."""
    size = 4096 if device.type == "cuda" else 1024
    a = torch.ones(size, size, device=device, dtype=dtype)  # no random numbers: a resumed run continues their stream
    torch.mm(a, a)
    barrier(mesh.world)
    start, products = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        torch.mm(a, a)
        products += 1
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return products * 2 * size**3 / (time.perf_counter() - start)
