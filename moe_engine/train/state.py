"""The training state between an Engine and a checkpoint: master weights, Adam moments, expert biases, random state.

Weights travel under their global names and places; a run may continue on another layout than the one that wrote the
checkpoint. The order of the data is a function of the seed and the position, so it continues anywhere too.
"""

import hashlib
import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import moe_engine
from moe_engine.checkpoint.finite import nonfinite
from moe_engine.checkpoint.hf.first_weights import check_shapes
from moe_engine.checkpoint.open import Checkpoint
from moe_engine.checkpoint.pieces import Piece
from moe_engine.checkpoint.save import Saver, Shard
from moe_engine.checkpoint.source import Source
from moe_engine.labels import beside_the_model
from moe_engine.parallel.mesh import Mesh
from moe_engine.parallel.weight import key_of, note_of
from moe_engine.train.engine import Engine, OwnedSlice


def save_state(engine: Engine, mesh: Mesh, saver: Saver, step: int, manifest: dict[str, Any]) -> Path | None:
    """Checkpoint after `step` optimizer steps; collective. `manifest` holds "run", "data" and "tokens".

    Returns the folder that was completed, of this step or, with a background save, the one before.
    """
    by_name = {name: p for p, name in engine.names.items()}
    if not any(owned.moments for owned in engine.owned()):  # no step succeeded yet
        engine.create_optimizer_states()
    pieces = []
    adam_steps = 0
    for owned in engine.owned():
        kinds = {"master": owned.master} | {k: v for k, v in owned.moments.items() if k != "step"}
        adam_steps = int(owned.moments["step"]) if "step" in owned.moments else adam_steps
        if owned.first_copy:
            pieces.append((piece_of(owned, by_name[owned.name]), kinds))
    extra = {"rng": torch.get_rng_state()}
    if torch.cuda.is_available():
        extra["rng_cuda"] = torch.cuda.get_rng_state()
    for i, router in enumerate(engine.routers):
        if router.expert_bias is not None:
            extra[f"expert_bias/{i}"] = router.expert_bias
    versions = {"moe_engine": moe_engine.__version__, "torch": torch.__version__, "deepspeed": version("deepspeed")}
    return saver.save(
        step,
        Shard(pieces, extra),
        {
            "layout": layout_of(mesh) | {"zero": engine.stage},
            "adam_steps": adam_steps,
            "versions": versions,
            "weights": {name: list(note_of(p).shape) for name, p in by_name.items()},
            "run_sha256": hashlib.sha256(json.dumps(manifest["run"], sort_keys=True).encode()).hexdigest(),
        }
        | manifest,
    )


@torch.no_grad()
def load_state(
    engine: Engine, mesh: Mesh, folder: Path, heartbeat: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Fill the engine from a verified checkpoint, written on any layout; returns its manifest.

    heartbeat: called as it goes on. The random state continues on the layout that wrote it; on another one each rank
    starts a stream of its own.
    """
    reader = Checkpoint(folder)
    engine.create_optimizer_states()
    by_name = {name: p for p, name in engine.names.items()}
    for owned in engine.owned():
        heartbeat()
        piece = piece_of(owned, by_name[owned.name])
        for kind, out in ({"master": owned.master} | owned.moments).items():
            if kind == "step":
                out.fill_(reader.manifest["adam_steps"])
            else:
                reader.fill(kind, piece, out)
    engine.weights_from_masters()
    written = {key: reader.manifest["layout"][key] for key in ("dp", "ep", "tp")}
    same = written == layout_of(mesh)
    extra = reader.extra(mesh.world.rank if same else 0)
    if same:
        torch.set_rng_state(extra["rng"])
        if "rng_cuda" in extra and torch.cuda.is_available():
            torch.cuda.set_rng_state(extra["rng_cuda"])
    else:
        seed, step = reader.manifest["run"]["train"]["seed"], reader.manifest["step"]
        torch.manual_seed(key_of(seed, f"noise of rank {mesh.world.rank} from step {step}"))
    for i, router in enumerate(engine.routers):
        if router.expert_bias is not None:
            router.expert_bias.copy_(extra[f"expert_bias/{i}"])
    return reader.manifest


@torch.no_grad()
def load_weights(engine: Engine, source: Source, heartbeat: Callable[[], None] = lambda: None) -> list[str]:
    """Fill the masters from a source that holds a model of the same shapes; each rank reads its own elements. Returns
    the weights in which they are not all finite.

    ConfigError names the weights that differ. What forward reads follows by `engine.weights_from_masters`, collective.
    """
    by_name, found = {name: p for p, name in engine.names.items()}, list[str]()
    check_shapes(source, {name: tuple(note_of(p).shape) for name, p in by_name.items()})
    for owned in engine.owned():
        heartbeat()
        if beside_the_model(owned.name) and owned.name not in source.shapes:
            continue  # it starts as it was drawn
        source.fill("master", piece_of(owned, by_name[owned.name]), owned.master)
        if nonfinite(owned.master):
            found.append(owned.name)
    biases = source.extra(0) if isinstance(source, Checkpoint) else {}
    for i, router in enumerate(engine.routers):
        if router.expert_bias is not None and f"expert_bias/{i}" in biases:
            router.expert_bias.copy_(biases[f"expert_bias/{i}"])
    return found


def piece_of(owned: OwnedSlice, parameter: torch.Tensor) -> Piece:
    """Where an owned slice lies in its whole weight."""
    box = tuple((s.start, s.stop) for s in note_of(parameter).local_slices())
    return Piece(owned.name, box, owned.start, owned.master.numel())


def layout_of(mesh: Mesh) -> dict[str, int]:
    """What decides which rank holds what."""
    return {"dp": mesh.dp.size, "ep": mesh.ep.size, "tp": mesh.tp.size}
