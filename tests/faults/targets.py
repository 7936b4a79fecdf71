"""What hostile files are put into: a small checkpoint and small prepared data, whose manifests can be made to lie."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from moe_engine.checkpoint.manifest import read_manifest, write_manifest
from moe_engine.checkpoint.pieces import Piece
from moe_engine.checkpoint.save import Saver, Shard
from moe_engine.checkpoint.shard import Hasher, rank_file
from moe_engine.data.loader import Loader, open_domains
from moe_engine.data.shards import MANIFEST
from moe_engine.parallel.mesh import Axis
from tests.faults.rows import make

ALONE = Axis("world")
SHARD = rank_file(0)


def small_checkpoint(root: Path) -> Path:
    """A whole checkpoint of one rank and one weight."""
    run = torch.arange(24.0)
    shard = Shard([(Piece("w", ((0, 4), (0, 6)), 0, 24), {"master": run})], {"rng": torch.zeros(5, dtype=torch.uint8)})
    manifest: dict[str, Any] = {
        "weights": {"w": [4, 6]}, "layout": {"dp": 1, "ep": 1, "tp": 1, "zero": 0}, "tokens": 1, "adam_steps": 1,
        "run": {}, "run_sha256": "", "data": {}, "versions": {},
    }  # fmt: skip
    folder = Saver(root, ALONE).save(3, shard, manifest)
    assert folder is not None
    return folder


def resealed(folder: Path, **changes: Any) -> None:
    """The manifest with other words, as if the engine had written them."""
    manifest = {key: value for key, value in read_manifest(folder).items() if key != "manifest_sha256"}
    write_manifest(folder, manifest | changes)


def entry_of(content: bytes) -> list[Any]:
    """What a manifest says of a file of this content."""
    hasher = Hasher()
    hasher.update(content)
    return list(hasher.digest())


def small_data(root: Path) -> Path:
    """A prepared folder with one domain, d, of one shard."""
    (root / "rows.jsonl").write_text("".join(json.dumps({"text": f"row {i} of some"}) + "\n" for i in range(40)))
    make(root / "rows.jsonl", root / "tokens", eval_fraction=0.2)
    return root / "tokens"


def rewritten(folder: Path, **changes: Any) -> None:
    """The manifest of prepared data with changes to itself, or with `shard`, to its first training shard."""
    manifest = json.loads((folder / MANIFEST).read_bytes())
    shard = changes.pop("shard", {})
    manifest |= changes
    manifest["domains"]["d"]["splits"]["train"]["shards"][0] |= shard
    (folder / MANIFEST).write_text(json.dumps(manifest))


def read_data(folder: Path) -> None:
    """One step of the domain d."""
    Loader(open_domains([("d", str(folder), 1.0)]), seed=0, seq_length=8, micro_batch=1).next_step()


class Late(BaseException):
    """Passes by whatever is written for errors; TimeoutError would be taken for one of the disk."""


def within(seconds: float, action: Callable[..., Any], *args: Any) -> Any:
    """action(*args), or RuntimeError when it takes longer; waiting for a pipe is broken off as well."""

    def late(number: int, frame: Any) -> None:
        raise Late

    handler = signal.signal(signal.SIGALRM, late)
    left, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        return action(*args)
    except Late:
        raise RuntimeError(f"no answer within {seconds:g} s") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, left)
        signal.signal(signal.SIGALRM, handler)
