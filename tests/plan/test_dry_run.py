"""--dry-run refuses what the run would refuse, and says where the run would start."""

import json
import re
from pathlib import Path

import pytest

from launch.pretrain_moe import main
from moe_engine.checkpoint.manifest import write_manifest
from moe_engine.config.command_line import load
from moe_engine.prepare.default import NAME
from moe_engine.prepare.pipeline import PrepareOptions, prepare
from tests.checkpoint.hf.small import save, theirs


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")  # the launcher sets it: put back after the test


def checkpoint(step: int) -> Path:
    """One of a run of the default model, as far as its manifest goes."""
    folder = Path(f"run/checkpoints/step-{step:08d}")
    folder.mkdir(parents=True)
    run = load(["--steps", str(step)], 1).run.model_dump(mode="json")
    order = {"seed": 0, "seq_length": run["train"]["seq_length"], "domains": [NAME]}
    write_manifest(folder, {"run": run, "step": step, "files": {}, "data": order})
    return folder


def dry(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str]:
    capsys.readouterr()
    code = main([*map(str, arguments), "--dry-run"])
    printed = capsys.readouterr()
    return code, printed.out + printed.err


def test_a_new_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, said = dry(capsys, "--export-hf", "new")
    assert code == 0 and "start       afresh" in said and "export      new" in said and said.endswith("ok\n")
    assert not list(tmp_path.iterdir())


def test_where_it_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint(10)
    newer = checkpoint(20)
    code, said = dry(capsys, "--out", "run", "--resume", "auto", "--steps", "30")
    assert code == 0 and f"start       from {newer}, 20 steps done" in said
    assert "train.steps was 20 until the checkpoint and is 30" in said and "domains" not in said
    (newer / "manifest.json").write_text(json.dumps({"cut": "short"}))
    code, said = dry(capsys, "--out", "run", "--resume", "auto")
    assert code == 0 and "step-00000010, 10 steps done" in said


def test_weights_that_know_tokens_get_bytes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    save(theirs("llama", vocab_size=320), tmp_path / "hf", shard="1GB", side=False)
    sizes = ("--init-from", "hf", "--seq-length", "16")
    assert dry(capsys, *sizes)[0] == 0  # no tokenizer lies there: they may know bytes
    (tmp_path / "hf" / "tokenizer.json").write_text("{}")
    code, said = dry(capsys, *sizes)
    assert code == 78 and "beside the weights of hf cannot be used: tokenizer hf: not a Hugging Face tokenizer" in said
    code, said = dry(capsys, *sizes, "--allow-other-tokenizer")
    assert code == 0 and "start       with the weights of hf" in said


@pytest.mark.parametrize(
    ("arguments", "code", "wanted"),
    [
        (("--out", "file/run"), 78, "--out file/run: .*file cannot be written to"),
        (("--out", "run"), 78, "--out run holds checkpoints of an earlier run"),
        (("--out", "other", "--resume", "run"), 78, "--resume run: no manifest.json there"),
        (("--out", "run", "--resume", "auto", "--model", "llama-3.2-1b"), 78, "hidden_size is 128 there and 2048"),
        (("--out", "run", "--resume", "auto", "--set", "train.seed=7"), 78, "train.seed: found 7, and 0 in the check"),
        (("--out", "blocked"), 78, "blocked.checkpoints is no folder that can be written to"),
        (("--export-hf", "file/x"), 78, "--export-hf file/x: .*file cannot be written to"),
        (("--export-hf", "file"), 78, "--export-hf file exists"),
        (("--tokenizer", "gpt2"), 78, "tokenizer gpt2: no such file"),
        (("--set", "model.vocab_size=200"), 65, "200 is too small for the default corpus, which has 257 ids"),
        (("--init-from", "hf", "--model", "tiny"), 78, r"hf: \d+ weights are not those of the model"),
        (("--data", "data", "--seq-length", "512"), 65, "do not fill one window of 512"),
    ],
)
def test_refusals(
    arguments: tuple[str, ...], code: int, wanted: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    checkpoint(20)
    Path("blocked").mkdir()
    Path("blocked/checkpoints").touch()
    Path("file").write_text("a short text")
    if "hf" in arguments:
        save(theirs("llama"), tmp_path / "hf", shard="1GB", side=False)
    if "--data" in arguments:
        prepare({"data": ["file"]}, "data", None, PrepareOptions(eval_fraction=0.0), quiet=True)
    found, said = dry(capsys, *arguments)
    assert found == code and "\nok\n" not in said
    (line,) = said.splitlines()
    assert re.search(wanted, line), line


def test_the_data_of_a_run_that_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    Path("text.txt").write_text("some words\n" * 1000)
    prepare({"data": ["text.txt"]}, "data", None, PrepareOptions(), quiet=True)
    folder = checkpoint(20)
    state = {"step": 20, "seed": 0, "seq_length": 128, "domains": ["data"], "datasets": [], "mixture": {}}
    run = load(["--data", "data"], 1).run.model_dump(mode="json")
    write_manifest(folder, {"run": run, "step": 20, "files": {}, "data": state})
    code, said = dry(capsys, "--out", "run", "--resume", "auto", "--data", "data")
    assert code == 78 and "train.seq_length: found 256, and 128 in the checkpoint" in said
    code, said = dry(capsys, "--out", "run", "--resume", "auto", "--seq-length", "128")
    assert code == 78 and "data.domains: found ['stdlib'], and ['data'] in the checkpoint" in said
