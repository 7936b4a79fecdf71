"""The tool that users run to check layouts, as they run it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tools.verify_layout import FAST, SMALL, relative, run_of, shrunk, verify
from tools.verify_layout import Case as LayoutCase

ROOT = Path(__file__).parents[2]


def test_an_error_that_is_no_number_is_the_worst():
    one = torch.ones(3)
    assert relative(one * float("nan"), one) == relative(one, 0 * one) == float("inf")
    assert relative(one, one) == relative(0 * one, 0 * one) == 0.0


def test_a_dense_model_is_verified_too():
    """A user's dense run: no router, no balancing loss to compare."""
    case = LayoutCase(1, 1, 1, 0, 1, "micro_batch")
    model, cases = shrunk(
        run_of(SMALL.model_copy(update={"num_local_experts": 0, "expert_bias_update_rate": 0.0}), case)
    )
    assert verify(model, cases) <= 1e-5


def test_four_ranks_stay_below_the_limit():
    four = [case for case in FAST if (case.dp, case.ep, case.tp) in ((2, 2, 1), (1, 2, 2))]
    assert len(four) == 2 and 0 < verify(SMALL, four) <= 1e-5


@pytest.mark.slow
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
