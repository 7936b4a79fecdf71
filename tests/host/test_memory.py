"""Freed memory is used again, not returned to the system and cleared anew."""

import subprocess
import sys

import pytest

PAGES = """
import resource, sys, torch
from moe_engine.host.memory import keep_freed_memory
kept = keep_freed_memory() if sys.argv[1] == "keep" else None
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(16 << 20)  # 64 MiB, freed at once
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(kept, faults())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_blocks_are_faulted_in_once():
    def run(mode: str) -> tuple[str, int]:
        command = [sys.executable, "-c", PAGES, mode]
        kept, faults = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        return kept, int(faults)

    kept, faults = run("keep")
    if kept == "False":
        pytest.skip("this C library has no mallopt that keeps memory")
    assert faults < 100 < run("as it comes")[1]  # 10 x 16,384 pages, or 10 x 32 huge ones
