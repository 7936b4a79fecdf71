"""Run and its sections: what they accept, what they derive, and that they start without torch."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from moe_engine.config import Data, Domain, Model, Parallel, Run
from moe_engine.config.command_line import build_parser, flags_of_settings, load, load_run, print_config
from moe_engine.config.messages import KEYS
from moe_engine.errors import ConfigError

SIZES: dict[str, Any] = {
    "vocab_size": 264,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
REPOSITORY = Path(__file__).resolve().parents[2]


def problems_of(*argv: str, world: int | None = 1) -> str:
    with pytest.raises(ConfigError) as caught:
        load(list(argv), world)
    return str(caught.value)


def test_model_derives_what_was_not_given() -> None:
    model = Model(**SIZES)
    assert (model.num_key_value_heads, model.head_dim, model.moe_intermediate_size) == (4, 16, 96)
    given = Model(**SIZES, num_key_value_heads=2, head_dim=32, moe_intermediate_size=40)
    assert (given.num_key_value_heads, given.head_dim, given.moe_intermediate_size) == (2, 32, 40)


def test_null_means_the_default_but_only_where_null_is_no_value() -> None:
    values = SIZES | {"head_dim": None, "rms_norm_eps": None, "capacity_factor": None}
    assert Model.model_validate(values) == Model(**SIZES)
    with pytest.raises(ValidationError):
        Model.model_validate(SIZES | {"vocab_size": None})


def test_sections_are_frozen_and_hashable() -> None:
    model = Model(**SIZES, num_local_experts=4, moe_layers=(0, 2))
    with pytest.raises(ValidationError):
        model.vocab_size = 3  # type: ignore[misc]
    assert hash(Run(model=model)) == hash(Run(model=model))


def test_is_moe_follows_moe_layers() -> None:
    assert [Model(**SIZES, num_local_experts=4, moe_layers=(0, 2)).is_moe(i) for i in range(3)] == [True, False, True]
    assert Model(**SIZES, num_local_experts=4).num_moe_layers == 3
    assert Model(**SIZES).num_moe_layers == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_attention_heads": 6}, "num_attention_heads 6 does not divide hidden_size 64"),
        ({"num_key_value_heads": 3}, "valid are 1, 2, 4"),
        ({"head_dim": 15}, "head_dim 15 is odd"),
        ({"num_local_experts": 4, "num_experts_per_tok": 5}, "valid are 1 to 4"),
        ({"num_local_experts": 4, "moe_layers": [1, 1]}, "twice"),
        ({"num_local_experts": 4, "moe_layers": [3]}, "valid are 0 to 2"),
        ({"num_attention_experts": 3}, "multiple of 4 key-value heads: valid are 4"),
        ({"num_attention_experts": 2, "num_attention_experts_per_tok": 3}, "valid are 1 to 2"),
        ({"num_attention_experts": 4, "attention_moe_layers": [0, 3]}, "attention_moe_layers .* valid are 0 to 2"),
        ({"num_attention_experts": 4, "attention_moe_layers": [0, 0]}, "attention_moe_layers .* twice"),
        ({"num_attention_experts": 4, "qk_norm": "projection"}, "use head or none"),
        ({"vocab_size": True}, "expected no boolean"),
        ({"rope_theta": float("nan")}, "finite"),
        ({"capacity_factor": 0}, "greater than 0"),
        ({"router_aux_loss": "mixtral"}, "hf_mixtral"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2}}, "llama3"),
    ],
)
def test_model_refuses(change: dict, words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        Model.model_validate(SIZES | change)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("corpus/wiki", ("wiki", "corpus/wiki", 1.0)),
        ("wiki=corpus/en", ("wiki", "corpus/en", 1.0)),
        ("wiki=corpus/en:0.25", ("wiki", "corpus/en", 0.25)),
        ("corpus/en:2", ("en", "corpus/en", 2.0)),
        ("/data/a=b/en", ("en", "/data/a=b/en", 1.0)),
        ("wiki=c:/en", ("wiki", "c:/en", 1.0)),
    ],
)
def test_domain_from_text(text: str, expected: tuple) -> None:
    domain = Domain.model_validate(text)
    assert (domain.name, domain.path, domain.weight) == expected


@pytest.mark.parametrize("text", ["", "=path", "a=", "a=p:0", "a=p:-1", "a=p:nan", "a b=p"])
def test_domain_refuses(text: str) -> None:
    if text == "=path":
        assert Domain.model_validate(text).name == "path"
        return
    with pytest.raises(ValidationError):
        Domain.model_validate(text)


def test_two_domains_of_one_name_are_refused() -> None:
    with pytest.raises(ValidationError, match="used twice"):
        Data.model_validate({"domains": ["a/x", "b/x"]})


def test_defaults_are_the_demo_and_derive_from_the_world() -> None:
    loaded = load(["--ep", "2", "--dp", "4"], 8)
    run = loaded.run
    assert run.model.num_local_experts == 8
    assert (run.parallel.dp, run.parallel.ep, run.parallel.tp, run.parallel.zero) == (4, 2, 1, 2)
    assert run.data_ranks == run.world_size == 8
    assert run.train.global_batch == run.train.micro_batch * run.train.accumulation * 8
    assert run.optimizer.warmup_steps == run.train.steps // 10
    assert loaded.warnings == []
    assert any(line.startswith("train.global_batch") for line in loaded.derived)
    assert not any(line.startswith("parallel.dp") for line in loaded.derived)


def test_batch_of_the_published_layout() -> None:
    argv = ["--ep", "2", "--dp", "4", "--micro-batch", "1", "--set", "train.accumulation=8"]
    assert load_run(argv, 8).train.global_batch == 64
    assert load_run(["--ep", "2", "--micro-batch", "1", "--global-batch", "64"], 8).train.accumulation == 8
    message = problems_of("--global-batch", "65", "--micro-batch", "2", "--ep", "2", world=8)
    assert "train.global_batch: found 65" in message and "64, 80" in message
    message = problems_of("--global-batch", "64", "--set", "train.accumulation=2", world=8)
    assert "found 64" in message and "= 16" in message


def test_world_size_none_takes_the_layout_as_written() -> None:
    run = load_run(["--ep", "4", "--tp", "2"], None)
    assert run.world_size == 8 and run.parallel.dp == 1


def test_later_sources_win(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(
        "model: {preset: tiny, num_hidden_layers: 2}\noptimizer: {lr: 1e-4, beta2: .9}\n"
        "train: {steps: 1_000, seed: 3}\n"
    )
    argv = ["--config", str(config), "--lr", "2e-4", "--steps", "20", "--set", "train.steps=5e1"]
    run = load_run(argv, 1)
    assert (run.optimizer.lr, run.optimizer.beta2, run.train.steps, run.train.seed) == (2e-4, 0.9, 50, 3)
    assert run.model.num_hidden_layers == 2
    whole = load_run([*argv, "--model", "llama-2-7b", "--set", "model.num_hidden_layers=7"], 1)
    assert whole.model.hidden_size == 4096 and whole.model.num_hidden_layers == 7


def test_a_written_model_must_be_complete(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("model: {hidden_size: 64, num_attention_heads: 4}\n")
    message = problems_of("--config", str(config))
    assert all(f"model.{key}" in message for key in ("vocab_size", "intermediate_size", "num_hidden_layers"))
    assert load_run(["--set", "model.hidden_size=64"], 1).model.vocab_size == 264


def test_print_config_reads_back_as_the_same_run(tmp_path: Path) -> None:
    argv = ["--ep", "2", "--data", "a=x:0.5", "--data", "b=y", "--set", "model.moe_layers=[1,3]", "--model", "tiny"]
    loaded = load([*argv, "--set", "model.capacity_factor=1.25"], 8)
    path = tmp_path / "again.yaml"
    path.write_text(print_config(loaded))
    again = load(["--config", str(path)], 8)
    assert again.run == loaded.run
    assert again.derived == [] and again.warnings == []


def test_every_flag_sets_its_key() -> None:
    value = {"fp32|bf16": "bf16", "none|selective|full": "full", "0|1|2|3": "1", "N": "2", "X": "0.5", "": None}
    for flag, (dotted, placeholder, _) in flags_of_settings().items():
        word = value.get(placeholder, "auto")
        parser = build_parser()
        parsed = vars(parser.parse_args([flag] if word is None else [flag, word]))
        section, _, key = dotted.partition(".")
        assert key in KEYS[section]
        assert parsed == {flag[2:].replace("-", "_"): True if word is None else word}
    run = load_run(["--offload-optimizer", "--precision", "bf16", "--resume", "auto", "--tp", "2"], 2)
    assert run.parallel.offload_optimizer and run.train.precision == "bf16" and run.train.resume == "auto"


def test_warm_up_is_clamped_with_a_warning() -> None:
    loaded = load(["--steps", "150", "--set", "optimizer.warmup_steps=200"], 1)
    assert loaded.run.optimizer.warmup_steps == 150
    assert "clamped to 150" in loaded.warnings[0]
    assert load_run(["--steps", "150"], 1).optimizer.warmup_steps == 15
    assert load_run(["--steps", "150", "--set", "optimizer.warmup_steps=0"], 1).optimizer.warmup_steps == 0


@pytest.mark.parametrize(
    ("argv", "key"),
    [
        (["--model", "llama-2-7b", "--set", "model.capacity_factor=2"], "model.capacity_factor"),
        (["--set", "model.capacity_factor=4"], "model.capacity_factor"),
        (
            ["--set", "model.router_aux_loss=none", "--set", "model.router_aux_loss_coef=.1"],
            "model.router_aux_loss_coef",
        ),
        (["--zero", "0", "--set", "parallel.reduce_bucket_size=1e6"], "parallel.reduce_bucket_size"),
        (["--save-every", "600", "--steps", "10"], "train.save_every"),
        (["--set", "data.eval_fraction=0", "--set", "train.eval_every=3"], "train.eval_every"),
        (["--set", "train.eval_batches=0", "--set", "train.eval_every=3"], "train.eval_every"),
        (["--set", "train.eval_every=0", "--set", "train.eval_batches=3"], "train.eval_batches"),
        (["--data", "a=x:3"], "data.domains weight"),
        (["--set", "model.num_experts_per_tok=1"], "model.norm_topk_prob"),
        (["--set", "model.moe_layers=[]"], "model.num_local_experts"),
        (["--set", "model.attention_scaling_factor=2"], "model.attention_scaling_factor"),
        (["--set", "model.attention_moe_layers=[0]"], "model.attention_moe_layers"),
        (
            ["--set", "model.attention_moe_layers=[]", "--set", "model.num_attention_experts=4"],
            "model.num_attention_experts",
        ),
        (["--set", "parallel.replicate_attention_experts=true"], "parallel.replicate_attention_experts"),
        (["--model", "llama-2-7b", "--set", "model.shared_intermediate_size=8"], "model.shared_intermediate_size"),
    ],
)
def test_settings_without_effect_are_warned_about(argv: list[str], key: str) -> None:
    warnings = load(argv, 1).warnings
    assert any(line.startswith(key) for line in warnings), warnings


@pytest.mark.parametrize("key", ["eval_every", "eval_batches", "save_every", "log_every"])
def test_case_20_zero_means_not_at_all(key: str) -> None:
    loaded = load(["--set", f"train.{key}=0"], 1)
    assert getattr(loaded.run.train, key) == 0 and loaded.warnings == []
    assert loaded.run.evaluates == (not key.startswith("eval")) and load_run([], 1).evaluates


def test_a_model_is_no_run(tmp_path: Path) -> None:
    config = tmp_path / "small.yaml"
    config.write_text("vocab_size: 264\nhidden_size: 64\n")
    assert problems_of("--config", str(config), world=1) == f"{config}: holds the keys of a model: give it to --model"


def test_all_problems_arrive_in_one_report(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("trian: {steps: 3}\noptimizer: {lr: fast}\nparallel: [1]\ntrain:\n  seed: -1\n  steps: 3\n")
    argv = ["--config", str(config), "--ep", "3", "--precision", "fp8", "--stpes", "4", "--set", "seed=3"]
    message = problems_of(*argv, "--set", "data.weights=1", world=8)
    for words in (
        "--stpes: unknown flag, did you mean --steps?",
        f"trian ({config}): unknown section, did you mean train?",
        f"optimizer.lr ({config}): found 'fast', expected a valid number",
        f"parallel ({config}): found [1], expected a mapping",
        f"train.seed ({config}): found -1, expected greater than or equal to 0",
        "train.precision (--precision): found 'fp8', expected 'fp32' or 'bf16'",
        "--set 'seed=3': expected section.key=value",
        "data.weights (--set): unknown key",
        "parallel.ep: found 3",
        "valid ep with tp 1: 1, 2, 4, 8",
    ):
        assert words in message
    assert message.startswith("9 problems") and len(message.splitlines()) == 10


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--hidden-size", "64"], "use --set model.hidden_size=VALUE"),
        (["--micro_batch=3"], "did you mean --micro-batch?"),
        (["steps"], "'steps': not a flag"),
        (["--steps"], "argument --steps: expected one argument"),
        (["--set", "optimizer.steps=3"], "did you mean train.steps?"),
        (["--set", "train"], "expected section.key=value"),
        (["--set", "train.steps=[1"], "not valid YAML"),
        (["--set", "model.rope_scaling={factr: 2}"], "model.rope_scaling.factr (--set): unknown key, did you mean"),
        (["--set", "data.domains=[{name: a, pth: b}]"], "did you mean data.domains.0.path?"),
        (["--set", "model.moe_layers=most"], "expected 'all' or "),
        (["--seq-length", "1024"], "at most model.max_position_embeddings 512"),
        (["--set", "model.vocab_size=x", "--ep", "3"], "2 problems"),
        (["--out", "\x1b[31m", "--steps", "\x1b[31m"], r"\x1b[31m"),
    ],
)
def test_bad_command_lines(argv: list[str], words: str) -> None:
    message = problems_of(*argv)
    assert words in message
    assert "\x1b" not in message


def test_help_and_load_start_without_torch() -> None:
    code = (
        "import sys\nfrom moe_engine.config.command_line import load_run\nimport moe_engine.config.sizes\n"
        "load_run(['--ep', '2'], 8)\n"
        "heavy = {'torch', 'numpy', 'transformers', 'deepspeed'} & set(sys.modules)\nassert not heavy, heavy\n"
        "load_run(['--help'], 1)"
    )
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=False)
    assert done.returncode == 0, done.stderr
    assert "--offload-optimizer" in done.stdout and "mixtral-8x7b" in done.stdout
    assert time.monotonic() - start < 10  # far below: 0.5 s alone, more on a machine that is busy


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs" / "runs").glob("*.yaml")), ids=lambda path: path.stem)
def test_run_presets_load_on_eight_ranks_without_warning(path: Path) -> None:
    loaded = load(["--config", str(path)], 8)
    assert loaded.warnings == []
    assert loaded.run.world_size == 8
    assert path.read_text().startswith("#")


def test_derived_values_are_in_print_config() -> None:
    text = print_config(load(["--ep", "2"], 8))
    assert "# derived: parallel.dp = 4 (8 ranks / (ep 2 * tp 1))" in text
    assert yaml.safe_load(text)["parallel"]["dp"] == 4
    assert Parallel.model_validate(yaml.safe_load(text)["parallel"]).dp == 4
