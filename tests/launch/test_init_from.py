"""Runs that start from a Hugging Face folder or a checkpoint, and end as one, started as a user starts them."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from moe_engine.prepare.tokenizer import byte_files
from tests.checkpoint.hf.small import same_tensors, save, tensors_of, theirs, transformers
from tests.launch.test_pretrain_moe import SMALL, refused, run, tokens  # noqa: F401 (a fixture)
from tools.convert_hf import main as convert

ENDS = {"bos_token_id": None, "eos_token_id": 256}
SIDE = {**byte_files.files(), "chat_template.jinja": b"{{ messages }}\n\n", "LICENSE": b"mine\r\n"}
STILL = ("--lr", "1e-30")  # no weight moves


def of_bytes(folder: Path) -> Path:
    """A folder with the tokenizer of the `tokens` beside its weights."""
    for name, content in SIDE.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mixtral in bf16 that knows bytes, experts one by one in several files."""
    model = theirs("mixtral", vocab_size=264, **ENDS).to(torch.bfloat16)
    return of_bytes(save(model, tmp_path_factory.mktemp("hf") / "hf", side=False))


@pytest.fixture(scope="module")
def imported(hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("imported") / "checkpoint"
    assert convert(["import", "--hf", str(hf), "--out", str(out)]) == 0
    return out


def test_two_ranks_from_a_folder_to_a_folder(hf: Path, tokens: Path, tmp_path: Path) -> None:  # noqa: F811
    out = tmp_path / "out"
    arguments = ("--init-from", hf, "--export-hf", out, "--out", tmp_path / "run", "--data", tokens, "--ep", "2")
    done = run(*SMALL, *arguments, ranks=2)
    assert done.code == 0, done.err
    assert f"started with the weights of {hf}" in done.out and "as mixtral: " in done.out
    for name in [*SIDE, "config.json"]:
        assert (out / name).read_bytes() == (hf / name).read_bytes(), name
    before, after = tensors_of(hf), tensors_of(out)
    assert {n: (t.dtype, t.shape) for n, t in after.items()} == {n: (t.dtype, t.shape) for n, t in before.items()}
    moved = max(float((after[name].float() - before[name].float()).abs().max()) for name in before)
    assert 0 < moved < 0.01, "two steps of 1e-3"
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and loaded.dtype == torch.bfloat16


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_weights_that_do_not_move_come_out_as_they_went_in(
    family: str, tokens: Path, tmp_path: Path  # noqa: F811
) -> None:  # fmt: skip
    changes = ENDS | ({"norm_topk_prob": True} if family != "llama" else {})
    hf = of_bytes(save(theirs(family, vocab_size=264, **changes), tmp_path / "hf", side=False))
    out = tmp_path / "out"
    common = ("--init-from", hf, "--out", tmp_path / "run", "--data", tokens)
    done = run(*SMALL, *STILL, *common, "--export-hf", out, "--hf-version", "4")
    assert done.code == 0, done.err
    same_tensors(out, hf)
    was, now = (json.loads((folder / "config.json").read_text()) for folder in (hf, out))
    assert now["rope_theta"] == was["rope_parameters"]["rope_theta"] and now["torch_dtype"] == was["dtype"]
    assert not {"rope_parameters", "dtype", "num_local_experts"} & now.keys() and now["eos_token_id"] == 256
    assert now.get("num_experts") == was.get("num_local_experts")


def test_a_checkpoint_starts_a_run_that_needs_it_no_more(
    hf: Path, imported: Path, tokens: Path, tmp_path: Path  # noqa: F811
) -> None:  # fmt: skip
    start, common = tmp_path / "start", ("--out", tmp_path / "run", "--data", tokens, *STILL)
    shutil.copytree(imported, start)
    common = (*common, "--init-from", start, "--precision", "bf16")
    done = run(*SMALL, *common)
    assert done.code == 0 and f"started with the weights of {start}" in done.out, done.err
    shutil.rmtree(start)
    again = run("--steps", "4", *SMALL[2:], *common, "--resume", "auto", "--export-hf", tmp_path / "out")
    assert again.code == 0 and "resumed from" in again.out and "started with" not in again.out, again.err
    first = tmp_path / "run" / "checkpoints" / "step-00000002"
    aside = run("--steps", "3", *SMALL[2:], *common, "--out", tmp_path / "aside", "--resume", first)
    assert aside.code == 0 and f"resumed from {first}" in aside.out, aside.err
    same_tensors(tmp_path / "out", hf)  # bf16 masters are exact, and the folder's own files were kept for this
    for name in [*SIDE, "config.json"]:
        assert (tmp_path / "out" / name).read_bytes() == (hf / name).read_bytes(), name
    anew = run(*SMALL, *common, "--out", tmp_path / "other", "--resume", "auto")
    refused(anew, 78, r"train\.init_from: found '.*start', expected a Hugging Face folder or a checkpoint")


@pytest.mark.slow
def test_case_04a_weights_with_other_tokens_are_refused_unless_insisted(
    hf: Path, tokens: Path, tmp_path: Path  # noqa: F811
) -> None:  # fmt: skip
    other = Path(shutil.copytree(hf, tmp_path / "other"))
    ends = {"eos_token": "<end>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (other / "tokenizer.json").write_bytes((hf / "tokenizer.json").read_bytes().replace(b"<|endoftext|>", b"<end>"))
    vocabulary = json.loads((other / "tokenizer.json").read_text())
    pieces = list(vocabulary["model"]["vocab"])
    vocabulary["model"]["vocab"] = {piece: i for i, piece in enumerate(reversed(pieces))}
    (other / "tokenizer.json").write_text(json.dumps(vocabulary))
    (other / "tokenizer_config.json").write_text(json.dumps(ends))
    words = rf"--data {tokens} is text as bytes \(.*the weights of {other} know the tokens of {other} \(.*--allow-other"
    refuse_first(tokens, tmp_path / "a", 78, words, "--init-from", other)
    more = ("--export-hf", tmp_path / "out", "--out", tmp_path / "run", "--data", tokens)
    done = run(*SMALL, "--init-from", other, "--allow-other-tokenizer", *more)
    assert done.code == 0, done.err
    # what was trained on goes along, and not what was insisted over
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == byte_files.files()["tokenizer.json"]
    imported = tmp_path / "imported"
    assert convert(["import", "--hf", str(other), "--out", str(imported)]) == 0
    refuse_first(tokens, tmp_path / "b", 78, rf"the weights of {imported} know the tokens of", "--init-from", imported)


@pytest.mark.slow
def test_case_11_a_run_from_nothing_exports_a_folder_that_generates(tokens: Path, tmp_path: Path) -> None:  # noqa: F811
    out = tmp_path / "out"
    done = run(*SMALL, "--export-hf", out, "--out", tmp_path / "run", "--data", tokens, "--model", "tiny")
    assert done.code == 0, done.err
    config = json.loads((out / "config.json").read_text())
    assert config["eos_token_id"] == 256 and config.get("bos_token_id") is None
    settings = json.loads((out / "tokenizer_config.json").read_text())
    assert settings["add_bos_token"] is False and settings["add_eos_token"] is False
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    given = tokenizer("what is written", return_tensors="pt")
    assert given["input_ids"][0].tolist() == list(b"what is written")
    made = model.generate(**given, max_new_tokens=4, do_sample=False, pad_token_id=256)
    assert made.shape[1] == len(b"what is written") + 4
    step = tmp_path / "run" / "checkpoints" / "step-00000002"
    recorded = json.loads((step / "manifest.json").read_text())["tokenizer"]
    assert (recorded["spec"], recorded["eos_id"], recorded["add_bos"]) == ("bytes", 256, False)
    assert convert(["export", "--checkpoint", str(step), "--out", str(tmp_path / "again")]) == 0
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes()


@pytest.fixture
def good(hf: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(hf, tmp_path / "hf"))


def refuse_first(tokens: Path, out: Path, code: int, words: str, *arguments: str | Path) -> None:  # noqa: F811
    """Refused before any step was made."""
    done = run(*SMALL, *arguments, "--out", out, "--data", tokens)
    refused(done, code, words)
    assert not (out / "metrics.jsonl").exists() or not (out / "metrics.jsonl").read_text()
    assert not (out / "checkpoints").exists() and "Step 1" not in done.out


def test_what_cannot_be_started_from(good: Path, imported: Path, tokens: Path, tmp_path: Path) -> None:  # noqa: F811
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in (tmp_path / "nothing", bare, Path("tiny")):
        refuse_first(
            tokens, tmp_path / "a", 78, r"train\.init_from: found '.*', expected a Hugging", "--init-from", path
        )
    words = r"weights are not those of the model, .* for one is .* leave --model out"
    refuse_first(tokens, tmp_path / "b", 78, words, "--init-from", good, "--model", "tiny")
    words = r"weights without a training state: start from them with --init-from"
    arguments = ("--resume", imported, "--model", imported)
    refuse_first(tokens, tmp_path / "c", 78, words, *arguments)
    damaged = tmp_path / "damaged"
    shutil.copytree(imported, damaged)
    path = damaged / "rank-00001.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    refuse_first(
        tokens, tmp_path / "d", 65, "rank-00001.safetensors: changed since it was written", "--init-from", damaged
    )
    shard = sorted(good.glob("*.safetensors"))[1]
    os.truncate(shard, shard.stat().st_size - 3)
    refuse_first(tokens, tmp_path / "e", 65, "cut short, or not complete", "--init-from", good)


def test_what_cannot_be_exported_is_refused_before_training(hf: Path, tokens: Path, tmp_path: Path) -> None:  # noqa: F811
    there = tmp_path / "there"
    there.mkdir()
    start = ("--init-from", hf)
    refuse_first(tokens, tmp_path / "a", 78, r"--export-hf .*there exists; remove it", *start, "--export-hf", there)
    for setting, words in (
        ("expert_bias_update_rate=0.01", r"model\.expert_bias_update_rate 0\.01: .* no place in a Hugging Face folder"),
        ("norm_topk_prob=false", r"model\.norm_topk_prob: no Hugging Face family .* holds False; mixtral has True"),
    ):
        export = ("--export-hf", tmp_path / "out", "--set", f"model.{setting}")
        refuse_first(tokens, tmp_path / "b", 78, words, *start, *export)
    assert not (tmp_path / "out").exists()
