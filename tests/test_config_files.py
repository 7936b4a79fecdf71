"""YAML and JSON under attack, model presets, and Hugging Face configs in both spellings."""

import json
import os
import time
from pathlib import Path

import pytest

from moe_engine.config import Model
from moe_engine.config_files import parse_yaml, preset_names, read_mapping, read_model
from moe_engine.config_hf import model_from_hf
from moe_engine.errors import ConfigError

PUBLISHED = Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "configs_hf"
LLAMA = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
LLAMA3 = {
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def published(name: str) -> Model:
    if not PUBLISHED.is_dir():
        pytest.skip(f"the published configs are not at {PUBLISHED}")
    return model_from_hf(read_mapping(PUBLISHED / name))


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
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"mlp_bias": True, "sliding_window": 8}))
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
        path = Path(__file__).resolve().parent.parent / "configs" / "models" / f"{name}.yaml"
        assert path.read_text().startswith("# ") and "ource" in path.read_text().split("\n")[0]
        Model.model_validate(read_model(name))


def test_both_spellings_give_the_same_model() -> None:
    old = LLAMA | {"rope_theta": 5e5, "rope_scaling": LLAMA3 | {"rope_type": "llama3"}, "torch_dtype": "bfloat16"}
    older = LLAMA | {"rope_theta": 5e5, "rope_scaling": LLAMA3 | {"type": "llama3"}}
    new = LLAMA | {"rope_parameters": LLAMA3 | {"rope_type": "llama3", "rope_theta": 5e5}, "dtype": "bfloat16"}
    model = model_from_hf(old)
    assert model == model_from_hf(older) == model_from_hf(new)
    assert model.rope_scaling is not None and model.rope_scaling.factor == 32 and model.rope_theta == 5e5
    plain = LLAMA | {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}
    assert model_from_hf(plain) == model_from_hf(LLAMA | {"rope_theta": 7.0, "rope_scaling": None})


def test_absent_keys_take_the_defaults_of_the_family() -> None:
    llama = model_from_hf(LLAMA)
    assert (llama.rms_norm_eps, llama.rope_theta, llama.max_position_embeddings) == (1e-6, 1e4, 2048)
    assert (llama.num_key_value_heads, llama.num_local_experts) == (4, 0)
    mixtral = model_from_hf(LLAMA | {"model_type": "mixtral", "num_attention_heads": 8})
    assert (mixtral.rms_norm_eps, mixtral.rope_theta, mixtral.num_key_value_heads) == (1e-5, 1e6, 8)
    assert (mixtral.num_local_experts, mixtral.num_experts_per_tok, mixtral.router_aux_loss_coef) == (8, 2, 0.001)
    assert mixtral.router_aux_loss == "hf_mixtral" and mixtral.norm_topk_prob and mixtral.capacity_factor is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "qwen3"}, "model_type: found 'qwen3'"),
        ({"model_type": ["llama"]}, "model_type: found ['llama']"),
        ({"hidden_act": "gelu"}, "hidden_act: found 'gelu'"),
        ({"attention_bias": True}, "attention_bias: found True"),
        ({"mlp_bias": True}, "mlp_bias: found True"),
        ({"attention_dropout": 0.1}, "attention_dropout: found 0.1"),
        ({"sliding_window": 4096}, "sliding_window: found 4096, only null"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type 'linear' is not supported"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "rope_scaling.low_freq_factor: not given"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}}, "rope_parameters: rope_type 'yarn'"),
        ({"rope_scaling": "llama3"}, "rope_scaling: found 'llama3', expected a mapping"),
        ({"quantization_config": {"bits": 4}}, "quantization_config: {'bits': 4} is not a feature"),
        ({"auto_map": {"AutoModel": "hub--x"}}, "auto_map"),
        ({"num_local_experts": 4}, "num_local_experts: 4 is not a feature"),
        ({"hidden_size": "wide"}, "hidden_size: found 'wide'"),
        ({"hidden_size": None}, "hidden_size: not given"),
        (
            {"num_experts_per_tok": 9, "model_type": "mixtral", "num_key_value_heads": 4},
            "num_experts_per_tok 9 is more than",
        ),
    ],
)
def test_unsupported_features_are_refused_by_name(change: dict, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        model_from_hf(LLAMA | change)
    assert words in str(caught.value)


def test_unsupported_features_arrive_together() -> None:
    with pytest.raises(ConfigError) as caught:
        model_from_hf(LLAMA | {"mlp_bias": True, "sliding_window": 8, "vocab_size": -1})
    assert all(key in str(caught.value) for key in ("mlp_bias", "sliding_window", "vocab_size"))


@pytest.mark.parametrize(
    ("file", "preset"),
    [
        ("mistralai--Mixtral-8x7B-v0.1_config.json", "mixtral-8x7b"),
        ("Llama-3.2-1B-Instruct_config.json", "llama-3.2-1b"),
        ("Llama-3.2-3B-Instruct_config.json", "llama-3.2-3b"),
    ],
)
def test_presets_equal_the_published_configs(file: str, preset: str) -> None:
    assert published(file) == Model.model_validate(read_model(preset))


def test_published_configs_are_read() -> None:
    llama = published("meta-llama--Meta-Llama-3.1-8B_config.json")
    assert llama.rope_scaling is not None and llama.rope_scaling.factor == 8 and llama.head_dim == 128
    small = published("drop_upcycling_mixtral_8x152M.json")
    assert (small.vocab_size, small.hidden_size, small.num_local_experts) == (99584, 512, 8)
    assert small.router_aux_loss_coef == 0.02 and small.router_aux_loss == "hf_mixtral"
    assert published("drop_upcycling_mixtral_8x1.5B.json").num_hidden_layers == 24
    with pytest.raises(ConfigError, match="model_type"):
        published("Qwen--Qwen3-8B_config.json")


def test_configs_that_transformers_writes_are_read() -> None:
    transformers = pytest.importorskip("transformers")
    rope = LLAMA3 | {"rope_type": "llama3", "rope_theta": 5e5}
    sizes = {key: value for key, value in LLAMA.items() if key != "model_type"}
    theirs = transformers.LlamaConfig(**sizes, num_key_value_heads=2, rope_parameters=rope, tie_word_embeddings=True)
    model = model_from_hf(json.loads(theirs.to_json_string()))
    assert model.tie_word_embeddings and model.rope_scaling is not None and model.rope_theta == 5e5
    theirs = transformers.MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=4, router_jitter_noise=0.1)
    model = model_from_hf(json.loads(theirs.to_json_string()))
    assert (model.num_local_experts, model.router_jitter_noise, model.head_dim) == (4, 0.1, 8)
    assert model_from_hf(json.loads(theirs.to_json_string(use_diff=False))) == model
