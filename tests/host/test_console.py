"""A program whose output nobody takes: it finishes its work, quietly, and its exit code says what became of it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys
from moe_engine.host.console import run_program

def main():
    for line in range(100_000):
        print("caf\\u00e9", line)
    print("said aside", file=sys.stderr)
    open("worked", "w").write(str(open("new", "w").fileno()))
    return {code}

run_program(main, prints={prints})
"""


def run(
    folder: Path, shell: str, code: int = 0, prints: bool = True, **environment: str
) -> subprocess.CompletedProcess[str]:
    """The script as `shell` redirects it, PROGRAM standing for it. It must have worked to its end."""
    (folder / "script.py").write_text(SCRIPT.format(code=code, prints=prints))
    command = f'"{sys.executable}" script.py'
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", shell.replace("PROGRAM", command)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
    )
    assert int((folder / "worked").read_text()) > 2, "a file has the number of a standard stream"
    return done


def test_case_13_a_reader_that_has_enough(tmp_path: Path) -> None:
    done = run(tmp_path, "PROGRAM | head -1")
    assert (done.returncode, done.stdout, done.stderr) == (0, "café 0\n", "said aside\n")


def test_case_13_the_code_is_that_of_the_work(tmp_path: Path) -> None:
    assert run(tmp_path, "PROGRAM | true", code=3).returncode == 3
    assert run(tmp_path, "PROGRAM > /dev/full", code=3).returncode == 3


@pytest.mark.parametrize("prints", [True, False])
def test_case_13_a_disk_that_is_full(tmp_path: Path, prints: bool) -> None:
    """Output that a program is run for is not lost in silence; a run has more to show than its console."""
    done = run(tmp_path, "PROGRAM > /dev/full", prints=prints)
    first, second = done.stderr.splitlines()
    assert "warning: stdout: No space left on device" in first and second == "said aside"
    assert done.returncode == (74 if prints else 0)


def test_case_16_standard_error_that_is_full(tmp_path: Path) -> None:
    done = run(tmp_path, "PROGRAM 2> /dev/full")
    assert done.returncode == 0 and done.stdout.count("café") == 100_000
    assert done.stdout.count("warning: stderr: No space left on device") == 1


def test_streams_that_are_closed_from_the_start(tmp_path: Path) -> None:
    done = run(tmp_path, "PROGRAM >&- 2>&-")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_terminal_that_does_not_know_a_letter(tmp_path: Path) -> None:
    done = run(tmp_path, "PROGRAM | head -1", PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and done.stdout == "caf\\xe9 0\n"


def test_a_full_pipe_that_does_not_wait(tmp_path: Path) -> None:
    """Another program has left the pipe non-blocking: what does not fit at once is written later."""
    reader = "import os, sys, time; os.set_blocking(0, False); time.sleep(0.5); os.set_blocking(0, True)"
    count = "print(sum(1 for _ in sys.stdin))"
    (tmp_path / "reader.py").write_text(f"{reader}; {count}")
    (tmp_path / "writer.py").write_text("import os, runpy; os.set_blocking(1, False); runpy.run_path('script.py')")
    done = run(tmp_path, f'"{sys.executable}" writer.py | "{sys.executable}" reader.py')
    assert (done.returncode, done.stdout) == (0, "100000\n"), done.stderr
