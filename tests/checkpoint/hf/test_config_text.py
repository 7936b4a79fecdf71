"""The config.json of a folder on its way: what conversions say of it, and which of its bytes come out again."""

import json
from pathlib import Path

import pytest
import torch

from moe_engine.checkpoint.hf.export import ExportOptions, target_of
from moe_engine.checkpoint.hf.first_weights import changes_of
from moe_engine.checkpoint.hf.folder import HfFolder
from moe_engine.checkpoint.hf.write import Target, config_text
from moe_engine.checkpoint.shard import Entry
from moe_engine.config import Run
from moe_engine.config.command_line import load
from moe_engine.config.hf import model_from_hf
from moe_engine.errors import ConfigError
from tests.checkpoint.hf.small import save, tensors_of, theirs
from tests.config.test_hf import LLAMA
from tools.convert_hf import main as convert
from tools.upcycle import main as upcycle

WEIGHTS = {"w": Entry(torch.bfloat16, (2, 2))}


def text(config: dict, **change: object) -> bytes:
    """What is written of a llama's config.json, which came along."""
    side = {"config.json": json.dumps(config).encode()}
    return config_text(model_from_hf(config), Target("llama", "dense", side=side)._replace(**change), WEIGHTS)


def test_case_02_a_config_is_kept_where_both_versions_read_it() -> None:
    four = LLAMA | {"rope_theta": 5e5, "torch_dtype": "bfloat16", "transformers_version": "4.40.0"}
    newer = LLAMA | {"rope_theta": 5e5, "dtype": "bfloat16"}  # as 4.57.1
    five = LLAMA | {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "dtype": "bfloat16"}
    default = LLAMA | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "dtype": "bfloat16"}
    for config in (four, newer, default):
        assert text(config) == text(config, untouched=True) == json.dumps(config).encode()
    assert text(five, untouched=True) == json.dumps(five).encode(), "an import that is exported"
    both = json.loads(text(five))
    assert both["rope_theta"] == 5e5 and both["rope_parameters"] == five["rope_parameters"]
    assert {"torch_dtype", "dtype"} <= both.keys()
    for config in (four, newer, five):
        old, new = (json.loads(text(config, version=version, untouched=True)) for version in (4, 5))
        assert {"torch_dtype", "rope_theta"} <= old.keys() and not {"dtype", "rope_parameters"} & old.keys()
        assert {"dtype", "rope_parameters"} <= new.keys() and not {"torch_dtype", "rope_theta"} & new.keys()


def test_case_02_the_parents_own_code_does_not_come_along() -> None:
    carried = LLAMA | {"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}, "eos_token_id": 7}
    side = {"config.json": json.dumps(carried).encode()}
    model = model_from_hf(LLAMA).model_copy(update={"num_local_experts": 4})
    written = json.loads(config_text(model, Target("mixtral", "per-expert", side=side), WEIGHTS))
    assert "auto_map" not in written and written["eos_token_id"] == 7


def test_case_18a_conversions_say_what_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf = save(theirs("llama"), tmp_path / "hf", shard="1GB")
    path = hf / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"unsloth_fixed": True, "sliding_window": 4096}))
    said = f"warning: {path}: unsloth_fixed: no key of transformers' llama, changes nothing\n"
    assert convert(["import", "--hf", str(hf), "--out", str(tmp_path / "checkpoint")]) == 0
    assert said in capsys.readouterr().err
    assert convert(["verify", "--hf", str(hf), "--checkpoint", str(tmp_path / "checkpoint")]) == 0
    assert said in capsys.readouterr().err
    assert convert(["export", "--checkpoint", str(tmp_path / "checkpoint"), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "config.json").read_bytes() == path.read_bytes()
    flags = ["--method", "copy", "--experts", "2", "--receipt-tokens", "0", "--hf-version", "4"]
    assert upcycle(["--hf", str(hf), "--out", str(tmp_path / "up"), *flags]) == 0
    assert said in capsys.readouterr().err
    config = json.loads((tmp_path / "up" / "config.json").read_text())
    assert not {"unsloth_fixed", "dtype", "rope_parameters"} & config.keys() and config["sliding_window"] is None
    source = HfFolder(hf)
    longer = source.model.model_copy(update={"max_position_embeddings": 8192})
    assert changes_of(source, source.model) == changes_of(source, longer) == [], "its window is no shorter than it"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sliding_window": 64}))
    source = HfFolder(hf)
    assert changes_of(source, source.model) == []
    assert changes_of(source, longer) == [line for line in source.notes if "sliding_window: 64" in line] != []
    assert HfFolder(tmp_path / "up").notes == [] and config["rope_theta"] == 1e4


@pytest.mark.parametrize(("words", "dtype"), [("fp16 float16", torch.float16), ("bf16 bfloat16", torch.bfloat16)])
def test_case_20a_either_word_for_a_dtype(
    words: str, dtype: torch.dtype, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(["import", "--hf", str(save(theirs("llama"), tmp_path / "hf")), "--out", str(tmp_path / "ck")]) == 0
    for word in words.split():
        arguments = ["export", "--checkpoint", str(tmp_path / "ck"), "--out", str(tmp_path / word), "--dtype", word]
        assert convert(arguments) == 0
        assert {tensor.dtype for tensor in tensors_of(tmp_path / word).values()} == {dtype}
        assert json.loads((tmp_path / word / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


def test_case_20a_a_run_knows_torchs_words(tmp_path: Path) -> None:
    for words, ours in (("bf16 bfloat16", "bf16"), ("fp32 float32", "fp32")):
        for word in words.split():
            run = load(["--precision", word], 1).run
            assert run.train.precision == ours and Run.model_validate(run.model_dump()) == run
            (tmp_path / "run.yaml").write_text(f"train: {{precision: {word}}}")
            assert load(["--config", str(tmp_path / "run.yaml")], 1).run == run
            manifest = {"run": {"train": {"precision": word}}}
            target = target_of(manifest, run.model, {}, ExportOptions(family="llama"))
            assert target.dtype == {"bf16": torch.bfloat16, "fp32": torch.float32}[ours]
    with pytest.raises(ConfigError, match="expected 'fp32' or 'bf16'"):
        load(["--precision", "float16"], 1)


def test_case_02_the_version_of_a_run_is_a_setting() -> None:
    run = load(["--export-hf", "new", "--hf-version", "4"], 1)
    assert run.run.train.hf_version == 4 and run.warnings == []
    assert "train.hf_version has no effect: train.export_hf is not given" in load(["--hf-version", "5"], 1).warnings
    with pytest.raises(ConfigError, match=r"hf_version \(--hf-version\): found '6'"):
        load(["--export-hf", "new", "--hf-version", "6"], 1)
