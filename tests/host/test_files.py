"""A size is that of a regular file in the folder, and of nothing else."""

import os
from pathlib import Path

import pytest

from moe_engine.host.files import size_in


def test_a_regular_file_has_a_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"123")
    (tmp_path / "link").symlink_to(tmp_path, target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    for folder in (tmp_path, tmp_path / "link", Path("."), Path("link")):
        assert size_in(folder, folder / "a") == 3


def test_nothing_else_has_one(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "below").mkdir(parents=True)
    for path in (tmp_path / "out", folder / "a", folder / "below" / "b"):
        path.write_bytes(b"123")
    (folder / "link").symlink_to("a")
    (folder / "device").symlink_to("/dev/zero")
    os.mkfifo(folder / "pipe")
    names = [
        "../out",
        str(tmp_path / "out"),
        "below",
        "below/b",
        "link",
        "device",
        "pipe",
        "missing",
        "",
        ".",
        "..",
        "a/x",
    ]
    for name in [*names, "a\0", "a" * 70_000, "/dev/zero", "..\\out", "%2e%2e%2fout"]:
        assert size_in(folder, folder / name) is None, name
