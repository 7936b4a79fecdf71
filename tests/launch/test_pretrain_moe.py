"""The entry point as a user starts it: one clear line and an exit code for each mistake, and no process left behind."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from moe_engine.log.rows import read_rows
from moe_engine.prepare.pipeline import PrepareOptions, prepare

ROOT = Path(__file__).parents[2]
SCRIPT = "launch/pretrain_moe.py"
SMALL = ("--steps", "2", "--seq-length", "16", "--micro-batch", "1")


class Done(NamedTuple):
    code: int
    out: str
    err: str
    seconds: float


def run(*arguments: str | Path, ranks: int = 0, timeout: float = 120, script: str = SCRIPT) -> Done:
    """`python launch/pretrain_moe.py ...`, or under torchrun; fails if a process of its session outlives it."""
    start = ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks)] if ranks else []
    command = [sys.executable, *start, script, *map(str, arguments)]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")}
    environment |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    began = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    out, err = process.communicate(timeout=timeout)
    seconds = time.monotonic() - began
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    return Done(process.returncode, out, err, seconds)


def refused(done: Done, code: int, *wanted: str) -> None:
    """The exit code, each pattern in one error report on stderr, and no traceback."""
    assert done.code == code, done.err + done.out
    assert "Traceback" not in done.err + done.out
    report = done.err[done.err.index("error: ") :]
    assert done.err.count("error: ") == 1
    for pattern in wanted:
        assert re.search(pattern, report), (pattern, report)
    assert len(report.strip().splitlines()) == 1, report


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    (folder / "a.txt").write_text("what is written here is read again and again. " * 400)
    prepare({"a": [folder / "a.txt"]}, folder / "tokens", None, PrepareOptions(eval_fraction=0.05), quiet=True)
    return folder / "tokens"


LAYOUTS = [
    (("--ep", "3"), r"parallel\.ep: found 3.*num_local_experts 8.*valid ep"),
    (("--tp", "3"), r"parallel\.tp: found 3.*valid tp"),
    (("--dp", "4"), r"dp 4 \* ep 1 \* tp 1 = 4, expected the 1 ranks.*valid dp"),
    (("--steps", "-1"), r"train\.steps.*-1"),
    (("--zero", "7"), r"parallel\.zero.*7"),
    (("--optimzer.lr", "1"), r"--optimzer\.lr.*unknown flag"),
    (("--micro-bach", "1"), r"--micro-bach.*did you mean --micro-batch"),
    (("--set", "model.num_expert_per_tok=2"), r"num_expert_per_tok.*num_experts_per_tok"),
    (("--set", "optimiser.lr=2"), r"optimiser.*optimizer"),
    (("--global-batch", "7", "--micro-batch", "2"), r"train\.global_batch: found 7.*nearest valid values are 6, 8"),
    (("--config", "/nowhere/run.yaml"), r"/nowhere/run\.yaml"),
    (("--model", "mixtral-8x7"), r"mixtral-8x7.*mixtral-8x7b"),
]


@pytest.mark.parametrize(("arguments", "wanted"), LAYOUTS, ids=lambda x: " ".join(x) if isinstance(x, tuple) else "")
def test_wrong_settings_are_refused_at_once(arguments: tuple[str, ...], wanted: str):
    done = run(*arguments)
    refused(done, 78, wanted)
    assert done.seconds < 2


def test_names_are_printed_escaped(tmp_path: Path):
    evil = "x\x1b[2J\nerror: forged"
    for arguments in (
        ("--data", f"a={tmp_path}/{evil}", "--dry-run"),
        ("--out", f"/dev/null/{evil}"),
        ("--config", f"{tmp_path}/{evil}.yaml", "--lr", "-1"),
    ):
        done = run(*arguments)
        assert done.code in (65, 78) and r"x\x1b[2J\nerror: forged" in done.err, done.err
        assert "\x1b" not in done.err and "\nerror" not in done.err
    assert "\n  - optimizer.lr" in done.err  # a list of problems keeps its lines


def test_all_problems_come_in_one_report():
    done = run("--ep", "3", "--set", "model.foo=1", "--lr", "-1")
    assert done.code == 78 and done.seconds < 2
    for word in ("parallel.ep", "foo", "lr"):
        assert word in done.err


def test_help_is_quick_and_loads_no_torch():
    done = run("--help")
    assert done.code == 0 and "--recompute" in done.out and done.seconds < 2
    probe = """
import runpy, sys
sys.argv = ["x", "--help"]
try:
    runpy.run_path("launch/pretrain_moe.py", run_name="__main__")
except SystemExit:
    print([m for m in ("torch", "deepspeed", "transformers", "numpy") if m in sys.modules])
"""
    loaded = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=True)
    assert loaded.stdout.strip().splitlines()[-1] == "[]"


def test_print_config_is_read_back(tmp_path: Path):
    done = run("--lr", "0.003", "--set", "model.num_experts_per_tok=3", "--print-config")
    assert done.code == 0
    (tmp_path / "run.yaml").write_text(done.out)
    assert run("--config", tmp_path / "run.yaml", "--print-config").out.splitlines()[-5:] == done.out.splitlines()[-5:]


def test_missing_tokenizer(tmp_path: Path, tokens: Path):
    done = run(*SMALL, "--out", tmp_path, "--data", tokens, "--tokenizer", tmp_path / "no.model")
    refused(done, 78, r"no\.model")


def test_data_that_is_not_there(tmp_path: Path):
    done = run(*SMALL, "--out", tmp_path, "--data", tmp_path / "nothing")
    assert done.code in (65, 78)
    refused(done, done.code, r"nothing.*prepare_data")


def test_data_too_small_for_one_step(tmp_path: Path):
    (tmp_path / "a.txt").write_text("too short")
    prepare({"a": [tmp_path / "a.txt"]}, tmp_path / "tokens", None, PrepareOptions(eval_fraction=0), quiet=True)
    done = run(*SMALL, "--out", tmp_path / "out", "--data", tmp_path / "tokens")
    refused(done, 65, r"domain .*(tokens do not fill one window|windows of).*more text")


def test_token_ids_beyond_the_vocabulary(tmp_path: Path, tokens: Path):
    done = run(*SMALL, "--out", tmp_path, "--data", tokens, "--set", "model.vocab_size=200")
    refused(done, 65, r"token id 256 .* vocabulary of 200; .* set model\.vocab_size >= 257")


def test_out_that_cannot_be_written(tmp_path: Path, tokens: Path):
    (tmp_path / "file").write_text("")
    done = run(*SMALL, "--out", tmp_path / "file" / "out", "--data", tokens)
    refused(done, 78, r"--out .*file/out: Not a directory; choose a folder")


def test_resume_from_nowhere(tmp_path: Path, tokens: Path):
    done = run(*SMALL, "--out", tmp_path / "out", "--data", tokens, "--resume", tmp_path / "step-00000009")
    refused(done, 78, r"step-00000009.*manifest\.json")


def test_one_process_trains_and_resumes(tmp_path: Path, tokens: Path):
    done = run(*SMALL, "--out", tmp_path, "--data", tokens)
    assert done.code == 0, done.err
    assert "layout      dp 1 x ep 1 x tp 1, world size 1" in done.out and "active for one token" in done.out
    assert "Traceback" not in done.err and "checkpoint" in done.out and (tmp_path / "loss.png").stat().st_size > 1000
    again = run("--steps", "4", *SMALL[2:], "--out", tmp_path, "--data", tokens, "--resume", "auto")
    assert again.code == 0 and "resumed from" in again.out, again.err
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


def test_torchrun_with_two_ranks(tmp_path: Path, tokens: Path):
    """A launch on the default layout, and one whose layout does not fit its number of ranks."""
    done = run(*SMALL, "--out", tmp_path, "--data", tokens, "--ep", "2", ranks=2)
    assert done.code == 0, done.err
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 2
    assert done.out.count("Step 2/2") == 1  # the main rank alone speaks
    wrong = run(*SMALL, "--out", tmp_path, "--data", tokens, "--dp", "4", ranks=2)
    assert wrong.code != 0 and wrong.err.count("error: ") == 1
    assert re.search(r"error: .*dp 4 \* ep 1 \* tp 1 = 4, expected the 2 ranks", wrong.err)
    assert not re.search(r'File ".*pretrain_moe\.py"', wrong.err)  # torchrun's own traceback is not ours
