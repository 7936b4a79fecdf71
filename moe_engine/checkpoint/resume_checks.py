"""The run that wrote a checkpoint against the one that resumes from it: what may differ, and what is said about it.

Each setting says itself whether it must be the same, may change with a warning, or is free (config/section.py). Of data
the place may change too; data/loader.py insists on the same text.
"""

from pathlib import Path
from typing import Any

from moe_engine.checkpoint.manifest import NAME
from moe_engine.config import Run
from moe_engine.config.messages import SECTIONS
from moe_engine.config.section import Setting
from moe_engine.errors import ConfigError


def check_resume(run: Run, there: list[int]) -> None:
    """ConfigError when what the run asks for does not go with the steps that lie in its --out."""
    out, resume = run.train.out, run.train.resume
    if there and not resume:
        raise ConfigError(
            f"--out {out} holds checkpoints of an earlier run: continue it with --resume auto, or give another --out"
        )
    if there and resume and resume != "auto" and Path(resume).resolve().parent != Path(out, "checkpoints").resolve():
        raise ConfigError(
            f"--resume {resume} is of another run, and --out {out} holds checkpoints of its own: give another --out"
        )


def check_present(folder: Path) -> None:
    """ConfigError when a folder that --resume names is no checkpoint."""
    if not (folder / NAME).is_file():
        raise ConfigError(
            f"--resume {folder}: no manifest.json there; give a folder step-N written by this engine, or auto"
        )


def setting_changes(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """One line for each setting that moves the losses; ConfigError, with all of them, when the model is another.

    Both are `Run`s as JSON. A key that one of them does not know, being of another version, is passed over.
    """
    lines, refused = [], []
    for section in ("model", "optimizer", "train", "data", "supervision"):
        for key, was, here in _differ(saved, now, section):
            about = setting_of(section, key)
            why = f"; {about.consequence}" if about.consequence else ""
            if about.on_resume == "same":
                refused.append(f"{section}.{key} is {was} there and {here} in the run")
            elif about.on_resume == "warn":
                lines.append(f"{section}.{key} was {was} until the checkpoint and is {here} now{why}")
    if refused:
        raise ConfigError(f"the checkpoint has another model: {'; '.join(refused)}. Resume with the checkpoint's model")
    return lines


def setting_of(section: str, key: str) -> Setting:
    """What a setting says of itself."""
    return SECTIONS[section].settings()[key]


def _differ(saved: dict[str, Any], now: dict[str, Any], section: str) -> list[tuple[str, Any, Any]]:
    before, after = _without_paths(saved.get(section, {})), _without_paths(now.get(section, {}))
    return [(key, was, after[key]) for key, was in before.items() if key in after and after[key] != was]


def _without_paths(section: dict[str, Any]) -> dict[str, Any]:
    if "domains" not in section:
        return section
    return section | {"domains": {domain["name"]: domain["weight"] for domain in section["domains"]}}
