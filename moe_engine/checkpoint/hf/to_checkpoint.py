"""A Hugging Face folder into a checkpoint of the engine: the same tensors, in files of the same size, with a manifest.

model-00003-of-00008.safetensors -> rank-00002.safetensors      keys master/0/layers.4.ffn.experts.w_gate_up, ...
"""

import json
from pathlib import Path
from typing import Any

from moe_engine.checkpoint.hf.contents import CONFIG
from moe_engine.checkpoint.hf.folder import HfFolder
from moe_engine.checkpoint.hf.resize import PER_TOKEN, Resized, whole
from moe_engine.checkpoint.pieces import Piece, volume
from moe_engine.checkpoint.weights_only import Progress, Written, write_weights


def identity_of(folder: HfFolder) -> dict[str, Any]:
    """What a folder is, without reading its weights: its configuration, and the size and time of its files."""
    files = {path.name: path.stat() for path in set(folder.files.values())}
    return {"config": folder.config, "files": {n: [s.st_size, s.st_mtime_ns] for n, s in sorted(files.items())}}


def import_folder(
    folder: HfFolder,
    out: Path,
    progress: Progress = lambda n: None,
    resized: Resized | None = None,
    allow_nonfinite: bool = False,
) -> Written:
    """Write the checkpoint `out`, which must not exist; an interrupted one is gone on with. See write_weights.

    resized: the same folder with more rows for tokens, which its config.json then counts.
    """
    source = resized or folder
    files = []
    for file in sorted({folder.files[name] for name in folder.places}):
        names = [name for name in folder.places if folder.files[name] == file]
        places = [folder.places[name] for name in names]
        grown = PER_TOKEN if resized else ()
        boxes = [whole(source.shapes[p.weight]) if p.weight in grown else p.box for p in places]
        pieces = [Piece(place.weight, box, 0, volume(box)) for place, box in zip(places, boxes, strict=True)]
        files.append(dict(zip(names, pieces, strict=True)))
    came = {"family": folder.family, "layout": folder.layout}
    side, identity = folder.side, [identity_of(folder), source.model.vocab_size]
    if resized:
        config = folder.config | {"vocab_size": source.model.vocab_size}
        side = {**side, CONFIG: (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()}
    return write_weights(source, source.model, files, side, came, out, identity, progress, allow_nonfinite)
