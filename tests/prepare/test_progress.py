"""What a preparation says of bad rows, on a terminal and off it."""

import io

import pytest
from rich.console import Console
from rich.progress import Progress as Bar

from moe_engine.prepare.progress import SHOWN_BAD_ROWS, Progress


def test_brackets_of_a_row_are_no_markup() -> None:
    text = io.StringIO()
    with Progress(1, quiet=True) as progress:
        progress.bar = Bar(console=Console(file=text, force_terminal=True, width=100))
        progress.bad_row("[red]a[/b] [link=http://x]b \x1b[2J")
    assert text.getvalue().strip() == r"skipped [red]a[/b] [link=http://x]b \x1b[2J"


def test_the_first_bad_rows_are_shown_and_the_rest_counted(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(1, quiet=True) as progress:
        for i in range(SHOWN_BAD_ROWS + 3):
            progress.bad_row(f"row {i}\n")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == r"skipped row 0\n" and len(lines) == SHOWN_BAD_ROWS + 1 and lines[-1].startswith("3 more")
