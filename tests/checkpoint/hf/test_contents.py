"""Which weights of a folder are read, and what goes along with them: as transformers loads it, and byte for byte."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moe_engine.checkpoint.hf.contents import contents_of
from moe_engine.checkpoint.hf.folder import HfFolder
from moe_engine.checkpoint.hf.side_files import of_checkpoint
from moe_engine.checkpoint.manifest import file_in
from moe_engine.checkpoint.open import Checkpoint
from moe_engine.checkpoint.weights_only import write_weights
from moe_engine.errors import ConfigError, DataError
from moe_engine.parallel.mesh import Mesh
from tests.checkpoint.hf.small import SIDE, edit_index, ours, save, tensors_of, theirs, transformers
from tools.convert_hf import main

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
TOKENS = torch.arange(24).view(2, 12)


@pytest.fixture(scope="module")
def models() -> list[torch.nn.Module]:
    """Two models of one shape with other weights."""
    first, second = theirs("llama"), theirs("llama")
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.mul_(1.25)
    return [first, second]


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def logits_here(path: Path) -> torch.Tensor:
    """Of the engine's model on the weights of a folder or a checkpoint."""
    source = Checkpoint(path) if (path / "manifest.json").is_file() else HfFolder(path)
    with torch.no_grad():
        model = HfFolder(path).model if isinstance(source, HfFolder) else None
        decoder = ours(source, model or HfFolder(path.parent / "hf").model, Mesh())
        return decoder.logits(TOKENS, torch.arange(12).expand_as(TOKENS)).view(2, 12, -1)


def logits_there(path: Path) -> torch.Tensor:
    """What transformers computes of a folder; no key may be missing."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        return model(TOKENS).logits


def both(models: list[torch.nn.Module], folder: Path, keep_shards: bool) -> Path:
    """The first model in shards, then the second in one file, as two saves into one folder leave them."""
    save(models[0], folder)
    shards = {path: path.read_bytes() for path in folder.glob("model-*.safetensors")}
    save(models[1], folder, shard="1GB")
    assert (folder / SINGLE).exists() and (folder / INDEX).exists(), "transformers leaves the old index"
    for path, content in shards.items() if keep_shards else ():
        path.write_bytes(content)
    return folder


@pytest.mark.parametrize("keep_shards", [False, True])
def test_case_01_the_set_is_the_one_that_transformers_loads(
    keep_shards: bool, models: list[torch.nn.Module], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hf = both(models, tmp_path / "hf", keep_shards)
    assert run("import", "--hf", hf, "--out", tmp_path / "ck") == 0
    assert run("verify", "--hf", hf, "--checkpoint", tmp_path / "ck") == 0
    said = capsys.readouterr().out
    first = "model-00001-of-" if keep_shards else INDEX
    assert said.count(f"weights of {hf} ({SINGLE}; not read: {first}") == 2, said
    wanted = logits_there(hf)
    for path in (hf, tmp_path / "ck"):
        assert float((logits_here(path) - wanted).abs().max() / wanted.abs().max()) < 1e-5, path
    assert run("export", "--checkpoint", tmp_path / "ck", "--out", tmp_path / "out") == 0
    assert torch.equal(logits_there(tmp_path / "out"), wanted) and not (tmp_path / "out" / INDEX).exists()


def test_case_01_an_index_of_the_single_file_and_leftovers_are_no_second_set(
    models: list[torch.nn.Module], tmp_path: Path
) -> None:
    one = save(models[0], tmp_path / "one", shard="1GB")
    names = dict.fromkeys(tensors_of(one), SINGLE)
    (one / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))
    many = save(models[0], tmp_path / "many")
    for name in ("model-00001-of-00002.safetensors", "model.fp16.safetensors", "consolidated.safetensors"):
        shutil.copy(one / SINGLE, many / name)
    (many / "pytorch_model.bin").write_bytes(b"a pickle")
    assert torch.equal(logits_here(one), logits_here(many))
    assert str(HfFolder(many)).endswith(
        "consolidated.safetensors, model-00001-of-00002.safetensors, model.fp16.safetensors, pytorch_model.bin)"
    )


def test_case_01_a_single_file_that_is_not_the_model_is_refused_with_both_names(
    models: list[torch.nn.Module], tmp_path: Path
) -> None:
    """A shard that bears the name of a whole model: transformers would draw the rest at random."""
    hf = save(models[0], tmp_path / "hf")
    shard = sorted(hf.glob("model-*.safetensors"))[0]
    edit_index(hf, {name: SINGLE for name, file in index_of(hf).items() if file == shard.name})
    shard.rename(hf / SINGLE)
    with pytest.raises(DataError, match=rf"lacks [\s\S]*{SINGLE} is read first[\s\S]*{INDEX} is there"):
        HfFolder(hf)
    os.truncate(hf / SINGLE, 100)
    with pytest.raises(DataError, match=rf"{SINGLE}: .*(damaged|cut short)[\s\S]*{INDEX} is there too"):
        HfFolder(hf)


def index_of(folder: Path) -> dict[str, str]:
    return json.loads((folder / INDEX).read_text())["weight_map"]


def test_case_01_a_set_that_config_json_names_is_refused(models: list[torch.nn.Module], tmp_path: Path) -> None:
    """transformers would load it and nothing else."""
    hf = save(models[0], tmp_path / "hf", shard="1GB")
    save(models[1], tmp_path / "other", shard="1GB")
    shutil.copy(tmp_path / "other" / SINGLE, hf / "second.safetensors")
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps(config | {"transformers_weights": "second.safetensors"}))
    assert torch.equal(logits_there(hf), logits_there(tmp_path / "other"))
    with pytest.raises(ConfigError, match=rf"'second\.safetensors' as its weights .* {SINGLE} and {INDEX} are"):
        HfFolder(hf)


def test_case_01_an_adapter_beside_the_weights_is_refused(models: list[torch.nn.Module], tmp_path: Path) -> None:
    """transformers adds it to the weights where peft is installed, and leaves it out where it is not."""
    hf = save(models[0], tmp_path / "hf")
    (hf / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"adapter_config\.json is there too.*merge"):
        HfFolder(hf)


OTHERS = {
    "additional_chat_templates/tool_use.jinja": b"{{ tools }}\r\n",
    "tokenization_mine.py": b"raise SystemExit('never run')\n",
    "LICENSE.md": "Lizenz für alle".encode(),
    ".gitattributes": b"*.safetensors filter=lfs\n",
    "a/b/c.bin.txt": bytes(range(256)),
    "original/params.json": b"{}",
    "empty": b"",
}
STAY = {
    ".git/config": b"url = secret",
    ".cache/huggingface/x.lock": b"",
    "__pycache__/m.pyc": b"x",
    "pytorch_model.bin": b"p",
    "original/consolidated.00.pth": b"p",
    "model.gguf": b"g",
    "onnx/model.onnx": b"o",
    "tf_model.h5": b"h",
    "flax_model.msgpack": b"f",
    "model.safetensors.index.fp16.json": b"{}",
    "checkpoint-5/config.json": b"{}",
    "checkpoint-5/trainer_state.json": b"{}",
    "checkpoint-5/optimizer.pt": b"p",
}


def put(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def side_in(folder: Path) -> dict[str, bytes]:
    """Every file of an exported folder but its weights, found without the code under test."""
    paths = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    names = {path.relative_to(folder).as_posix(): path for path in paths}
    return {n: p.read_bytes() for n, p in names.items() if not n.endswith(".safetensors") and n != INDEX}


def test_case_07_every_file_that_is_no_weight_goes_along(
    models: list[torch.nn.Module], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hf = save(models[0], tmp_path / "hf")
    put(hf, OTHERS | STAY)
    (hf / "tokenizer.json").rename(hf / "a" / "tok.json")
    (hf / "tokenizer.json").symlink_to("a/tok.json")
    (hf / "config.json").rename(hf / "a" / "config.json")
    (hf / "config.json").symlink_to(Path("a") / "config.json")
    wanted = {name: (hf / name).read_bytes() for name in [*OTHERS, *SIDE, "config.json", "a/config.json", "a/tok.json"]}
    assert run("import", "--hf", hf, "--out", tmp_path / "ck") == 0
    assert run("verify", "--hf", hf, "--checkpoint", tmp_path / "ck") == 0
    assert run("export", "--checkpoint", tmp_path / "ck", "--out", tmp_path / "out") == 0
    assert side_in(tmp_path / "out") == wanted
    assert run("verify", "--hf", tmp_path / "out", "--checkpoint", tmp_path / "ck") == 0
    capsys.readouterr()
    (hf / "additional_chat_templates" / "tool_use.jinja").write_bytes(b"another")
    (hf / "LICENSE.md").unlink()
    (hf / "new.txt").write_bytes(b"")
    assert run("verify", "--hf", hf, "--checkpoint", tmp_path / "ck") == 1
    said = capsys.readouterr().out
    for line in ("tool_use.jinja: another than", "LICENSE.md: only in the checkpoint", "new.txt: only in the folder"):
        assert line in said


def test_case_07_links_into_the_cache_of_the_hub(models: list[torch.nn.Module], tmp_path: Path) -> None:
    good = save(models[0], tmp_path / "good")
    put(good, OTHERS)
    repository = tmp_path / "models--a--b"
    snapshot = repository / "snapshots" / "0123"
    (repository / "blobs").mkdir(parents=True)
    for number, path in enumerate(sorted(path for path in good.rglob("*") if path.is_file())):
        shutil.copy(path, repository / "blobs" / str(number))
        link = snapshot / path.relative_to(good)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(repository / "blobs" / str(number), link.parent))
    assert run("import", "--hf", snapshot, "--out", tmp_path / "ck") == 0
    assert run("verify", "--hf", good, "--checkpoint", tmp_path / "ck") == 0
    assert run("export", "--checkpoint", tmp_path / "ck", "--out", tmp_path / "out") == 0
    assert side_in(tmp_path / "out") == side_in(good)


@pytest.mark.parametrize("kind", ["link out", "link up", "link to a folder", "link to nothing", "pipe", "manifest"])
def test_case_07_what_can_neither_go_along_nor_stay_is_refused(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    put(folder, {"config.json": b"{}", "sub/x": b"x"})
    put(tmp_path, {"secret": b"s"})
    link = folder / "sub" / "README.md"
    words = "a link to elsewhere, which is not followed"
    if kind == "link out":
        link.symlink_to(tmp_path / "secret")
    elif kind == "link up":
        link.symlink_to("../../secret")
    elif kind == "link to a folder":
        link.symlink_to(folder, target_is_directory=True)
    elif kind == "link to nothing":
        link.symlink_to("nothing")
        words = "a link to nothing"
    elif kind == "pipe":
        os.mkfifo(link)
        words = "no regular file"
    else:
        put(folder, {"manifest.json": b"{}"})
        words = "checkpoints have a file of this name themselves"
    with pytest.raises(DataError, match=words):
        contents_of(folder)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "sub/../../x", ".git/config", "link/x", "sub/nothing", "sub"])
def test_case_07_a_manifest_names_no_file_elsewhere(name: str, tmp_path: Path) -> None:
    put(tmp_path, {"x": b"1", "ck/sub/x": b"2", "ck/.git/config": b"3", "elsewhere/x": b"4"})
    (tmp_path / "ck" / "link").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert file_in(tmp_path / "ck", "sub/x").read_bytes() == b"2"
    with pytest.raises(DataError, match="missing or no regular file"):
        file_in(tmp_path / "ck", name)


def test_case_07_a_checkpoint_imported_before_keeps_its_files(
    models: list[torch.nn.Module], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It has no sub-folders, and lacks what was left behind then; what lies beside its files is damage, as before."""
    hf = save(models[0], tmp_path / "hf")
    folder = HfFolder(hf)
    assert run("import", "--hf", hf, "--out", tmp_path / "new") == 0
    pieces = [{s.key: s.piece for stored in folder.stored.values() for s in stored}]
    came = {"family": "llama", "layout": "dense"}
    write_weights(folder, folder.model, pieces, dict(list(SIDE.items())[:2]), came, tmp_path / "old", "x")
    assert of_checkpoint(tmp_path / "old") == dict(list(SIDE.items())[:2])
    assert run("export", "--checkpoint", tmp_path / "old", "--out", tmp_path / "out") == 0
    for stray in ("stray", "additional_chat_templates/x"):
        put(tmp_path / "new", {stray: b"x"})
        assert run("export", "--checkpoint", tmp_path / "new", "--out", tmp_path / "again") == 65
        assert "not a file of this checkpoint" in capsys.readouterr().err
        shutil.rmtree(tmp_path / "new" / stray.split("/")[0]) if "/" in stray else (tmp_path / "new" / stray).unlink()
    assert run("verify", "--hf", hf, "--checkpoint", tmp_path / "new") == 0


@pytest.mark.parametrize(("family", "shard"), [("llama", "1GB"), ("mixtral", "30KB")])
def test_case_18b_a_tied_model_may_store_its_head_alone(family: str, shard: str, tmp_path: Path) -> None:
    model = theirs(family, tie_word_embeddings=True)
    hf = save(model, tmp_path / "hf", shard="1GB")
    tensors = tensors_of(hf)
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    if shard == "1GB":
        save_file(tensors, hf / SINGLE, {"format": "pt"})
    else:
        (hf / SINGLE).unlink()
        names = sorted(tensors)
        halves = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
        for file, mine in halves.items():
            save_file({name: tensors[name] for name in mine}, hf / file, {"format": "pt"})
        weight_map = {name: file for file, mine in halves.items() for name in mine}
        (hf / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    with torch.no_grad():
        wanted = model(TOKENS).logits
    assert torch.equal(logits_there(hf), wanted), "transformers reads it"
    assert float((logits_here(hf) - wanted).abs().max() / wanted.abs().max()) < 1e-5
    assert run("import", "--hf", hf, "--out", tmp_path / "ck") == 0
    assert run("verify", "--hf", hf, "--checkpoint", tmp_path / "ck") == 0
    assert run("export", "--checkpoint", tmp_path / "ck", "--out", tmp_path / "out") == 0
    assert torch.equal(logits_there(tmp_path / "out"), wanted)
