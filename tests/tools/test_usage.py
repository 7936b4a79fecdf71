"""A tool that is called wrongly says so in one line, with the exit code of a configuration that cannot work."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("prepare_data --input x", "the following arguments are required: --out"),
        ("prepare_data --inp x --out y", "unrecognized arguments: --inp x"),
        ("upcycle --hf x --out y", "the following arguments are required: --method"),
        ("upcycle --hf x --out y --method copy --noise 1", "unrecognized arguments: --noise 1"),
        ("convert_hf", "the following arguments are required: import|export|verify"),
        ("convert_hf import --hf x --ou y", "the following arguments are required: --out"),
        ("convert_hf export --checkpoint x --out y --dtype fp8", "argument --dtype: invalid choice: 'fp8'"),
        ("inspect_checkpoint a b c", "found 3 folders, expected one or two"),
        ("params tiny", "unrecognized arguments: tiny"),
    ],
)
def test_wrong_usage(command: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    tool, *words = command.split()
    assert importlib.import_module(f"tools.{tool}").main(words) == 78
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line and "--help lists the flags" in line


@pytest.mark.parametrize("words", ["tools/params.py --model mixtral-8x7b", "launch/pretrain_moe.py --print-config"])
def test_case_13_output_that_nobody_takes(words: str) -> None:
    """A reader that is gone is no failure; a disk that is full is one."""
    command = [sys.executable, *words.split()]
    reader, writer = os.pipe()
    os.close(reader)
    gone = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (gone.returncode, gone.stderr) == (0, "")
    with open("/dev/full", "w") as full:
        lost = subprocess.run(
            [sys.executable, *words.split()], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert lost.returncode == 74 and "stdout: No space left on device" in lost.stderr and lost.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "script", [path.relative_to(ROOT) for folder in ("tools", "launch") for path in (ROOT / folder).glob("*.py")]
)
def test_case_13_every_script_starts_the_same_way(script: Path) -> None:
    """Through `run_program`, which alone outlasts a reader."""
    _, found, main = (ROOT / script).read_text().partition('if __name__ == "__main__":\n')
    assert not found or (main.strip().startswith("run_program(") and len(main.strip().splitlines()) == 1)
    assert found or script.name in ("ranks.py", "run.py", "data.py")  # what entry points share
