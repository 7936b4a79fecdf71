"""A small checkpoint of one weight, written by one rank."""

from pathlib import Path
from typing import Any

import torch

from moe_engine.checkpoint.pieces import Piece
from moe_engine.checkpoint.save import Saver, Shard
from moe_engine.parallel.mesh import Axis

WHOLE = torch.arange(24.0).view(4, 6)
MANIFEST: dict[str, Any] = {"weights": {"w": [4, 6]}, "layout": {"dp": 1, "ep": 1, "tp": 1}, "note": "x"}
ALONE = Axis("world")
RNG = torch.arange(5, dtype=torch.uint8)


def shard_of(value: float = 0.0) -> Shard:
    run = WHOLE.flatten() + value
    return Shard([(Piece("w", ((0, 4), (0, 6)), 0, 24), {"master": run, "exp_avg": -run})], {"rng": RNG})


def saver_of(root: Path, **options: Any) -> Saver:
    return Saver(root, ALONE, **options)


def save_one(root: Path, step: int = 3, value: float = 0.0) -> Path:
    folder = saver_of(root).save(step, shard_of(value), MANIFEST)
    assert folder is not None
    return folder
