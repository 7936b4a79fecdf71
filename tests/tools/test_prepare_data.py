"""The command: exit codes, one clear line, and what it prints."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tools/prepare_data.py", *map(str, arguments)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)


def test_help_is_quick_and_needs_no_torch() -> None:
    begun = time.monotonic()
    done = run("--help")
    assert done.returncode == 0 and "--on-bad-row" in done.stdout
    assert time.monotonic() - begun < 2
    script = "import sys, tools.prepare_data; print([m for m in ('torch', 'transformers', 'rich') if m in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert loaded.stdout == "[]\n"


def test_prepares_several_domains(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text\n" * 100)
    (tmp_path / "b.jsonl").write_text('{"body": "x"}\n{"body": 1}\n{"body": "\\u001b[2Jy"}\n')
    arguments = [
        "--domain",
        f"a={tmp_path / 'a.txt'}",
        "--domain",
        f"b={tmp_path / 'b.jsonl'}",
        "--out",
        tmp_path / "out",
    ]
    done = run(*arguments, "--on-bad-row", "skip", "--eval-fraction", "0")
    assert done.returncode == 0, done.stderr
    assert "a: train: 1,001 tokens in 1 documents" in done.stdout
    assert "b: train: 8 tokens in 2 documents" in done.stdout and "1 bad rows" in done.stdout
    assert f"skipped {tmp_path / 'b.jsonl'}:2: field 'body' is a number" in done.stderr
    assert "tokens/s" in done.stderr
    assert run(*arguments, "--on-bad-row", "skip", "--eval-fraction", "0", "--quiet").stderr == ""


def test_names_are_printed_escaped(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text\n" * 100)
    done = run("--input", tmp_path / "a.txt", "--out", tmp_path / "x\x1b[2J\ny", "--quiet")
    assert done.returncode == 0 and r"x\x1b[2J\ny: " in done.stdout and "\x1b" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--out", "{tmp}/out"], 78, "nothing to read"),
        (["--input", "{tmp}/missing", "--out", "{tmp}/out"], 78, "missing: no such file"),
        (["--domain", "a.txt", "--out", "{tmp}/out"], 78, "expected NAME=PATH"),
        (["--domain", "../x={tmp}/a.jsonl", "--out", "{tmp}/out"], 78, "expected NAME=PATH"),
        (
            ["--input", "{tmp}/a.jsonl", "--out", "{tmp}/out", "--tokenizer", "{tmp}/no.model"],
            78,
            "no.model: no such file",
        ),
        (["--input", "{tmp}/a.jsonl", "--out", "{tmp}/a.jsonl/out"], 78, "cannot be written"),
        (["--input", "{tmp}/a.jsonl", "--out", "{tmp}/out", "--eval-fraction", "2"], 78, "eval_fraction 2.0"),
        (["--input", "{tmp}/a.jsonl", "--out", "{tmp}/out"], 65, "a.jsonl:2:"),
        (["--input", "{tmp}/empty", "--out", "{tmp}/out"], 65, "no file to read"),
        (["--input", "{tmp}/empty.txt", "--out", "{tmp}/out"], 65, "no text in 1 files"),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, arguments: list[str], code: int, said: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "empty").mkdir()
    done = run(*(argument.format(tmp=tmp_path) for argument in arguments))
    assert done.returncode == code and said in done.stderr, done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
