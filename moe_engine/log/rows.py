"""Rows of metrics.jsonl and eval.jsonl: as JSON, as TensorBoard's tags, and read back."""

import json
import math
from pathlib import Path
from typing import Any

TAGS = {"lr": "learning_rate"}  # of scalars that are not called by their own names


def step_scalars(row: dict[str, Any]) -> dict[str, float]:
    """TensorBoard tags and values of one row of metrics.jsonl."""
    layers = row.get("moe_layers", ())
    scalars: dict[str, float] = {}
    for key, value in row.items():
        if isinstance(value, dict):
            tag = "domain/{}/loss" if key == "domain_loss" else f"train/{key}/{{}}"
            scalars |= {tag.format(name): each for name, each in value.items()}
        elif isinstance(value, int | float) and key != "step":
            scalars[f"train/{TAGS.get(key, key)}"] = value
        elif isinstance(value, list) and len(value) == len(layers) and not key.endswith("layers"):
            if any(isinstance(each, list) for each in value):
                continue
            scalars |= {f"moe/layer_{layer}/{key}": each for layer, each in zip(layers, value)}
    return scalars


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl or eval.jsonl, oldest first; lines torn by a crash are left out."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def flatten(row: dict[str, Any], prefix: str = "") -> dict[str, float]:
    flat: dict[str, float] = {}
    for key, value in row.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}/")
        elif isinstance(value, int | float):
            flat[prefix + key] = value
    return flat


def json_safe(value: Any) -> Any:
    """`value` with NaN and infinities as null: JSON has no other word for them."""
    if isinstance(value, dict):
        return {str(key): json_safe(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_safe(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
