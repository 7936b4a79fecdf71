"""A tool that is called wrongly says so in one line, with the exit code of a configuration that cannot work."""

import importlib
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


def test_a_reader_that_has_enough() -> None:
    script = "import tools.inspect_checkpoint as t; t.report = lambda o: (['line'] * 100_000, 0); exit(t.main(['x']))"
    tool = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert tool.stdout and tool.stderr and tool.stdout.readline() == b"line\n"
    tool.stdout.close()
    assert tool.stderr.read() == b"" and tool.wait(60) == 0
