"""YAML and JSON under attack, and model presets."""

import json
import os
import time
from pathlib import Path

import pytest

from moe_engine.config import Model
from moe_engine.config.command_line import load
from moe_engine.config.files import parse_yaml, preset_names, read_mapping, read_model, whose_model
from moe_engine.config.hf import model_from_hf
from moe_engine.errors import ConfigError
from moe_engine.plan.dry_run import describe
from tools.params import main as params

LLAMA = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("5e7", 5e7),
        ("-.5", -0.5),
        ("1_000", 1000),
        ("no", "no"),
        ("off", "off"),
        ("true", True),
        ("null", None),
        ("", None),
        ("1:30", "1:30"),
        ("0123", 123),
        ("2024-01-01", "2024-01-01"),
        ("1.5.2", "1.5.2"),
        ("[1, a]", [1, "a"]),
        ("{a: &x {b: 1}, c: {<<: *x, d: 2}}", {"a": {"b": 1}, "c": {"b": 1, "d": 2}}),
    ],
)
def test_yaml_scalars_are_those_of_yaml_1_2(text: str, value: object) -> None:
    found = parse_yaml(text, "test")
    assert found == value and type(found) is type(value)


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{after}: &{after} [{','.join(['*' + before] * 9)}]\n"
    for before, after in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (BOMB, "more than 16 YAML aliases"),
        ("!!python/object/apply:os.system ['true']", "not valid YAML"),
        ("!!python/name:os.system", "not valid YAML"),
        ("a: !secret b", "not valid YAML"),
        ("a: 1\nb: 2\na: 3", "line 3: not valid YAML, key a is written twice"),
        ("[" * 5000 + "]" * 5000, "nested more than 32 deep"),
        ("[1," * 80_000, "nested more than 32 deep"),
        ("a: [1", "line 1: not valid YAML"),
        ("a: b: c", "line 1: not valid YAML"),
        ("a: *missing", "not valid YAML"),
        ("9" * 6000, "malformed value"),
        ("? [1]\n: 2", "not valid YAML"),
        ("a: 1\n---\nb: 2", "not valid YAML"),
        ("\x00", "not valid YAML"),
    ],
)
def test_hostile_yaml_is_refused_quickly(text: str, words: str) -> None:
    start = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        parse_yaml(text, "file.yaml")
    assert words in str(caught.value) and str(caught.value).startswith("file.yaml")
    assert time.monotonic() - start < 5


def test_unreadable_files_are_refused_by_name(tmp_path: Path) -> None:
    cases = {
        "large.yaml": b"#" * (1 << 16) + b"\n",
        "binary.yaml": b"\xff\xfe\x00",
        "list.yaml": b"- 1\n",
        "number_keys.yaml": b"1: 2\n",
        "broken.json": b"{",
        "list.json": b"[]",
    }
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
    os.mkfifo(tmp_path / "pipe.yaml")
    for name in [*cases, "pipe.yaml", "missing.yaml", "", "a\x00b"]:
        with pytest.raises(ConfigError) as caught:
            read_mapping(tmp_path / name)
        assert str(tmp_path) in str(caught.value) and "\x00" not in str(caught.value)
    for name, content in (("a\n\x1b[2Jb.json", "{"), ("a\n\x1b[2Jb.yaml", "[1]"), ("a\n\x1b[2Jb.yml", "a: [")):
        (tmp_path / name).write_text(content)
        with pytest.raises(ConfigError) as caught:
            read_mapping(tmp_path / name)
        assert r"a\n\x1b[2Jb.y" in str(caught.value).replace(".json", ".yaml") and str(caught.value).isprintable()
    (tmp_path / "empty.yaml").write_bytes(b"\xef\xbb\xbf# nothing\n")
    assert read_mapping(tmp_path / "empty.yaml") == {}


def test_model_by_name_file_and_folder(tmp_path: Path) -> None:
    assert read_model("tiny")["num_local_experts"] == 8
    (tmp_path / "mine.yaml").write_text("hidden_size: 8\n")
    assert read_model(str(tmp_path / "mine.yaml")) == {"hidden_size": 8}
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    assert read_model(str(tmp_path)) == read_model(str(tmp_path / "config.json"))
    assert Model.model_validate(read_model(str(tmp_path))) == model_from_hf(LLAMA)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"mlp_bias": True, "sliding_window": 0}))
    with pytest.raises(ConfigError) as caught:
        read_model(str(tmp_path))
    assert str(caught.value).count(f"{tmp_path / 'config.json'}: ") == 2
    with pytest.raises(ConfigError, match="did you mean mixtral-8x7b"):
        read_model("mixtral-8x7")
    with pytest.raises(ConfigError, match="presets are llama-2-7b, "):
        read_model("no/such/file")


def test_presets_name_their_source() -> None:
    names = preset_names()
    assert len(names) >= 11
    for name in names:
        path = Path(__file__).resolve().parents[2] / "configs" / "models" / f"{name}.yaml"
        assert path.read_text().startswith("# ") and "ource" in path.read_text().split("\n")[0]
        Model.model_validate(read_model(name))


def test_the_model_of_a_start_that_is_gone_is_that_of_the_checkpoint(tmp_path: Path) -> None:
    out, start = tmp_path / "out", str(tmp_path / "start")
    for step, text in ((2, '{"run": {"model": {"hidden_size": 8}}}'), (10, '{"run": {"model": {"hid')):
        (out / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
        (out / "checkpoints" / f"step-{step:08d}" / "manifest.json").write_text(text)
    whole, damaged = sorted(str(path) for path in (out / "checkpoints").iterdir())
    assert whose_model(start, "auto", str(out)) == whose_model(start, whole, "elsewhere") == whole
    assert start == whose_model(start, damaged, str(out)) == whose_model(start, "", str(out))
    assert start == whose_model(start, "auto", str(tmp_path / "other"))
    assert read_model(whole) == {"hidden_size": 8}
    Path(start).mkdir()
    assert whose_model(start, "auto", str(out)) == start


def test_case_18a_a_run_and_the_counter_say_what_changes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run, its dry run and tools/params.py; conversions are in tests/checkpoint/hf/test_config_text.py."""
    config = tmp_path / "config.json"
    wild = {"unsloth_fixed": True, "sliding_window": 64, "max_position_embeddings": 512, "vocab_size": 264}
    config.write_text(json.dumps(LLAMA | wild))
    loaded = load(["--model", str(tmp_path), "--seq-length", "64", "--out", str(tmp_path / "out")], 1)
    window, keys = loaded.warnings
    assert window.startswith(f"{config}: sliding_window: 64 is full") and keys.startswith(f"{config}: unsloth_fixed: ")
    assert {f"warning: {window}", f"warning: {keys}"} <= set(describe(loaded))
    with pytest.raises(ConfigError) as caught:
        load(["--model", str(tmp_path), "--seq-length", "65"], 1)
    assert "seq_length: found 65, expected at most model.max_position_embeddings 64" in str(caught.value)
    assert f"{config}: sliding_window: 64 is full attention" in str(caught.value), "or nobody knows where 64 is from"
    assert params(["--model", str(tmp_path)]) == 0
    assert f"warning: {keys}\n" in capsys.readouterr().err
