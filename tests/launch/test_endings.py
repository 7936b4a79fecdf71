"""How a run ends when something around it is missing: its console, open files, anything left to train, evaluation."""

import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from moe_engine.checkpoint.folders import steps_in
from moe_engine.checkpoint.hf.export import export_run
from moe_engine.config.command_line import load
from moe_engine.log.rows import read_rows
from tests.launch.test_pretrain_moe import ROOT, SMALL, refused, run, tokens  # noqa: F401 (a fixture)
from tools.convert_hf import main as verify

NO_EVALUATION = ("--set", "train.eval_batches=0")


class Ended(NamedTuple):
    code: int
    err: str
    out: Path


def shell(redirected: str, *arguments: str | Path, files: int = 0) -> Ended:
    """The launcher as bash redirects it, RUN standing for it; with a limit of open files if it is given."""
    words = " ".join(f'"{word}"' for word in (sys.executable, "launch/pretrain_moe.py", *SMALL, *map(str, arguments)))
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", redirected.replace("RUN", words)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (files, files)) if files else None,
    )
    return Ended(done.returncode, done.stderr, Path(str(arguments[1])))


def holds(hf: Path, checkpoint: Path) -> bool:
    """Whether an exported folder has the weights of a checkpoint, bit by bit."""
    return verify(["verify", "--hf", str(hf), "--checkpoint", str(checkpoint)]) == 0


@pytest.fixture(scope="module")
def unheard(tmp_path_factory: pytest.TempPathFactory, tokens: Path) -> Ended:  # noqa: F811
    """A run on a full console, with as many open files as the launcher asks for, and without held-out text."""
    folder = tmp_path_factory.mktemp("unheard")
    for file in tokens.glob("*-eval-*"):
        file.rename(file.with_suffix(f"{file.suffix}.gone"))
    shards = len(list(tokens.glob("*.bin")))
    ended = shell("RUN > /dev/full", "--out", folder, "--data", tokens, *NO_EVALUATION, files=24 + shards)
    for file in tokens.glob("*.gone"):
        file.rename(file.with_suffix(""))
    return ended


def test_case_16_a_console_that_is_full_ends_no_run(unheard: Ended) -> None:
    assert unheard.code == 0 and "stdout: No space left on device" in unheard.err and "Traceback" not in unheard.err
    assert [row["step"] for row in read_rows(unheard.out / "metrics.jsonl")] == [1, 2]
    assert steps_in(unheard.out / "checkpoints") == [2] and (unheard.out / "loss.png").stat().st_size > 1000


def test_case_20_no_evaluation_needs_no_held_out_text(unheard: Ended) -> None:
    assert unheard.code == 0 and not (unheard.out / "eval.jsonl").exists() and "held-out" not in unheard.err


def test_case_16_an_export_of_what_was_resumed(unheard: Ended, tmp_path: Path) -> None:
    """Nothing is left to train, so no checkpoint lies in --out."""
    resumed = unheard.out / "checkpoints" / "step-00000002"
    words = ("--out", tmp_path / "new", "--resume", resumed, "--export-hf", tmp_path / "hf")
    assert f"exported {resumed} as mixtral" in export_run(load([*map(str, words)], 1).run)
    assert holds(tmp_path / "hf", resumed)


@pytest.mark.slow
def test_case_16_a_run_that_only_exports(unheard: Ended, tmp_path: Path, tokens: Path) -> None:  # noqa: F811
    """As above, by the launcher, whose reader leaves after a line."""
    resumed = unheard.out / "checkpoints" / "step-00000002"
    words = ("--resume", resumed, "--export-hf", tmp_path / "hf", *NO_EVALUATION)
    ended = shell("RUN | head -1", "--out", tmp_path / "new", "--data", tokens, *words)
    assert ended.code == 0 and "Traceback" not in ended.err, ended.err
    assert steps_in(tmp_path / "new" / "checkpoints") == []
    assert holds(tmp_path / "hf", resumed)


def test_case_16_too_few_open_files(tmp_path: Path) -> None:
    ended = shell("RUN", "--out", tmp_path, files=16)
    assert ended.code == 78 and "Traceback" not in ended.err
    assert (
        ended.err.startswith("error: open files: found a limit of 16, expected 26 or more") and "ulimit -n" in ended.err
    )


@pytest.mark.slow
@pytest.mark.parametrize("every", ["eval_every", "eval_batches"])
def test_case_20_it_is_said_once(tmp_path: Path, tokens: Path, every: str) -> None:  # noqa: F811
    done = run(*SMALL, "--out", tmp_path, "--data", tokens, "--set", f"train.{every}=0", "--set", "train.save_every=0")
    assert done.code == 0 and (done.out + done.err).count("no evaluation") == 1, done.err
    assert not (tmp_path / "eval.jsonl").exists() and "Eval" not in done.out
    assert steps_in(tmp_path / "checkpoints") == [2]


@pytest.mark.slow
def test_case_16_ranks_fit_in_the_files_that_are_counted(tmp_path: Path, tokens: Path) -> None:  # noqa: F811
    """24, 5 groups of 2 and the shards: with one file fewer the run is refused, and torchrun says why."""
    for limit, code in ((24 + 6 * 5 + 2, 0), (24 + 6 * 5 + 1, 1)):
        files = f"ulimit -n {limit}; exec {sys.executable} launch/pretrain_moe.py"
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--no-python"]
        words = [*SMALL, "--ep", "2", "--out", str(tmp_path / str(limit)), "--data", str(tokens)]
        done = subprocess.run(
            [*command, "bash", "-c", f'{files} "$@"', "bash", *words],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == code, done.stderr
    assert f"ConfigError: open files: found a limit of {limit}" in done.stderr.partition("Root Cause")[2]
