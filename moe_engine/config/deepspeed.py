"""Reading a DeepSpeed JSON file as settings of a run.

    train_micro_batch_size_per_gpu 1, gradient_accumulation_steps 8        -> train.micro_batch, train.accumulation
    zero_optimization {stage 2, offload_optimizer {device cpu}, ...}       -> parallel.zero, .offload_optimizer, ...
    bf16 {enabled true}, gradient_clipping 1.0                             -> train.precision, optimizer.clip_grad
    moe {num_experts 8, top_k 2, expert_parallel_size 2, ...}              -> parallel.ep and checks against the model

"auto" leaves a value to the run. Bucket sizes count ELEMENTS (5e7 is 100 MB in bf16). `expert_capacity_factor` becomes
model.capacity_factor, so such a file drops tokens where a run without it is dropless; a factor that the user wrote
wins. Everything else that differs from what the user or the model says is refused, naming both, by
`command_line.load`. Unknown keys are refused: DeepSpeed itself ignores them.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moe_engine.config import is_number
from moe_engine.config.files import read_mapping
from moe_engine.config.messages import refuse, shown, unknown_key

SETTINGS = {
    "train_batch_size": "train.global_batch",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.accumulation",
    "gradient_clipping": "optimizer.clip_grad",
    "steps_per_print": "train.log_every",
    "zero_optimization.stage": "parallel.zero",
    "zero_optimization.overlap_comm": "parallel.overlap_comm",
    "zero_optimization.reduce_bucket_size": "parallel.reduce_bucket_size",
    "zero_optimization.allgather_bucket_size": "parallel.allgather_bucket_size",
    "optimizer.params.lr": "optimizer.lr",
    "optimizer.params.eps": "optimizer.eps",
    "optimizer.params.weight_decay": "optimizer.weight_decay",
    "moe.num_experts": "model.num_local_experts",
    "moe.top_k": "model.num_experts_per_tok",
    "moe.expert_capacity_factor": "model.capacity_factor",
    "moe.expert_parallel_size": "parallel.ep",
}
BETAS = "optimizer.params.betas"
OFFLOAD = "zero_optimization.offload_optimizer.device"
PINNED = "zero_optimization.offload_optimizer.pin_memory"
PARTITION = "activation_checkpointing.partition_activations"
# Keys that may only say what the engine does anyway.
FIXED: dict[str, tuple[Any, ...]] = {
    "fp16.enabled": (False,),
    "wall_clock_breakdown": (False,),
    "prescale_gradients": (False,),
    "zero_allow_untested_optimizer": (True, False),
    "zero_optimization.contiguous_gradients": (True,),
    "zero_optimization.reduce_scatter": (True,),
    "zero_optimization.allgather_partitions": (True,),
    "activation_checkpointing.cpu_checkpointing": (False,),
    "activation_checkpointing.contiguous_memory_optimization": (False,),
    "optimizer.type": ("Adam", "AdamW"),
    PINNED: (True, False),
    PARTITION: (True, False),
}
SPECIAL = (OFFLOAD, "bf16.enabled", "moe.enabled", BETAS)
JSON_KEYS = {ours: name for name, ours in SETTINGS.items()} | {
    "parallel.offload_optimizer": OFFLOAD,
    "train.precision": "bf16.enabled",
    "optimizer.beta1": BETAS,
    "optimizer.beta2": BETAS,
}
KNOWN = [*SETTINGS, *FIXED, *SPECIAL]
# Sections that belong to DeepSpeed and are refused for a reason better than "unknown".
REPLACED = {
    "scheduler": "the schedule is linear warm-up and cosine: set optimizer.warmup_steps and optimizer.min_lr instead",
    "zero_optimization.offload_param": "parameters stay on the device: use a higher zero stage or expert_parallel_size",
}


def read_deepspeed(path: str | Path) -> tuple[dict[str, Any], list[str]]:
    """What a DeepSpeed JSON asks for: ({"section.key": value}, notes on keys that are accepted without effect).

    ConfigError lists every unknown key, with the nearest valid one, and every value that the engine cannot follow.
    """
    settings: dict[str, Any] = {}
    problems: list[str] = []
    notes: list[str] = []
    for key, value in leaves(read_mapping(path)):
        if value == "auto":
            if key not in KNOWN and not key.startswith(tuple(REPLACED)):
                problems.append(unknown_key(key, KNOWN))
        elif key in SETTINGS:
            settings[SETTINGS[key]] = value
        elif key in SPECIAL:
            special(key, value, settings, problems)
        elif key in FIXED:
            if not any(value == allowed for allowed in FIXED[key]):
                problems.append(f"{key}: found {shown(value)}, expected {' or '.join(map(shown, FIXED[key]))}")
            elif note := without_effect(key, value):
                notes.append(f"{path}: {note}")
        elif replaced := next((REPLACED[name] for name in REPLACED if f"{key}.".startswith(f"{name}.")), None):
            problems.append(f"{key}: not read, {replaced}")
        else:
            problems.append(unknown_key(key, KNOWN))
    if problems:
        refuse(f"{path}: {problem}" for problem in problems)
    return settings, notes


def leaves(mapping: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of a nested mapping, skipping null and empty sections."""
    for key, value in mapping.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and (value or name in SETTINGS):
            yield from leaves(value, f"{name}.")
        elif value not in (None, {}):
            yield name, value


def special(key: str, value: Any, settings: dict[str, Any], problems: list[str]) -> None:
    """Put the run's settings for a key that does not map one to one into `settings`."""
    if key == OFFLOAD and value in ("cpu", "none"):
        settings["parallel.offload_optimizer"] = value == "cpu"
    elif key == "bf16.enabled" and isinstance(value, bool):
        settings["train.precision"] = "bf16" if value else "fp32"
    elif key == "moe.enabled" and isinstance(value, bool):
        settings["moe.enabled"] = value
    elif key == BETAS and isinstance(value, list) and [is_number(str(beta)) for beta in value] == [True, True]:
        settings["optimizer.beta1"], settings["optimizer.beta2"] = value
    else:
        allowed = {OFFLOAD: "'cpu' or 'none'", BETAS: "two numbers"}.get(key, "true or false")
        problems.append(f"{key}: found {shown(value)}, expected {allowed}")


def without_effect(key: str, value: Any) -> str | None:
    """The note for an accepted key that changes nothing here, or None."""
    if key == PARTITION and value:
        return f"{key} has no effect: between layers activations are cut over tp anyway, and tp 1 cuts nothing"
    if key == PINNED and not value:
        return f"{key} false has no effect: offloaded states are pinned wherever there is a GPU"
    return None


def apply_deepspeed(
    path: str, values: dict[str, dict[str, Any]], origin: dict[str, str], model: dict[str, Any]
) -> tuple[list[str], list[str]]:
    """Put the settings of a DeepSpeed JSON into `values` where the user gave none. Returns (problems, notes).

    values  {section: {key: value}} as collected so far; filled in place, as is `origin` (dotted key -> source)
    model   every key of the model as it will be, preset included
    """
    settings, notes = read_deepspeed(path)
    problems: list[str] = []
    enabled = settings.pop("moe.enabled", None)
    experts = model.get("num_local_experts", 0)
    if enabled is not None and same(experts, 0) is enabled:
        problems.append(f"{path}: moe.enabled {str(enabled).lower()} contradicts model.num_local_experts {experts}")
    for dotted, value in settings.items():
        section, _, key = dotted.partition(".")
        if enabled is False and (section == "model" or dotted == "parallel.ep"):
            continue
        if dotted == "model.capacity_factor":
            if dotted in origin:
                ours = shown(values[section][key])
                notes.append(f"{path}: capacity factor {value} gives way to {ours} ({origin[dotted]})")
                continue
            ours = model.get(key) or "dropless"
            notes.append(f"{path}: capacity factor {value} replaces {ours}: tokens can be dropped")
        elif dotted in origin or section == "model":
            found = model.get(key) if section == "model" else values[section][key]
            if not same(found, value):
                place = origin.get(dotted, "the model")
                theirs = JSON_KEYS.get(dotted, dotted)
                problems.append(f"{dotted}: {shown(found)} ({place}) contradicts {shown(value)} ({theirs} in {path})")
            continue
        values.setdefault(section, {})[key] = value
        origin[dotted] = path
    return problems, notes


def same(one: Any, other: Any) -> bool:
    """Whether two values, either of which may still be text from the command line, mean the same setting."""
    if is_number(str(one)) and is_number(str(other)):
        return float(str(one)) == float(str(other))
    return str(one).lower() == str(other).lower()
