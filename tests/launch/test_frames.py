"""How far it is from `main` to the matrix products: the functions of this repository that a reader passes through."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.test_pretrain_moe import SMALL, tokens  # noqa: F401 (a fixture)

ROOT = Path(__file__).parents[2]
MOST = 10
COUNTING = """
import os, sys, traceback
sys.path.insert(0, {root!r})
from launch import pretrain_moe
from moe_engine.model import moe

op = moe.experts

def experts(*given):
    ours = ({root!r} + "/launch/", {root!r} + "/moe_engine/")
    names = [frame.name for frame in traceback.extract_stack()[:-1] if frame.filename.startswith(ours)]
    ways.add(tuple(names[names.index("main"):]) + (op.__name__,))
    return op(*given)

ways, moe.experts = set(), experts
code = pretrain_moe.main(sys.argv[1:])
for way in sorted(ways):
    print("WAY", *way)
sys.exit(code)
"""


@pytest.mark.parametrize(
    ("ranks", "more"),
    [(1, ()), (2, ("--ep", "2")), pytest.param(2, ("--dp", "2", "--zero", "3"), marks=pytest.mark.slow)],
    ids=str,
)
def test_ten_frames_from_main_to_the_op(ranks: int, more: tuple[str, ...], tmp_path: Path, tokens: Path) -> None:  # noqa: F811
    (tmp_path / "counting.py").write_text(COUNTING.format(root=str(ROOT)))
    start = ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    words = [
        *start,
        str(tmp_path / "counting.py"),
        *SMALL,
        *more,
        "--data",
        str(tokens),
        "--steps",
        "1",
        "--seq-length",
    ]
    words += ["32", "--out", str(tmp_path / "out"), "--global-batch", "2"]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    ways = {tuple(line.split()[1:]) for line in done.stdout.splitlines() if line.startswith("WAY")}
    assert ways
    for way in sorted(ways):
        print(f"\n{len(way)} frames: {' > '.join(way)}")
    assert max(map(len, ways)) <= MOST
