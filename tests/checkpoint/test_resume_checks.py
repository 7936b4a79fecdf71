"""Every setting, changed alone, between the run that wrote a checkpoint and the one that resumes from it."""

import copy
from typing import Any

import pytest

from moe_engine.checkpoint.resume_checks import setting_changes
from moe_engine.config import Data, Domain, Model, Run
from moe_engine.errors import ConfigError

MODEL = Model(
    vocab_size=48, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_local_experts=4
)  # fmt: skip
DOMAINS = (Domain(name="a", path="x/a"), Domain(name="b", path="x/b", weight=2))
SAVED: dict[str, Any] = Run(model=MODEL, data=Data(domains=DOMAINS)).model_dump(mode="json")
SETTINGS = [(section, key) for section, keys in SAVED.items() for key in keys]


def other(value: Any) -> Any:
    match value:
        case bool():
            return not value
        case int() | float():
            return value + 1
        case str():
            return value + "x"
        case list():
            return [*value, {"name": "c", "path": "c", "weight": 1.0}]
    return 7


HARMLESS = {
    *("out", "resume", "save_every", "eval_every", "eval_batches", "log_every", "tokenizer", "init_from"),
    *("async_save", "keep_last", "keep_every", "on_save_error", "step_timeout", "recompute", "export_hf"),
    *("hf_version", "allow_other_tokenizer", "packing"),
}
BALANCING = {
    *("router_aux_loss", "router_aux_loss_coef", "router_z_loss_coef", "router_jitter_noise", "capacity_factor"),
}


@pytest.mark.parametrize(("section", "key"), SETTINGS)
def test_one_change(section: str, key: str):
    now = copy.deepcopy(SAVED)
    now[section][key] = other(now[section][key])
    if section == "model" and key not in BALANCING:
        with pytest.raises(ConfigError, match=rf"another model: model\.{key} is .* there and .* in the run\. Resume"):
            setting_changes(SAVED, now)
        return
    lines = setting_changes(SAVED, now)
    if section in ("parallel", "samples") or key in HARMLESS:
        assert lines == []
    else:
        assert len(lines) == 1 and lines[0].startswith(f"{section}.{key} was ") and " is " in lines[0]


def test_what_is_said():
    now = copy.deepcopy(SAVED)
    now["train"] |= {"steps": 600, "out": "elsewhere"}
    now["data"]["domains"] = [domain | {"path": "moved/" + domain["path"]} for domain in now["data"]["domains"]]
    (line,) = setting_changes(SAVED, now)
    assert line.startswith("train.steps was 300 until the checkpoint and is 600 now; the learning rate follows the new")
    now["data"]["domains"][0]["weight"] = 5.0
    assert "data.domains was {'a': 1.0, 'b': 2.0} until" in setting_changes(SAVED, now)[1]


def test_settings_of_another_version_are_passed_over():
    now = copy.deepcopy(SAVED)
    del now["train"]["keep_last"]
    now["optimizer"]["novel"] = 3
    assert setting_changes(SAVED, now) == [] == setting_changes(now, SAVED)
