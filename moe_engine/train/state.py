"""The training state between a ZeroEngine and a checkpoint: master weights, Adam moments, expert biases, random state.

Weights travel under their global names; a run may continue on another layout than the one that wrote the checkpoint.
The order of the data is a function of the seed and the position, so it continues anywhere too.
"""

from pathlib import Path
from typing import Any

import torch

from moe_engine.checkpoint.store import Piece, Reader, save
from moe_engine.parallel.mesh import Mesh
from moe_engine.parallel.weight import note_of
from moe_engine.train.zero import ZeroEngine


def save_state(engine: ZeroEngine, mesh: Mesh, root: Path, step: int, manifest: dict[str, Any]) -> Path:
    """Checkpoint after `step` optimizer steps; collective. `manifest` holds the run and the data position."""
    by_name = {name: p for p, name in engine.names.items()}
    if not any(owned.moments for owned in engine.owned()):  # no step succeeded yet
        engine.create_optimizer_states()
    pieces = []
    adam_steps = 0
    for owned in engine.owned():
        kinds = {"master": owned.master} | {k: v for k, v in owned.moments.items() if k != "step"}
        adam_steps = int(owned.moments["step"]) if "step" in owned.moments else adam_steps
        if owned.first_copy:
            box = tuple((s.start, s.stop) for s in note_of(by_name[owned.name]).local_slices())
            pieces.append((Piece(owned.name, box, owned.start, owned.master.numel()), kinds))
    extra = {"rng": torch.get_rng_state()}
    if torch.cuda.is_available():
        extra["rng_cuda"] = torch.cuda.get_rng_state()
    for i, router in enumerate(engine.routers):
        if router.expert_bias is not None:
            extra[f"expert_bias/{i}"] = router.expert_bias
    layout = {"dp": mesh.dp.size, "ep": mesh.ep.size, "tp": mesh.tp.size}
    return save(root, step, pieces, extra, {"layout": layout, "adam_steps": adam_steps} | manifest)


@torch.no_grad()
def load_state(engine: ZeroEngine, mesh: Mesh, folder: Path) -> dict[str, Any]:
    """Fill the engine from a checkpoint written on any layout; returns its manifest.

    The random state continues only on the layout that wrote it; on another one the ranks keep their own.
    """
    reader = Reader(folder)
    engine.create_optimizer_states()
    by_name = {name: p for p, name in engine.names.items()}
    for owned in engine.owned():
        note = note_of(by_name[owned.name])
        for kind, out in ({"master": owned.master} | owned.moments).items():
            if kind == "step":
                out.fill_(reader.manifest["adam_steps"])
                continue
            mine = reader.whole(owned.name, kind, note.shape)[note.local_slices()].reshape(-1)
            out.copy_(mine[owned.start : owned.start + owned.master.numel()])
    engine.weights_from_masters()
    same = reader.manifest["layout"] == {"dp": mesh.dp.size, "ep": mesh.ep.size, "tp": mesh.tp.size}
    extra = reader.extra(mesh.world.rank if same else 0)
    if same:
        torch.set_rng_state(extra["rng"])
        if "rng_cuda" in extra and torch.cuda.is_available():
            torch.cuda.set_rng_state(extra["rng_cuda"])
    for i, router in enumerate(engine.routers):
        if router.expert_bias is not None:
            router.expert_bias.copy_(extra[f"expert_bias/{i}"])
    return reader.manifest
