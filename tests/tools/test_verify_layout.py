"""The tool that users run to check layouts, as they run it."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_fast_subset_stays_below_the_limit():
    command = [sys.executable, "tools/verify_layout.py", "--fast"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, run.stdout + run.stderr
    *table, last = run.stdout.strip().splitlines()
    match = re.fullmatch(r"layouts (\d+), worst relative error (\S+)", last)
    assert match, last
    rows = [line.split() for line in table if re.match(r"\s*\d+\s+\d+\s+\d+\s", line)]
    assert len(rows) == int(match[1]) >= 8
    worst = max(float(x) for row in rows for x in row[-4:])
    assert 0 < float(match[2]) <= 1e-5 and worst == float(match[2])
    assert {row[3] for row in rows} >= {"0", "1", "2"} and {"1", "2"} <= {row[2] for row in rows}
