"""The measurement of docs/huggingface.md, on a model that is small."""

import re
from pathlib import Path

import pytest

from tools.measure_conversion import main


def test_every_step_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--gb", "0.2", "--shards", "3", "--work", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"0\.\d\d GB in 3 files of at most 0\.\d\d GB; interpreter 0\.\d\d GB", lines[0])
    for name, line in zip(("import", "export", "verify"), lines[1:], strict=True):
        found = re.fullmatch(rf"{name}  (\d\.\d\d) GB above the interpreter, \d+ s", line)
        assert found and float(found[1]) < 0.5, line


@pytest.mark.slow
def test_four_gigabytes_take_less_than_one_and_a_half(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--gb", "4", "--shards", "8", "--work", str(tmp_path)]) == 0
    figures = re.findall(r"(\d\.\d\d) GB above", capsys.readouterr().out)
    assert len(figures) == 3 and max(map(float, figures)) < 1.5
