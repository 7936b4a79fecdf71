"""A Hugging Face folder into a checkpoint of the engine: the same tensors, in files of the same size, with a manifest.

    model-00003-of-00008.safetensors -> rank-00002.safetensors      keys master/0/layers.4.ffn.experts.w_gate_up, ...

Nothing is cast and nothing is put together: each tensor stays the piece of a weight that it was, so that a run of any
layout reads its own elements, and what is exported again has the same bits.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import moe_engine
from moe_engine.checkpoint import disk
from moe_engine.checkpoint.hf.carried import side_files
from moe_engine.checkpoint.hf.folder import HfFolder
from moe_engine.checkpoint.hf.write import Written, hash_of, write_bytes
from moe_engine.checkpoint.manifest import write_manifest
from moe_engine.checkpoint.partial import Partial
from moe_engine.checkpoint.pieces import Piece
from moe_engine.checkpoint.reader import rank_file
from moe_engine.checkpoint.shard import Digest, Entry, stream_shard


def identity_of(folder: HfFolder) -> dict[str, Any]:
    """What a folder is, without reading its weights: its configuration, and the size and time of its files."""
    files = {path.name: path.stat() for path in set(folder.files.values())}
    return {"config": folder.config, "files": {n: [s.st_size, s.st_mtime_ns] for n, s in sorted(files.items())}}


def read_hf(folder: HfFolder, out: Path, beat: Callable[[int], Any] = lambda n: None) -> Written:
    """Write the checkpoint `out`, which must not exist; an interrupted one is gone on with.

    beat: told of the bytes of each tensor.
    """
    partial = Partial(out, identity_of(folder))
    entries = {name: folder.entries[name] for name in folder.places}
    total = sum(entry.nbytes for entry in entries.values())
    disk.require_space(partial.folder, total)

    def make(names: list[str]) -> Callable[[Path], tuple[Digest, dict[str, str]]]:
        def write(path: Path) -> tuple[Digest, dict[str, str]]:
            pieces, named, hashes = [], {}, {}
            for i, name in enumerate(names):
                place = folder.places[name]
                entry = Entry(entries[name].dtype, (torch.Size(entries[name].shape).numel(),))
                pieces.append(Piece(place.weight, place.box, 0, entry.shape[0]))
                named[f"master/{i}/{place.weight}"] = name, entry

            def tensor_of(key: str) -> torch.Tensor:
                name = named[key][0]
                tensor = folder.file(folder.files[name]).get_tensor(name)
                hashes[name] = hash_of(tensor)
                beat(tensor.nbytes)
                return tensor.reshape(-1)

            metadata = {"pieces": json.dumps(pieces)}
            return stream_shard(path, {key: entry for key, (_, entry) in named.items()}, tensor_of, metadata), hashes

        return write

    files = sorted({folder.files[name] for name in folder.places})
    for number, file in enumerate(files):
        names = [name for name in folder.places if folder.files[name] == file]
        if not partial.write(rank_file(number), make(names)):
            beat(sum(entries[name].nbytes for name in names))
    for name, content in side_files(folder.folder).items():
        partial.write(name, lambda path, content=content: (write_bytes(path, content), {}))
    write_manifest(
        partial.folder,
        {
            "step": 0,
            "tokens": 0,
            "adam_steps": 0,
            "layout": {"dp": 1, "ep": 1, "tp": 1, "zero": 0},
            "run": {"model": folder.model.model_dump(mode="json")},
            "data": None,
            "hf": {"family": folder.family, "layout": folder.layout},
            "versions": {"moe_engine": moe_engine.__version__, "torch": torch.__version__},
            "weights": {name: list(shape) for name, shape in folder.shapes.items()},
            "files": {name: record["digest"] for name, record in partial.files.items()},
        },
    )
    partial.publish()
    return Written(partial.tensors(), total)
