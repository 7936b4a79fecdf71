"""What the tool says about a run's checkpoints, whole, damaged and compared."""

import shutil
from pathlib import Path

import pytest
import torch

from moe_engine.checkpoint.folders import steps_in
from moe_engine.checkpoint.hf.folder import HfFolder
from moe_engine.checkpoint.hf.to_checkpoint import import_folder
from moe_engine.parallel.local_ranks import run_on_ranks
from moe_engine.parallel.mesh import build_mesh
from moe_engine.train.loop import fit
from tests.checkpoint.hf.small import save, tensors_of, theirs
from tests.faults.arena import make_corpus
from tests.train.small import loop_run, session_of
from tools.inspect_checkpoint import main


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps on two ranks, with checkpoints at 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("run")
    corpus = make_corpus(tmp_path_factory.mktemp("corpus"))
    run = loop_run(corpus, folder, (1, 2, 1), settings={"zero": 2}, steps=6, save_every=2)
    run_on_ranks(lambda rank: fit(session_of(run, build_mesh(1, 2, 1))), 2)
    assert steps_in(folder / "checkpoints") == [2, 4, 6]
    return folder


def said(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    code = main([str(argument) for argument in arguments])
    return code, "".join(capsys.readouterr())


def test_overview(out: Path, capsys: pytest.CaptureFixture[str]):
    for path in (out, out / "checkpoints"):
        code, text = said(capsys, path, "--verify")
        assert code == 0 and text.count("verified") == 3 and " 1  2  1  2 " in text
    assert f"{6 * 16 * 8:15,}" in text


def test_one(out: Path, capsys: pytest.CaptureFixture[str]):
    code, text = said(capsys, out / "checkpoints" / "step-00000004", "--weights")
    assert code == 0 and "step         4 (512 tokens; 4 optimizer steps)" in text
    assert "dp 1, ep 2, tp 1, zero 2: 2 files" in text and "prose, code: step 4, seed 0, length 8" in text
    assert "[4, 32, 24]" in text and "loss         1: " in text and "5: " not in text.partition("loss         ")[2]


def test_two(out: Path, capsys: pytest.CaptureFixture[str]):
    a, b = (out / "checkpoints" / f"step-0000000{step}" for step in (2, 4))
    code, text = said(capsys, a, b, "--values")
    assert code == 1 and "step: 2 -> 4" in text and "ffn.experts.w_down: master " in text and "layout" not in text
    code, text = said(capsys, a, a)
    assert code == 0 and text.strip() == "the same, byte for byte"
    code, text = said(capsys, a, a, "--values")
    assert code == 0 and text.strip() == "the same, byte for byte"


def test_damage(out: Path, capsys: pytest.CaptureFixture[str]):
    folder = out / "checkpoints" / "step-00000006"
    path = folder / "rank-00001.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100] + bytes([whole[-100] ^ 1]) + whole[-99:])
    assert said(capsys, folder)[0] == 0  # its size holds
    code, text = said(capsys, folder, "--verify")
    assert code == 65 and "rank-00001.safetensors: changed since it was written" in text
    path.write_bytes(whole[:-1])
    code, text = said(capsys, out)
    assert code == 65 and f"rank-00001.safetensors: {len(whole) - 1} bytes, written with {len(whole)}" in text
    (folder / "manifest.json").write_text("{}")
    code, text = said(capsys, folder)
    assert code == 65 and "manifest.json: cut short or changed" in text


def test_nothing_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    code, text = said(capsys, tmp_path)
    assert code == 78 and "no checkpoint there; give a run's --out" in text


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two imports that differ in one weight by all of it; the second holds a NaN as well."""
    home, model = tmp_path_factory.mktemp("imported"), theirs("mixtral").bfloat16()
    import_folder(HfFolder(save(model, home / "a-hf")), home / "a")
    with torch.no_grad():
        model.get_parameter("model.norm.weight").mul_(2.0)
        model.get_parameter("lm_head.weight")[0, 0] = float("nan")
    import_folder(HfFolder(save(model, home / "b-hf")), home / "b", allow_nonfinite=True)
    return [home / "a", home / "b"]


def test_case_13_weights_alone_are_inspected(imported: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    """What convert_hf.py import and upcycle.py write: no optimizer, no data, no settings."""
    total = sum(tensor.numel() for tensor in tensors_of(imported[0].with_name("a-hf")).values())
    code, text = said(capsys, imported[0])
    assert code == 0 and "weights alone: a run starts from it with --init-from" in text
    assert f"{total:,} parameters in bfloat16\n" in text and "came as      mixtral, per-expert" in text
    code, text = said(capsys, imported[0], "--verify", "--weights")
    assert code == 0 and "every checksum holds" in text and "[4, 2, 24, 32]" in text
    assert "not finite   lm_head.weight: 1 NaN of 3072" in said(capsys, imported[1])[1]


def test_case_13_weights_alone_are_compared(
    imported: list[Path], out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = imported
    assert said(capsys, a, a, "--values") == (0, "the same, byte for byte\n")
    assert said(capsys, b, b, "--values") == (0, "the same, byte for byte\n"), "a NaN is where a NaN was"
    code, text = said(capsys, a, b, "--values")
    assert code == 1 and "norm.weight: master 1.000e+00\n" in text
    assert "head.weight: master 0.000e+00 and 1 NaN or infinite\n" in text
    assert text.count("\n") == 2, "nothing else differs"
    code, text = said(capsys, out / "checkpoints" / "step-00000002", a, "--values")
    assert code == 1 and "hf: None -> {'family': 'mixtral'" in text and "embedding.weight: shape" in text


def test_case_13_damaged_weights_alone_are_said(
    imported: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "a"
    shutil.copytree(imported[0], folder)
    (folder / "rank-00000.safetensors").write_bytes(b"")
    for more in ([], ["--verify"]):
        code, text = said(capsys, folder, *more)
        assert code == 65 and "rank-00000.safetensors: 0 bytes, written with" in text and "Traceback" not in text
