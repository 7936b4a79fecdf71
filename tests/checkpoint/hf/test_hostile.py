"""Folders that are broken or mean harm are refused in one report, and nothing is written."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moe_engine.checkpoint.hf.export import ExportOptions, target_of
from moe_engine.config import Model
from moe_engine.errors import EngineError
from tests.checkpoint.hf.small import edit_index, save, tensors_of, theirs
from tools.convert_hf import main

INDEX = "model.safetensors.index.json"
GATE = "model.layers.0.block_sparse_moe.gate.weight"
MODEL = Model(vocab_size=4, hidden_size=8, intermediate_size=4, num_hidden_layers=1, num_attention_heads=2)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(theirs("mixtral"), tmp_path_factory.mktemp("good") / "hf")


def shard(folder: Path, number: int = 0) -> Path:
    return sorted(folder.glob("model-*.safetensors"))[number]


def rewrite(folder: Path, number: int, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = shard(folder, number)
    index = json.loads((folder / INDEX).read_text())["weight_map"]
    tensors = {name: tensor for name, tensor in tensors_of(folder).items() if index[name] == path.name}
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def symlinked(folder: Path) -> None:
    path = shard(folder)
    shutil.move(path, folder.parent / "elsewhere.safetensors")
    path.symlink_to(folder.parent / "elsewhere.safetensors")


def truncated(folder: Path) -> None:
    os.truncate(shard(folder, 1), shard(folder, 1).stat().st_size - 3)


def missing_expert(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    file = index["weight_map"].pop(name)
    (folder / INDEX).write_text(json.dumps(index))
    number = [path.name for path in sorted(folder.glob("model-*.safetensors"))].index(file)
    path = shard(folder, number)
    tensors = {n: t for n, t in tensors_of(folder).items() if index["weight_map"].get(n) == file}
    save_file(tensors, path)


def twice_in_index(folder: Path) -> None:
    text = (folder / INDEX).read_text()
    name = json.dumps(GATE)
    (folder / INDEX).write_text(text.replace(f"{name}:", f'{name}: "x.safetensors", {name}:', 1))


def twice_in_files(folder: Path) -> None:
    rewrite(folder, -1, lambda tensors: tensors.update({GATE: torch.zeros(4, 32)}))


def mixed(folder: Path) -> None:
    rewrite(folder, -1, lambda t: t.update({"model.layers.0.mlp.experts.down_proj": torch.zeros(4, 32, 24)}))
    edit_index(folder, {"model.layers.0.mlp.experts.down_proj": shard(folder, -1).name})


def wrong_shape(folder: Path) -> None:
    config(folder, num_key_value_heads=2)


def quantised(folder: Path) -> None:
    rewrite(folder, 0, lambda tensors: tensors.update({k: v.to(torch.int8) for k, v in list(tensors.items())[:1]}))


def header_of_the_moon(folder: Path) -> None:
    path = shard(folder)
    path.write_bytes((1 << 60).to_bytes(8, "little") + path.read_bytes()[8:])


def pipe(folder: Path) -> None:
    shard(folder).unlink()
    os.mkfifo(folder / "model-00001-of-00009.safetensors")
    edit_index(folder, {GATE: "model-00001-of-00009.safetensors"})


def offsets(folder: Path, value: object) -> None:
    path = shard(folder)
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    next(row for name, row in header.items() if name != "__metadata__")["data_offsets"] = value
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


BROKEN: dict[str, tuple[Callable[[Path], object], int, str]] = {
    "parent": (lambda f: edit_index(f, {GATE: "../model.safetensors"}), 65, "expected the name of a .safetensors file"),
    "absolute": (lambda f: edit_index(f, {GATE: "/etc/passwd"}), 65, "expected the name of a .safetensors file"),
    "number": (lambda f: edit_index(f, {GATE: 7}), 65, "expected the name of a .safetensors file"),
    "pickle": (lambda f: edit_index(f, {GATE: "pytorch_model.bin"}), 65, "expected the name of a .safetensors file"),
    "symlink": (symlinked, 65, "a link to elsewhere"),
    "not there": (lambda f: shard(f).unlink(), 65, "is the download complete"),
    "pipe": (pipe, 65, "missing, or no regular file"),
    "truncated": (truncated, 65, "cut short"),
    "long header": (header_of_the_moon, 65, "a header of"),
    "offsets that are words": (lambda f: offsets(f, ["a", "b"]), 65, "no safetensors header"),
    "three offsets": (lambda f: offsets(f, [0, 1, 2]), 65, "no safetensors header"),
    "no offsets": (lambda f: offsets(f, [None, None]), 65, "no safetensors header"),
    "endless layers": (lambda f: config(f, num_hidden_layers=10**9), 65, "num_hidden_layers 1000000000 of"),
    "two ropes": (
        lambda f: config(f, rope_scaling={"rope_type": "linear", "factor": 2.0}),
        78,
        "rope_parameters and rope_scaling are both given",
    ),
    "missing expert": (missing_expert, 65, r"lacks model.layers.1.block_sparse_moe.experts.2.w3.weight"),
    "twice in index": (twice_in_index, 65, "is there twice"),
    "twice in files": (twice_in_files, 65, "holds what the index does not place there"),
    "mixed": (mixed, 65, "does not have: model.layers.0.mlp.experts.down_proj"),
    "wrong shape": (wrong_shape, 65, r"shape \[32, 32\], expected \[16, 32\]"),
    "quantised": (quantised, 65, "quantised weights are not read"),
    "top_k": (lambda f: config(f, num_experts_per_tok=5), 78, "num_experts_per_tok 5 is more than"),
    "experts": (lambda f: config(f, num_local_experts=6), 65, "lacks .*experts.4.w1"),
    "no config": (lambda f: (f / "config.json").unlink(), 78, "no config.json"),
    "other family": (
        lambda f: config(f, model_type="gpt_oss"),
        78,
        "config.json: model_type: found 'gpt_oss', expected llama",
    ),
    "window": (lambda f: config(f, sliding_window=0), 78, "sliding_window"),
    "bias": (lambda f: config(f, attention_bias=True), 78, "attention_bias"),
    "index": (lambda f: (f / INDEX).write_text("[1]"), 65, "no index of safetensors files"),
    "nested index": (lambda f: (f / INDEX).write_text("[" * 100_000), 65, "no index of safetensors files"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_refused_and_nothing_written(name: str, good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    breaks, code, words = BROKEN[name]
    folder = tmp_path / "hf"
    shutil.copytree(good, folder)
    breaks(folder)
    assert main(["import", "--hf", str(folder), "--out", str(tmp_path / "out")]) == code
    report = capsys.readouterr().err
    assert re.search(words, report), report
    assert report.startswith("error: ") and "Traceback" not in report
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_the_cache_of_the_hub_is_read(good: Path, tmp_path: Path) -> None:
    """snapshots/REVISION/FILE are links to blobs/DIGEST of the same repository."""
    repository = tmp_path / "models--a--b"
    (repository / "blobs").mkdir(parents=True)
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(good.iterdir())):
        shutil.copy(path, repository / "blobs" / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    assert main(["import", "--hf", str(snapshot), "--out", str(tmp_path / "out")]) == 0
    assert main(["verify", "--hf", str(good), "--checkpoint", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == (good / "tokenizer.model").read_bytes()


def test_what_is_there_is_not_overwritten(good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    assert main(["import", "--hf", str(good), "--out", str(tmp_path / "out")]) == 78
    assert "exists; remove it or choose another name" in capsys.readouterr().err
    assert (tmp_path / "out" / "mine").read_text() == "x"


def test_verify_sees_one_bit(good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import", "--hf", str(good), "--out", str(tmp_path / "out")]) == 0
    other = tmp_path / "other"
    shutil.copytree(good, other)
    path = shard(other)
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    assert main(["verify", "--hf", str(other), "--checkpoint", str(tmp_path / "out")]) == 1
    assert "differs by up to" in capsys.readouterr().out


def test_verify_sees_another_function_and_other_files(
    good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["import", "--hf", str(good), "--out", str(tmp_path / "out")]) == 0
    other = tmp_path / "other"
    shutil.copytree(good, other)
    config(other, rms_norm_eps=1e-2)
    (other / "tokenizer.json").write_text("{}")
    assert main(["verify", "--hf", str(other), "--checkpoint", str(tmp_path / "out")]) == 1
    out = capsys.readouterr().out
    assert "model.rms_norm_eps: 0.01 in the folder" in out and "tokenizer.json: another" in out


def test_numbers_past_float16_and_options_that_cannot_be_are_refused(
    good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    large = tmp_path / "large"
    shutil.copytree(good, large)
    rewrite(large, 0, lambda tensors: next(iter(tensors.values())).fill_(1e6))
    assert main(["import", "--hf", str(large), "--out", str(tmp_path / "ck")]) == 0
    for more, code, words in (
        (["--dtype", "float16"], 65, "past float16's largest"),
        (["--family", "llama"], 78, "cannot be written as llama"),
        (["--shard-gb", "nan"], 78, "--shard-gb nan"),
        (["--shard-gb", "0"], 78, "--shard-gb 0"),
        (["--hf-version", "4", "--expert-layout", "fused"], 78, "transformers 4 reads experts one by one"),
    ):
        assert main(["export", "--checkpoint", str(tmp_path / "ck"), "--out", str(tmp_path / "hf"), *more]) == code
        assert words in capsys.readouterr().err and not (tmp_path / "hf").exists()


def test_a_damaged_checkpoint_is_not_exported(good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import", "--hf", str(good), "--out", str(tmp_path / "out")]) == 0
    path = tmp_path / "out" / "rank-00001.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    assert main(["export", "--checkpoint", str(tmp_path / "out"), "--out", str(tmp_path / "hf")]) == 65
    assert "changed since it was written" in capsys.readouterr().err and not (tmp_path / "hf").exists()


def test_a_stored_head_of_a_tied_model_must_be_the_embedding(tmp_path: Path) -> None:
    folder = save(theirs("llama", tie_word_embeddings=True), tmp_path / "hf", shard="1GB")
    tensors = tensors_of(folder)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    from moe_engine.checkpoint.hf.folder import HfFolder

    assert "head.weight" not in HfFolder(folder).shapes
    tensors["lm_head.weight"] += 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(EngineError, match=r"lm_head\.weight differs from"):
        HfFolder(folder)


@pytest.mark.parametrize("config", [b"{", b"[1]", b"[" * 100_000])
def test_a_damaged_config_that_a_run_kept_is_said(config: bytes) -> None:
    manifest = {"run": {"train": {"precision": "bf16"}}}
    with pytest.raises(EngineError, match=r"config\.json that came with the weights"):
        target_of(manifest, MODEL, {"config.json": config}, ExportOptions())


@pytest.mark.parametrize(("said", "dtype"), [("float16", torch.float16), ("load", torch.bfloat16), (7, torch.bfloat16)])
def test_the_dtype_of_a_run_stands_in_for_one_that_is_none(said: object, dtype: torch.dtype) -> None:
    manifest = {"run": {"train": {"precision": "bf16"}}}
    side = {"config.json": json.dumps({"torch_dtype": said}).encode()}
    assert target_of(manifest, MODEL, side, ExportOptions()).dtype == dtype
