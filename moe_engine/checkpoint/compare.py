"""The run that wrote a checkpoint against the one that resumes from it: what may differ, and what is said about it.

model                   must be the same, the weights are of no use to another; but for BALANCING, which may change
                        with a warning
data                    may change with a warning, where it lies without one; data/loader.py insists on the same text
optimizer, train        may change, with a warning: the losses will not be those of the first run
parallel, and HARMLESS  may change: the numbers do not depend on them
"""

from typing import Any

from moe_engine.errors import ConfigError

HARMLESS = {
    *("out", "resume", "save_every", "eval_every", "eval_batches", "log_every", "tokenizer", "init_from"),
    "allow_other_tokenizer",
    *("async_save", "keep_last", "keep_every", "on_save_error", "step_timeout", "recompute", "export_hf"),
    "hf_version",
}
BALANCING = {
    *("router_aux_loss", "router_aux_loss_coef", "router_z_loss_coef", "router_jitter_noise", "capacity_factor"),
}
CONSEQUENCE = {"steps": "the learning rate follows the new schedule from here on"}


def setting_changes(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """One line for each setting that moves the losses; ConfigError, with all of them, when the model is another.

    Both are `Run`s as JSON. A key that one of them does not know, being of another version, is passed over.
    """
    if model := [
        f"model.{key} is {was} there and {here} in the run"
        for key, was, here in _differ(saved, now, "model")
        if key not in BALANCING
    ]:
        raise ConfigError(f"the checkpoint has another model: {'; '.join(model)}. Resume with the checkpoint's model")
    lines = []
    for section in ("model", "optimizer", "train", "data"):
        for key, was, here in _differ(saved, now, section):
            why = f"; {CONSEQUENCE[key]}" if key in CONSEQUENCE else ""
            if key not in HARMLESS:
                lines.append(f"{section}.{key} was {was} until the checkpoint and is {here} now{why}")
    return lines


def _differ(saved: dict[str, Any], now: dict[str, Any], section: str) -> list[tuple[str, Any, Any]]:
    before, after = _without_paths(saved.get(section, {})), _without_paths(now.get(section, {}))
    return [(key, was, after[key]) for key, was in before.items() if key in after and after[key] != was]


def _without_paths(section: dict[str, Any]) -> dict[str, Any]:
    if "domains" not in section:
        return section
    return section | {"domains": {domain["name"]: domain["weight"] for domain in section["domains"]}}
