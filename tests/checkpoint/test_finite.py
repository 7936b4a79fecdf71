"""NaN and infinities are seen wherever they are, counted by tensor, and refused by every tool unless wished for."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moe_engine.checkpoint.finite import nonfinite
from moe_engine.checkpoint.open import Checkpoint
from tests.checkpoint.hf.small import save, tensors_of, theirs
from tools import convert_hf, upcycle

NAN, INF = float("nan"), float("inf")
NORM, DOWN = "model.norm.weight", "model.layers.1.mlp.down_proj.weight"
SAID = (f"{NORM}: 2 NaN and 1 infinite of 32", f"{DOWN}: 1 infinite of 1280")


def convert(*arguments: object) -> int:
    return convert_hf.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bf16 Llama with NaN and infinities in two tensors of different files."""
    model = theirs("llama").bfloat16()
    with torch.no_grad():
        model.get_parameter(NORM)[[3, 31]] = NAN
        model.get_parameter(NORM)[7] = INF
        model.get_parameter(DOWN)[5, 39] = -INF
    return save(model, tmp_path_factory.mktemp("broken") / "hf")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [1, 7, 16, 33, 1000])
def test_case_08_every_place_and_kind_is_seen(dtype: torch.dtype, count: int) -> None:
    """The count of a plain loop, wherever vectors and their remainders end."""
    numbers = torch.randn(count, generator=torch.Generator().manual_seed(count)).to(dtype)
    assert nonfinite(numbers) == "" and nonfinite(numbers[:0]) == ""
    for place in {0, 1, count // 2, count - 2, count - 1} & set(range(count)):
        for value, word in ((NAN, "NaN"), (INF, "infinite"), (-INF, "infinite")):
            bad = numbers.clone()
            bad[place] = value
            assert nonfinite(bad) == f"1 {word} of {count}", (place, value)


def test_case_08_import_verify_and_export_count_and_refuse(
    broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ck, out = tmp_path / "ck", tmp_path / "out"
    assert convert("import", "--hf", broken, "--out", ck) == 65
    report = capsys.readouterr().err
    assert "2 tensors hold NaN or infinite numbers" in report and all(line in report for line in SAID)
    assert "--allow-nonfinite" in report and list(tmp_path.iterdir()) == [], "nothing is left"
    assert convert("import", "--hf", broken, "--out", ck, "--allow-nonfinite") == 0
    report = capsys.readouterr().out
    assert all(line in report for line in SAID)
    assert dict(line.split(": ") for line in SAID) == Checkpoint(ck).manifest["nonfinite"]
    for command in (["verify", "--hf", broken], ["export", "--out", out]):
        assert convert(*command, "--checkpoint", ck) == 65
        report = capsys.readouterr().err
        assert all(line in report for line in SAID) and not out.exists()
        assert convert(*command, "--checkpoint", ck, "--allow-nonfinite") == 0
        report = capsys.readouterr().out
        assert all(line in report for line in SAID)
    theirs, ours = tensors_of(broken), tensors_of(out)
    assert all(torch.equal(theirs[name].view(torch.int16), ours[name].view(torch.int16)) for name in theirs)


def test_case_08_verify_says_how_far_tensors_are_in_which_some_are_no_numbers(
    broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert("import", "--hf", broken, "--out", tmp_path / "ck", "--allow-nonfinite") == 0
    other = tmp_path / "other"
    shutil.copytree(broken, other)
    for path in other.glob("*.safetensors"):
        tensors = tensors_of_file(path)
        if NORM in tensors:
            tensors[NORM][3], tensors[NORM][4] = 1.0, tensors[NORM][4] + 0.5
            save_file(tensors, path, {"format": "pt"})
    assert convert("verify", "--hf", other, "--checkpoint", tmp_path / "ck", "--allow-nonfinite") == 1
    assert f"{NORM}: differs by up to 0.5, in 3 elements by no finite number" in capsys.readouterr().out


def tensors_of_file(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def test_case_08_a_cast_that_makes_infinities_is_refused_and_one_that_keeps_them_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """fp32's largest is past bf16's as well; an infinity that was there is not the cast's."""
    model = theirs("llama")
    with torch.no_grad():
        model.get_parameter(DOWN)[0, 0] = torch.finfo(torch.float32).max
        model.get_parameter(NORM)[0] = INF
    hf, ck = save(model, tmp_path / "hf"), tmp_path / "ck"
    assert convert("import", "--hf", hf, "--out", ck, "--allow-nonfinite") == 0
    export = ["export", "--checkpoint", ck, "--allow-nonfinite", "--out"]
    for dtype, words in (("bfloat16", "past bfloat16's largest, 3.38953e+38; use --dtype float32"),
                         ("float16", "past float16's largest, 65504; use --dtype bfloat16")):  # fmt: skip
        assert convert(*export, tmp_path / "out", "--dtype", dtype) == 65
        assert words in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert convert(*export, tmp_path / "out", "--dtype", "float32") == 0


@pytest.mark.parametrize("method", ["copy", "clustering"])
@pytest.mark.parametrize("form", ["hf", "checkpoint"])
def test_case_08_such_a_parent_is_not_upcycled(
    method: str, form: str, broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--experts", "4", "--top-k", "2", "--receipt-tokens", "0", "--format", form]
    more = ["--hf", str(broken), "--method", method, "--out", str(tmp_path / "out"), *sizes]
    assert upcycle.main(more) == 65
    report = capsys.readouterr().err
    assert "NaN or infinite numbers" in report and "1 infinite of 1280" in report and not (tmp_path / "out").exists()
    if method == "copy":
        assert upcycle.main([*more, "--allow-nonfinite"]) == 0
