"""DeepSpeed JSON: the published file works as it stands, contradictions and unknown keys are refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest

from moe_engine.config.command_line import load, load_run
from moe_engine.config.deepspeed import KNOWN, read_deepspeed
from moe_engine.errors import ConfigError

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "deepspeed"
PUBLISHED = str(FOLDER / "mixtral-8x7b-zero2.json")
MIXTRAL = ["--model", "mixtral-8x7b"]


def write(folder: Path, content: dict[str, Any]) -> str:
    path = folder / "ds.json"
    path.write_text(json.dumps(content))
    return str(path)


def refused(argv: list[str], world: int = 8) -> str:
    with pytest.raises(ConfigError) as caught:
        load(argv, world)
    return str(caught.value)


def test_the_published_file_gives_its_layout_and_batch() -> None:
    loaded = load([*MIXTRAL, "--deepspeed", PUBLISHED], 8)
    run = loaded.run
    assert (run.parallel.ep, run.parallel.dp, run.parallel.zero, run.parallel.offload_optimizer) == (2, 4, 2, True)
    assert (run.parallel.reduce_bucket_size, run.parallel.allgather_bucket_size) == (50_000_000, 50_000_000)
    assert (run.train.micro_batch, run.train.accumulation, run.train.global_batch) == (1, 8, 64)
    assert run.train.precision == "bf16" and run.parallel.overlap_comm
    assert run.model.capacity_factor == 1.0
    assert any("capacity factor 1.0 replaces dropless" in line for line in loaded.warnings)
    assert any("partition_activations has no effect" in line for line in loaded.warnings)


def test_a_capacity_factor_that_the_user_wrote_wins() -> None:
    argv = [*MIXTRAL, "--deepspeed", PUBLISHED]
    loaded = load([*argv, "--set", "model.capacity_factor=1.5"], 8)
    assert loaded.run.model.capacity_factor == 1.5
    assert any("gives way to 1.5 (--set)" in line for line in loaded.warnings)
    assert load_run([*argv, "--set", "model.capacity_factor=null"], 8).model.capacity_factor is None


def test_agreeing_settings_are_accepted_in_any_spelling() -> None:
    argv = ["--micro-batch", "1", "--zero", "2", "--offload-optimizer", "--precision", "bf16", "--ep", "2"]
    argv += ["--set", "parallel.reduce_bucket_size=5e7", "--set", "parallel.overlap_comm=True"]
    assert load_run([*MIXTRAL, *argv, "--deepspeed", PUBLISHED], 8).world_size == 8


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (
            ["--micro-batch", "2"],
            "train.micro_batch: '2' (--micro-batch) contradicts 1 (train_micro_batch_size_per_gpu in",
        ),
        (["--zero", "1"], "parallel.zero: '1' (--zero) contradicts 2 (zero_optimization.stage in"),
        (["--ep", "4"], "parallel.ep: '4' (--ep) contradicts 2 (moe.expert_parallel_size in"),
        (["--precision", "fp32"], "contradicts 'bf16' (bf16.enabled in"),
        (
            ["--set", "parallel.offload_optimizer=false"],
            "contradicts True (zero_optimization.offload_optimizer.device in",
        ),
        (
            ["--set", "model.num_local_experts=4"],
            "model.num_local_experts: 4 (--set) contradicts 8 (moe.num_experts in",
        ),
        (["--set", "model.num_experts_per_tok=1"], "contradicts 2 (moe.top_k in"),
        (["--global-batch", "32"], "train.global_batch: found 32"),
        (["--dp", "8"], "parallel.dp: found dp 8 * ep 2"),
    ],
)
def test_contradictions_name_both_sides(argv: list[str], words: str) -> None:
    assert words in refused([*MIXTRAL, *argv, "--deepspeed", PUBLISHED])


def test_contradictions_with_a_yaml_file_and_with_a_dense_model(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("train: {accumulation: 4}\n")
    message = refused([*MIXTRAL, "--config", str(config), "--deepspeed", PUBLISHED])
    assert f"train.accumulation: 4 ({config}) contradicts 8 (gradient_accumulation_steps in {PUBLISHED})" in message
    message = refused(["--model", "llama-3-8b", "--deepspeed", PUBLISHED])
    assert "moe.enabled true contradicts model.num_local_experts 0" in message


def test_auto_and_the_plain_file_leave_values_to_the_run(tmp_path: Path) -> None:
    plain = str(FOLDER / "zero2.json")
    run = load_run(["--deepspeed", plain, "--micro-batch", "3", "--ep", "2"], 4)
    assert (run.train.micro_batch, run.train.precision, run.parallel.dp) == (3, "fp32", 2)
    params = {"lr": 2e-4, "betas": [0.8, 0.9], "eps": "auto", "weight_decay": None}
    content = {"train_batch_size": "auto", "steps_per_print": 5, "optimizer": {"type": "AdamW", "params": params}}
    settings = {"optimizer.lr": 2e-4, "optimizer.beta1": 0.8, "optimizer.beta2": 0.9, "train.log_every": 5}
    assert read_deepspeed(write(tmp_path, content)) == (settings, [])


def test_moe_disabled_leaves_a_dense_run_alone(tmp_path: Path) -> None:
    path = write(tmp_path, {"moe": {"enabled": False, "num_experts": 8, "expert_parallel_size": 2}})
    assert load_run(["--model", "llama-3.2-1b", "--deepspeed", path], 2).parallel.ep == 1
    assert "moe.enabled false contradicts model.num_local_experts 8" in refused([*MIXTRAL, "--deepspeed", path])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            {"zero_optimisation": {"stage": 2}},
            "zero_optimisation.stage: unknown key, did you mean zero_optimization.stage?",
        ),
        ({"zero_optimization": {"stagee": 2}}, "did you mean zero_optimization.stage?"),
        ({"moe": {"top_kk": "auto"}}, "did you mean moe.top_k?"),
        ({"frobnicate": 1}, "frobnicate: unknown key"),
        ({"zero_optimization": 2}, "zero_optimization: unknown key"),
        ({"scheduler": {"type": "WarmupLR", "params": {}}}, "scheduler.type: not read, the schedule is linear warm-up"),
        ({"zero_optimization": {"offload_param": {"device": "cpu"}}}, "parameters stay on the device"),
        ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, "expected 'cpu' or 'none'"),
        ({"zero_optimization": {"contiguous_gradients": False}}, "found False, expected True"),
        ({"activation_checkpointing": {"cpu_checkpointing": True}}, "found True, expected False"),
        ({"fp16": {"enabled": True}}, "fp16.enabled: found True, expected False"),
        ({"optimizer": {"type": "Lamb"}}, "optimizer.type: found 'Lamb', expected 'Adam' or 'AdamW'"),
        ({"optimizer": {"params": {"betas": [0.9, "auto"]}}}, "expected two numbers"),
        ({"bf16": {"enabled": "yes"}}, "bf16.enabled: found 'yes', expected true or false"),
        ({"gradient_clipping": {"a": 1}}, "gradient_clipping.a: unknown key"),
    ],
)
def test_what_cannot_be_followed_is_refused_by_name(tmp_path: Path, content: dict, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_deepspeed(write(tmp_path, content))
    assert words in str(caught.value)


def test_wrong_values_are_reported_with_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, {"gradient_accumulation_steps": -1, "zero_optimization": {"stage": 5}})
    message = refused(["--deepspeed", path])
    assert f"train.accumulation ({path}): found -1" in message and f"parallel.zero ({path}): found 5" in message
    assert "not a file" in refused(["--deepspeed", str(tmp_path / "none.json")])


def test_names_and_keys_are_escaped(tmp_path: Path) -> None:
    path = tmp_path / "a\n\x1b[2Jb.json"
    path.write_text(json.dumps({"scheduler": {"x\x1b[2J": 1}, "gradient_clippin\ng": 1}))
    message = refused(["--deepspeed", str(path)])
    assert all(line.isprintable() for line in message.split("\n"))
    assert r"a\n\x1b[2Jb.json: scheduler.x\x1b[2J: not read" in message and r"gradient_clippin\ng" in message


def test_every_known_key_is_read_without_complaint(tmp_path: Path) -> None:
    content: dict[str, Any] = {}
    for dotted in KNOWN:
        *path, last = dotted.split(".")
        place = content
        for part in path:
            place = place.setdefault(part, {})
        place[last] = "auto"
    assert read_deepspeed(write(tmp_path, content)) == ({}, [])
