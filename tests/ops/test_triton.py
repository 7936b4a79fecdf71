"""The Triton kernels without a GPU: interpreted on CPU tensors for their values, compiled for their machine code."""

import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from tools.inspect_kernels import Row
from tools.kernels.targets import STALLS, TARGETS, Usage, loop_of_products

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("numbers", ["8_000", pytest.param("400_000", marks=pytest.mark.slow)])
def test_interpreted_kernels_equal_the_reference(numbers: str) -> None:
    """test_parity.py's cases with at most so many numbers, in a process in which Triton interprets from the start."""
    command = [sys.executable, "-m", "pytest", "-q", "tests/ops/test_parity.py", "-k", "values_and_gradients"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "INTERPRET_AT_MOST": numbers}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0 and " passed" in result.stdout, result.stdout[-5000:] + result.stderr[-2000:]


def written_kernels() -> set[str]:
    sources = (ROOT / "moe_engine" / "ops").glob("*/triton.py")
    written = {line.split("(")[0][4:] for source in sources for line in source.read_text().splitlines()}
    return {name for name in written if name.endswith("_kernel")}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("tiles", [("--tiles", "1"), pytest.param((), marks=pytest.mark.slow)], ids=["one tile", "all"])
def test_compiled_kernels_use_tensor_cores_and_do_not_spill(tiles: tuple[str, ...], tmp_path: Path) -> None:
    """Every kernel, in every tile, for sm_80 and sm_90: the tool fails on spills, stalls and too many programs."""
    command = [sys.executable, "tools/inspect_kernels.py", "--json", str(tmp_path / "kernels.json"), *tiles]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    rows = json.loads((tmp_path / "kernels.json").read_text())
    assert {row["target"] for row in rows} == {"sm_80", "sm_90"}
    assert {row["kernel"] for row in rows} == written_kernels()
    up = [row for row in rows if row["kernel"] == "up_kernel" and row["dtype"] == "bfloat16"]
    hopper = [row for row in up if row["target"] == "sm_90"]
    assert all(row["tma"] > 0 and row["cp_async"] > 0 for row in hopper)  # weights by descriptor, tokens by address


def test_the_loop_over_products_is_found_and_its_stalls() -> None:
    """The inner of two loops, and one whose label is spelt otherwise, which must not pass for one without stalls."""
    code = """
.L_x_1:
        /*0010*/                   LDG.E R2, [R4] ;
.L_x_2:
        /*0020*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
        /*0030*/                   STS [R5], R2 ;
        /*0040*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*0050*/              @P0  BRA `(.L_x_2) ;
        /*0060*/              @P1  BRA `(.L_x_1) ;
"""
    loop = loop_of_products(code)
    assert len(loop) == 4 and sum(bool(re.search(STALLS, line)) for line in loop) == 1
    assert loop_of_products(code.replace(".L_x", ".label")) == []
    used = Usage(4, 128, spills=0, shared=1000, hgmma=1, hmma=0, mma=0, tma=1, cp_async=1, loop=0, stalls=0)
    row = Row("sm_90", "up_kernel", "", "bfloat16", "64x64x64 w4 s4", 1, used)
    assert row.problem() == "no loop over products"
    assert row._replace(used=used._replace(loop=4)).problem() is None
    assert row._replace(used=used._replace(loop=4, stalls=1)).problem() == "1 stalls"


def test_case_25_what_a_target_has_no_room_for_is_a_problem() -> None:
    used = Usage(8, 200, spills=0, shared=80 * 1024, hgmma=0, hmma=0, mma=4, tma=0, cp_async=0, loop=0, stalls=0)
    row = Row("gfx942", "dw_kernel", "", "bfloat16", "64x128x32 w8 s4", 2, used)
    assert row.problem() == "no room in shared memory: 65536 bytes"  # as router_logits with three stages
    assert row._replace(target="sm_120").problem() is None
    assert row._replace(used=used._replace(shared=1024)).problem() is None
    assert row._replace(used=used._replace(shared=1024, regs=264)).problem() == "no room in registers"
    assert row._replace(used=used._replace(shared=1024, spills=3)).problem() == "3 spills"
    assert row._replace(used=used._replace(shared=1024, mma=0)).problem() == "no tensor-core instruction"


def test_case_25_the_gradients_of_the_router_compile_for_amd(tmp_path: Path) -> None:
    """To the binary, without what AMD's compiler does not know; all other kernels: the slow test below."""
    command = [sys.executable, "tools/inspect_kernels.py", "--targets", "gfx942", "--dtype", "bfloat16"]
    command += ["--ops", "router_logits", "swiglu", "--json", str(tmp_path / "kernels.json")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    products = {row["kernel"]: row["mma"] for row in json.loads((tmp_path / "kernels.json").read_text())}
    assert all(products[f"router_{name}_kernel"] > 0 for name in ("logits", "dx", "dw"))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_case_25_the_docs_say_what_each_kernel_is_on_each_target() -> None:
    """And every kernel compiles for every one. Another Triton gives other numbers."""
    header = f"| Triton {version('triton')} | dtype | {' | '.join(TARGETS)} |\n"
    docs = (ROOT / "docs" / "kernels.md").read_text()
    if header not in docs:
        pytest.skip("the table is that of another Triton")
    command = [sys.executable, "tools/inspect_kernels.py", "--targets", "--markdown"]
    table = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    assert {line.split(" | ")[0][2:] + "_kernel" for line in table.splitlines()[2:]} == written_kernels()
    assert table.startswith(header) and table in docs


@pytest.mark.slow
@pytest.mark.parametrize("sizes", ["1 1 1 1 1", "100 33 17 130 8"])
def test_kernels_compile_for_awkward_sizes(sizes: str) -> None:
    """Triton makes constants of ones, and other code for widths that are no multiple of 16."""
    command = [sys.executable, "tools/inspect_kernels.py", "--dtype", "bfloat16", "--sizes", *sizes.split()]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
