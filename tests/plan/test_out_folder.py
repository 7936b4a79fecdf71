"""What is in the way of the files of a run is named before it starts, by the dry run too."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.pretrain_moe import main
from moe_engine.config import Run
from moe_engine.config.command_line import load
from moe_engine.errors import ConfigError
from moe_engine.plan.out_folder import FILES, FOLDERS, check_out_folder
from moe_engine.prepare.default import NAME
from moe_engine.prepare.pipeline import PrepareOptions, prepare


@pytest.fixture(autouse=True)
def out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")  # the launcher sets it: put back after the test
    (tmp_path / "out").mkdir()
    return Path("out")


def run_of(*arguments: str) -> Run:
    return load(["--out", "out", *arguments], 1).run


def refusal(run: Run, goes_on: bool = False) -> str:
    with pytest.raises(ConfigError) as caught:
        check_out_folder(run, goes_on)
    return str(caught.value)


def prepared(folder: str, name: str) -> None:
    Path("text.txt").write_text("some words\n" * 100)
    prepare({name: ["text.txt"]}, folder, None, PrepareOptions(), quiet=True)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("no/where")])
def test_case_16_what_is_no_file(out: Path, name: str, make: Callable[[Path], object]) -> None:
    make(out / name)
    said = refusal(run_of())
    assert f"out/{name} is" in said and "move it away, or choose another --out" in said


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("make", [Path.touch, os.mkfifo, lambda path: path.symlink_to("nowhere")])
def test_case_16_what_is_no_folder(out: Path, name: str, make: Callable[[Path], object]) -> None:
    make(out / name)
    assert f"out/{name} is no folder" in refusal(run_of()) and os.path.lexists(out / name)


def test_case_16_all_of_it_at_once_by_the_dry_run(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (out / "loss.png").mkdir()
    (out / "tensorboard").touch()
    assert main(["--out", "out", "--dry-run"]) == 78
    said = capsys.readouterr().err
    assert "2 problems" in said and "out/loss.png" in said and "out/tensorboard" in said


def test_what_a_run_leaves_is_not_in_its_way(out: Path) -> None:
    for name in FILES:
        (out / name).touch()
    (out / "checkpoints").mkdir()
    (out / "tensorboard").symlink_to("checkpoints")  # whoever keeps it elsewhere may
    (out / "metrics.jsonl").unlink()
    (out / "metrics.jsonl").symlink_to("not-yet.jsonl")
    (out / "hf").mkdir()
    (out / "hf" / "config.json").write_text("{}")
    prepared("out/data", NAME)
    check_out_folder(run_of("--export-hf", "out/export"), goes_on=False)


def test_case_16_what_a_new_run_would_remove(out: Path) -> None:
    """The user's own text, prepared data and exported weights, under names that a run writes anew."""
    (out / "hf").mkdir()
    (out / "hf" / "model.safetensors").touch()
    assert "out/hf holds model.safetensors" in refusal(run_of())
    check_out_folder(run_of(), goes_on=True)  # nothing is written there then
    (out / "hf" / "model.safetensors").unlink()
    (out / "data").mkdir()
    (out / "data" / "mine.txt").touch()
    assert "out/data exists and is not prepared data; give --data" in refusal(run_of())
    check_out_folder(run_of("--data", "elsewhere"), goes_on=False)
    (out / "data" / "mine.txt").unlink()
    prepared("out/data", "mine")
    assert "out/data holds mine: give --data out/data" in refusal(run_of())


@pytest.mark.parametrize(
    ("export", "wanted"),
    [
        *((name, f"is where the run itself writes {name}") for name in ("hf", "checkpoints", "loss.png")),
        ("data/export", "is where the run itself writes data"),
        ("", "is, or holds, --out"),
        ("..", "is, or holds, --out"),
        ("../link/hf", "is where the run itself writes hf"),
    ],
)
def test_case_16_an_export_that_would_meet_the_run(out: Path, export: str, wanted: str) -> None:
    Path("link").symlink_to("out")
    assert wanted in refusal(run_of("--export-hf", str(out / export)))


@pytest.mark.parametrize("flag", ["--out", "--export-hf"])
@pytest.mark.parametrize("name", ["x" * 252, "link"])
def test_case_16_names_that_cannot_be_made(flag: str, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Too long once `.partial` is added, and a link that leads nowhere."""
    Path("link").symlink_to("nowhere")
    name += "x" * 20 * (flag == "--out" and name != "link")
    assert main([flag, name, "--dry-run"]) == 78
    assert f"error: {flag} {name}" in capsys.readouterr().err
