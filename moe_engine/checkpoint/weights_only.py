"""A checkpoint that holds weights and no training state: what an imported or upcycled model is, before any step.

Nothing is cast and nothing is put together: each tensor stays the piece of a weight that it was, so that a run of any
layout reads its own elements, and what is exported again has the same bits. Such a checkpoint is started from
(`--init-from`), and not resumed.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import xxhash
from torch import Tensor

import moe_engine
from moe_engine.checkpoint.finite import nonfinite, refusal
from moe_engine.checkpoint.manifest import write_manifest
from moe_engine.checkpoint.partial import Partial
from moe_engine.checkpoint.pieces import Box, Piece, volume
from moe_engine.checkpoint.shard import Digest, Entry, Hasher, rank_file, stream_shard
from moe_engine.config import Model
from moe_engine.host import disk


class Weights(Protocol):
    """Where weights come from: a checkpoint, a folder, or a computation. shapes: name -> whole shape."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    def part(self, name: str, box: Box, dtype: torch.dtype | None = None) -> Tensor:
        """The elements of a box of one weight, in their own dtype or in `dtype`."""
        ...

    def dtype(self, name: str, box: Box) -> torch.dtype:
        """The dtype of a box of one weight."""
        ...


WHOLE_COPY = "use a whole copy, or keep them with --allow-nonfinite (of tools/convert_hf.py and tools/upcycle.py)"


class Written(NamedTuple):
    """tensors: hash_of each. bytes: of all tensors."""

    tensors: dict[str, str]
    bytes: int

    def digest(self) -> str:
        """One hash of all tensors by name, whatever files they lie in."""
        lines = (f"{name} {self.tensors[name]}" for name in sorted(self.tensors))
        return xxhash.xxh3_128("\n".join(lines).encode()).hexdigest()

    def nonfinite(self) -> dict[str, str]:
        """The tensors that hold NaN or infinities, with how many."""
        texts = {name: text.split(" ", 2)[2:] for name, text in self.tensors.items()}
        return {name: rest[0] for name, rest in texts.items() if rest}


Progress = Callable[[int], Any]  # told of the bytes of each tensor


def write_weights(
    source: Weights,
    model: Model,
    files: Sequence[Mapping[str, Piece]],
    side: Mapping[str, bytes],
    came: Mapping[str, str],
    out: Path,
    identity: Any,
    progress: Progress = lambda n: None,
    allow_nonfinite: bool = True,
) -> Written:
    """Write the checkpoint `out`, which must not exist; an interrupted one of the same `identity` is gone on with.
    DataError for NaN and infinities unless they are allowed; the manifest names those that were.

    files: for each file the pieces of weights in it, whole boxes, under the names that their hashes are kept by.
    side: files that go along. came: "family" and "layout" of the Hugging Face folder, if any.
    """
    partial = Partial(out, [identity, digests_of(side)])
    sizes = [{name: source.dtype(p.name, p.box).itemsize * p.length for name, p in file.items()} for file in files]
    disk.require_space(partial.folder, sum(sum(each.values()) for each in sizes) - partial.bytes())
    for number, (file, size) in enumerate(zip(files, sizes, strict=True)):
        if not partial.write(rank_file(number), _maker(source, file, progress)):
            progress(sum(size.values()))
    for name in side:
        partial.write(name, lambda path, name=name: (write_bytes(path, side[name]), {}))
    found = nonfinite_in(partial, source, allow_nonfinite)
    write_manifest(
        partial.folder,
        {
            "step": 0,
            "tokens": 0,
            "adam_steps": 0,
            "layout": {"dp": 1, "ep": 1, "tp": 1, "zero": 0},
            "run": {"model": model.model_dump(mode="json")},
            "data": None,
            "hf": dict(came),
            "versions": {"moe_engine": moe_engine.__version__, "torch": torch.__version__},
            "weights": {name: list(shape) for name, shape in source.shapes.items()},
            "files": {name: record["digest"] for name, record in partial.files.items()},
        }
        | ({"nonfinite": found} if found else {}),
    )
    partial.publish()
    return Written(partial.tensors(), sum(sum(each.values()) for each in sizes))


def _maker(
    source: Weights, pieces: Mapping[str, Piece], progress: Progress
) -> Callable[[Path], tuple[Digest, dict[str, str]]]:
    def write(path: Path) -> tuple[Digest, dict[str, str]]:
        """One shard: piece i as the flat tensor master/i/NAME in its own dtype; hashes by keys of `pieces`."""
        hashes: dict[str, str] = {}
        keys = {f"master/{i}/{piece.name}": name for i, (name, piece) in enumerate(pieces.items())}
        entries = {}
        for key, piece in zip(keys, pieces.values(), strict=True):
            entries[key] = Entry(source.dtype(piece.name, piece.box), (piece.length,))

        def tensor_of(key: str) -> Tensor:
            piece = pieces[keys[key]]
            assert piece.length == volume(piece.box), piece
            tensor = source.part(piece.name, piece.box)
            hashes[keys[key]] = hash_of(tensor)
            progress(tensor.nbytes)
            return tensor.view(-1)

        metadata = {"pieces": json.dumps(list(pieces.values()))}
        return stream_shard(path, entries, tensor_of, metadata), hashes

    return write


def hash_of(tensor: Tensor) -> str:
    """xxh3 (128 bits) of the bytes of a tensor, with its dtype, and with how many of its numbers are not finite if any
    is."""
    flat = memoryview(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]
    name = str(tensor.dtype).removeprefix("torch.")
    return f"{xxhash.xxh3_128(flat).hexdigest()} {name} {nonfinite(tensor)}".rstrip()


def nonfinite_in(partial: Partial, source: object, allowed: bool) -> dict[str, str]:
    """The tensors written that hold NaN or infinities, with how many; DataError, and nothing is left, unless that is
    allowed."""
    found = Written(partial.tensors(), 0).nonfinite()
    if found and not allowed:
        partial.discard()
        raise refusal(source, found, WHOLE_COPY)
    return found


def digests_of(side: Mapping[str, bytes]) -> dict[str, str]:
    """Hashes of small files, with the version that writes: part of what an interrupted conversion has to agree in."""
    found = {name: xxhash.xxh3_128(content).hexdigest() for name, content in side.items()}
    return found | {"moe_engine": moe_engine.__version__, "hash_of": "counts what is not finite"}


def write_bytes(path: Path, content: bytes) -> Digest:
    """Write and sync a small file."""
    hasher = Hasher()
    hasher.update(content)
    disk.write_file(path, [content])
    return hasher.digest()
