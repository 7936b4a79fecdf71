"""Hugging Face configs in both spellings, read and written: published ones, presets, and what no family holds."""

import json
from pathlib import Path

import pytest

from moe_engine.config import Model
from moe_engine.config.files import preset_names, read_mapping, read_model
from moe_engine.config.hf import IN_TRAINING_ONLY, family_of, model_and_notes, model_from_hf, model_to_hf
from moe_engine.config.hf.spelling import dtype_of
from moe_engine.config.sizes import parameter_counts
from moe_engine.errors import ConfigError

PUBLISHED = Path(__file__).resolve().parents[3] / "shared" / "data" / "configs_hf"
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
        ({"_attn_implementation": "evil/repo:attn"}, "_attn_implementation: found 'evil/repo:attn'"),
        ({"hidden_act": "gelu"}, "hidden_act: found 'gelu'"),
        ({"attention_bias": True}, "attention_bias: found True"),
        ({"mlp_bias": True}, "mlp_bias: found True"),
        ({"attention_dropout": 0.1}, "attention_dropout: found 0.1"),
        ({"sliding_window": "4096"}, "sliding_window: found '4096', expected null or a number of tokens"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type 'linear' is not supported"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "rope_scaling.low_freq_factor: not given"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}}, "rope_parameters: rope_type 'yarn'"),
        ({"rope_scaling": "llama3"}, "rope_scaling: found 'llama3', expected a mapping"),
        ({"quantization_config": {"bits": 4}}, "quantization_config: found {'bits': 4}, only null"),
        ({"use_attn_moe": True}, "use_attn_moe: found True, only null"),
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
        model_from_hf(LLAMA | {"mlp_bias": True, "sliding_window": 0, "vocab_size": -1})
    assert all(key in str(caught.value) for key in ("mlp_bias", "sliding_window", "vocab_size"))


@pytest.mark.parametrize(
    ("file", "preset"),
    [
        ("mistralai--Mixtral-8x7B-v0.1_config.json", "mixtral-8x7b"),
        ("Qwen--Qwen3-30B-A3B_config.json", "qwen3-30b-a3b"),
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


ODD = {"vocab_size": 34, "hidden_size": 24, "intermediate_size": 22, "num_hidden_layers": 5, "num_attention_heads": 4,
       "num_key_value_heads": 2, "head_dim": 10, "qk_norm": "head", "moe_layers": (1, 4), "num_local_experts": 6,
       "moe_intermediate_size": 14, "num_experts_per_tok": 5}  # fmt: skip


def of_preset(name: str) -> Model:
    """A preset, or `odd`: a small Qwen3-MoE whose layers are dense in part."""
    return Model.model_validate(ODD if name == "odd" else read_model(name))


NO_FAMILY = ["llama-3.2-3b-moe-8x-half"]  # its weights are not renormalised, and its q and k have no norms


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("name", [*(name for name in preset_names() if name not in NO_FAMILY), "odd"])
def test_presets_are_written_as_transformers_reads_them(name: str, version: int) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model = of_preset(name)
    kind = family_of(model)
    routed = "qwen3_moe" if model.qk_norm == "head" else "olmoe" if model.qk_norm == "projection" else "mixtral"
    assert kind == (routed if model.num_local_experts else "llama")
    config = model_to_hf(model, kind, "bfloat16", version, {})
    again = model_from_hf(json.loads(json.dumps(config)))
    ours, read = (
        {key: value for key, value in each.model_dump().items() if key not in IN_TRAINING_ONLY | {"moe_layers"}}
        for each in (model, again)
    )
    unused = {"moe_intermediate_size", "num_experts_per_tok", "norm_topk_prob", "num_local_experts"}
    if model.num_moe_layers == model.num_hidden_layers:
        unused = {"intermediate_size"}
    elif model.num_moe_layers:
        unused = set()
    assert {key for key in ours if ours[key] != read[key]} <= unused
    layers = range(model.num_hidden_layers)
    assert [again.is_moe(i) for i in layers] == [model.is_moe(i) for i in layers]
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config))
    assert type(theirs).__name__ == config["architectures"][0]
    assert sum(parameter.numel() for parameter in theirs.parameters()) == parameter_counts(model).total
    rope = theirs.config.rope_parameters
    assert rope["rope_theta"] == model.rope_theta
    assert (rope["rope_type"] == "llama3") == (model.rope_scaling is not None)
    assert theirs.config.rms_norm_eps == model.rms_norm_eps and theirs.config.head_dim == model.head_dim


def test_what_no_family_holds_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"model\.norm_topk_prob: no Hugging Face family .* mixtral has True"):
        family_of(of_preset("llama-3.2-3b-moe-8x-half"))
    tiny = of_preset("tiny")
    for change in ({"shared_intermediate_size": 16}, {"moe_layers": (0,)}, {"num_attention_experts": 4}):
        with pytest.raises(ConfigError, match=rf"model\.{next(iter(change))}: no Hugging Face family"):
            family_of(tiny.model_copy(update=change))
    with pytest.raises(ConfigError, match="qk_norm: 'head' cannot be written as mixtral, which has 'none'"):
        model_to_hf(tiny.model_copy(update={"qk_norm": "head"}), "mixtral", "bfloat16", 5, {})


def test_a_mixtral_made_of_a_llama_keeps_its_token_ids_alone() -> None:
    ids = {"bos_token_id": 128000, "eos_token_id": [128001, 128009], "pad_token_id": 7}
    rope = {"rope_theta": 5e5, "rope_scaling": LLAMA3 | {"rope_type": "llama3"}}
    theirs = {"attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0, "use_cache": True}
    said = {"torch_dtype": "float16", "transformers_version": "4.45.0", "architectures": ["LlamaForCausalLM"]}
    carried = LLAMA | ids | rope | theirs | said
    dense = model_from_hf(carried)
    routed = dense.model_copy(update={"num_local_experts": 4, "intermediate_size": 24, "moe_intermediate_size": 24})
    config = model_to_hf(routed, "mixtral", "bfloat16", None, carried)
    assert {key: config[key] for key in ids} == ids and config["use_cache"] is True
    assert config["architectures"] == ["MixtralForCausalLM"] and config["model_type"] == "mixtral"
    assert not {"mlp_bias", "attention_bias"} & config.keys() and config["intermediate_size"] == 24
    assert config["torch_dtype"] == config["dtype"] == "bfloat16" and config["rope_theta"] == 5e5
    assert config["rope_scaling"] == rope["rope_scaling"]
    assert config["rope_parameters"] == rope["rope_scaling"] | {"rope_theta": 5e5}
    old = model_to_hf(routed, "mixtral", "bfloat16", 4, carried)
    assert not {"dtype", "rope_parameters", "transformers_version"} & old.keys()
    new = model_to_hf(routed, "mixtral", "bfloat16", 5, carried)
    assert not {"torch_dtype", "rope_theta", "rope_scaling", "transformers_version"} & new.keys()
    assert new["dtype"] == "bfloat16" and new["rope_parameters"] == rope["rope_scaling"] | {"rope_theta": 5e5}
    assert model_from_hf(config) == model_from_hf(old) == model_from_hf(new)


def test_a_name_that_is_no_dtype_is_none() -> None:
    assert dtype_of({"dtype": "bfloat16"}) == dtype_of({"torch_dtype": "bfloat16"}) == "bfloat16"
    assert dtype_of({}) is None and dtype_of({"dtype": "load"}) is None and dtype_of({"dtype": ["float32"]}) is None


def test_keys_in_the_wild_that_change_nothing_are_passed_over() -> None:
    wild = {
        "_attn_implementation": "sdpa",
        "_attn_implementation_autoset": True,
        "tokenizer_class": "LlamaTokenizer",
        "auto_map": {"AutoModel": "modeling_x.X"},
        "unsloth_version": "2025.1",
        "layer_types": ["full_attention"] * 2,
        "sliding_window": 4096,
        "use_sliding_window": False,
        "torch_dtype": "auto",
        "rope_scaling": None,
    }
    assert model_from_hf(LLAMA | wild) == model_from_hf(LLAMA)
    with pytest.raises(ConfigError, match="layer_types"):
        model_from_hf(LLAMA | {"layer_types": ["sliding_attention", "full_attention"]})
    with pytest.raises(ConfigError, match="rope_parameters and rope_scaling are both given"):
        model_from_hf(
            LLAMA | {"rope_parameters": {"rope_theta": 1e4}, "rope_scaling": {"type": "linear", "factor": 2.0}}
        )


def test_case_02_both_spellings_together_must_agree() -> None:
    scaling = LLAMA3 | {"rope_type": "llama3"}
    both = LLAMA | {"rope_theta": 5e5, "rope_scaling": scaling, "rope_parameters": scaling | {"rope_theta": 5e5}}
    assert model_from_hf(both) == model_from_hf(LLAMA | {"rope_theta": 5e5, "rope_scaling": scaling})
    for change, words in (
        ({"rope_theta": 1e4}, r"rope_theta: found rope_theta 10000\.0 and rope_parameters\.rope_theta 500000\.0"),
        ({"rope_scaling": scaling | {"factor": 2.0}}, "rope_parameters and rope_scaling are both given and differ"),
        ({"rope_scaling": {"rope_type": "default"}}, "rope_parameters and rope_scaling are both given and differ"),
        ({"original_max_position_embeddings": 7}, r"original_max_position_embeddings: found 7 and rope_"),
        ({"rope_parameters": {"full_attention": scaling}}, r"rope_parameters\.full_attention: .* is not supported"),
        ({"rope_parameters": scaling | {"partial_rotary_factor": 0.5}}, r"partial_rotary_factor: 0\.5 is not"),
    ):
        with pytest.raises(ConfigError, match=words):
            model_from_hf(both | change)


def test_case_02b_a_theta_beside_dtype_is_not_lost() -> None:
    """transformers 4.57.1 writes `dtype`, and rope in the spelling of 4: what is written keeps both words of all."""
    carried = LLAMA | {"dtype": "bfloat16", "rope_theta": 5e5, "transformers_version": "4.57.1", "eos_token_id": 3}
    config = model_to_hf(model_from_hf(carried), "llama", "bfloat16", None, carried)
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 5e5 and config["rope_scaling"] is None
    assert config["dtype"] == config["torch_dtype"] == "bfloat16" and config["eos_token_id"] == 3
    assert model_from_hf({key: config[key] for key in config if key != "rope_parameters"}) == model_from_hf(carried)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "olmoe"])
def test_case_02c_experts_under_either_name(kind: str) -> None:
    """transformers 5.24 saves Qwen3-MoE's number as num_local_experts, where 4.57 takes the default, 128."""
    base = LLAMA | {"model_type": kind, "num_key_value_heads": 4, "num_experts_per_tok": 2}
    names = ("num_local_experts", "num_experts")
    model = model_from_hf(base | dict.fromkeys(names, 6))
    assert model.num_local_experts == 6
    for name in names:
        assert model_from_hf(base | {name: 6}) == model
        config = model_to_hf(model, kind, "bfloat16", None, base | {name: 6})
        assert config.keys() & set(names) == {"num_local_experts" if kind == "mixtral" else "num_experts"}
    with pytest.raises(ConfigError, match=r"expert.*remove the wrong one"):
        model_from_hf(base | {"num_local_experts": 6, "num_experts": 5})


def test_case_02_a_width_of_heads_that_one_version_ignores_is_not_written() -> None:
    wide = Model.model_validate(ODD | {"moe_layers": "all", "qk_norm": "projection"})
    with pytest.raises(ConfigError, match="head_dim: 10 cannot be written as olmoe, which has 6"):
        model_to_hf(wide, "olmoe", "bfloat16", None, {})
    model_to_hf(wide.model_copy(update={"head_dim": 6}), "olmoe", "bfloat16", None, {})


WILD = {
    "unsloth_fixed": True,
    "is_llama_config": True,
    "max_sequence_length": 2048,
    "transformers.js_config": {"dtype": {"fp16": "q4"}},
    "evil\x1b[31m": 1,
}


def test_case_18a_keys_that_no_model_reads_are_named_and_change_nothing() -> None:
    model, notes = model_and_notes(LLAMA | WILD)
    assert model == model_from_hf(LLAMA) and model_and_notes(LLAMA)[1] == []
    (line,) = notes
    assert all(shown_key in line for shown_key in (*list(WILD)[:4], "evil\\x1b[31m")) and "\x1b" not in line
    (line,) = model_and_notes(LLAMA | {f"key{i}": i for i in range(5000)})[1]
    assert "and 4992 more" in line
    (line,) = model_and_notes(LLAMA | {"rope_parameters": {"rope_theta": 1e4, "beta_fast": 32}})[1]
    assert line.startswith("rope_parameters.beta_fast: 32 changes nothing")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"auto_map": {"AutoModel": "evil--x.X"}, "routers": 2}, r"routers: .*auto_map.* never run"),
        ({"trust_remote_code": True}, "trust_remote_code: found True, only null"),
        ({"experts_implementation": "evil/repo:moe"}, "experts_implementation: found 'evil/repo:moe'"),
        ({"_attn_implementation_internal": "evil/repo:a"}, "_attn_implementation_internal: found"),
        ({"transformers_weights": "other.bin"}, "transformers_weights: found"),
        ({"is_causal": False}, "is_causal: found False, only True"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads: found"),
        ({"per_layer_config": {"0": {"rms_norm_eps": 1}}}, "per_layer_config: found"),
        ({"num_kv_shared_layers": 1}, "num_kv_shared_layers: found"),
        ({"layer_types": ["sliding_attention"] * 2}, "layer_types: found"),
    ],
)
def test_case_18a_keys_that_change_the_function_are_refused(change: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        model_from_hf(LLAMA | change)


def test_case_18a_a_window_is_as_many_positions() -> None:
    mixtral = LLAMA | {"model_type": "mixtral", "num_key_value_heads": 4, "max_position_embeddings": 4096}
    for window in (4096, 5000):
        assert model_and_notes(mixtral | {"sliding_window": window}) == (model_from_hf(mixtral), [])
    model, (line,) = model_and_notes(mixtral | {"sliding_window": 128})
    assert model == model_from_hf(mixtral | {"max_position_embeddings": 128})
    assert line.startswith("sliding_window: 128 is full attention up to 128 tokens") and "4096" in line
    # who has a window, and who only says so
    for kind, off, positions in (("mixtral", False, 128), ("llama", False, 4096), ("qwen3_moe", None, 4096)):
        said = mixtral | {"model_type": kind, "num_experts": 8, "sliding_window": 128, "use_sliding_window": off}
        said = said if kind != "llama" else said | {"num_experts": None}
        assert model_from_hf(said).max_position_embeddings == positions, kind
    qwen = mixtral | {"model_type": "qwen3_moe", "use_sliding_window": True, "max_position_embeddings": 8192}
    assert model_from_hf(qwen).max_position_embeddings == 4096, "the default of its window"
    both = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 128}
    assert model_from_hf(LLAMA | both).max_position_embeddings == 128
