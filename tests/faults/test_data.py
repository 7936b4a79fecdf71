"""The faults of input and of hostile files: the engine survives them; with a guard taken away each of them notices."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors import safe_open

from moe_engine.checkpoint import manifest
from moe_engine.checkpoint import open as opened
from moe_engine.config import files
from moe_engine.data.mixture import Mixture
from moe_engine.plan import tokenizers
from moe_engine.prepare import formats, pipeline
from moe_engine.prepare.formats import BadRow
from moe_engine.train import step
from tests.faults import headers, hostile
from tests.faults.arena import Arena
from tests.faults.data import DATA
from tests.faults.hostile import HOSTILE, payloads
from tools import prepare_data

FAULTS = DATA | HOSTILE
COUNTS = {"F1": 20, "F2": 42, "F2-long": 1, "F3": 2, "F5": 3, "G3": 200}  # the others whole
Failures = Callable[..., list[str]]


@pytest.fixture
def failures(tmp_path: Path) -> Iterator[Failures]:
    """What was lost in `count` injections of a fault."""
    arena = Arena(tmp_path)

    def inject(fault: str, count: int = 0) -> list[str]:
        count = count or COUNTS.get(fault, FAULTS[fault].nightly)
        answers = list(FAULTS[fault].inject(arena, count))
        assert len(answers) == count
        return [answer for answer in answers if answer]

    yield inject
    arena.close()


@pytest.mark.parametrize("fault", FAULTS)
def test_nothing_is_lost(failures: Failures, fault: str) -> None:
    assert failures(fault) == []


def unpickled(path: Path) -> list[dict[str, Any]]:
    """What a reader that trusts its file would do, in a process of its own."""
    line = "import pickle, sys; pickle.load(open(sys.argv[1], 'rb'))"
    subprocess.run([sys.executable, "-c", line, str(path)], capture_output=True, timeout=60)
    return [{"step": 1}]


def good_rows_alone(*args: Any) -> list[Any]:
    return [row for row in formats.documents(*args) if not isinstance(row, BadRow)]


SABOTAGE: list[tuple[str, int, Any, str, Any]] = [
    ("F1", 20, formats, "_json_line", lambda path, number, *_: BadRow(path, str(number + 1), "a line too far")),
    ("F2", 14, pipeline, "documents", good_rows_alone),
    ("F3", 1, step, "why_skipped", lambda *_: "not finite"),
    ("F4", 15, tokenizers, "of_data", lambda run: iter(())),
    ("F5", 1, Mixture, "load_state", lambda *_: None),
    ("G1", 11, hostile, "read_rows", unpickled),
    ("G2", 4, manifest, "file_in", lambda folder, name: folder / name),
    ("G3", 8, headers, "open_shard", lambda path: safe_open(path, "pt")),
    ("G5", 6, files, "Loader", yaml.UnsafeLoader),
    ("G6", 8, prepare_data, "printable", str),
]


@pytest.mark.parametrize(("fault", "count", "owner", "name", "instead"), SABOTAGE, ids=[row[0] for row in SABOTAGE])
def test_a_missing_guard_is_noticed(
    failures: Failures, monkeypatch: pytest.MonkeyPatch, fault: str, count: int, owner: Any, name: str, instead: Any
) -> None:
    monkeypatch.setattr(owner, name, instead)
    if fault == "G2":
        monkeypatch.setattr(opened, name, instead)
    assert failures(fault, count)


@pytest.mark.parametrize("which", [0, 1])
def test_the_payloads_are_live(tmp_path: Path, which: int) -> None:
    marker = tmp_path / "marker"
    (tmp_path / "file").write_bytes(payloads(marker)[which])
    assert not marker.exists()
    unpickled(tmp_path / "file")
    assert marker.exists()
