"""A checkpoint is a folder: one safetensors file a rank, and a manifest. No pickle, and never half of one.

    out/checkpoints/step-00000100.tmp/   every rank writes rank-00003.safetensors and syncs it
                                         rank 0 writes manifest.json (sizes, SHA-256, layout, data order) and syncs it
    out/checkpoints/step-00000100/       the folder is renamed, then `latest` is replaced

A rank writes only what it owns. Each file says, in its header, which part of which whole weight it holds:

    piece = (name, box of the whole weight that the rank held, start and length in that box flattened)

so that a reader can put every weight together again, whatever the layout that wrote it.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from moe_engine.errors import ConfigError, DataError

FORMAT = 1
Box = tuple[tuple[int, int], ...]  # (start, stop) along each dimension of the whole weight


class Piece(NamedTuple):
    """A run of elements of one weight: `length` of them from `start`, in the flattened `box` of the whole weight."""

    name: str
    box: Box
    start: int
    length: int


def save(
    root: Path,
    step: int,
    pieces: Iterable[tuple[Piece, Mapping[str, Tensor]]],
    extra: Mapping[str, Tensor],
    manifest: dict[str, Any],
) -> Path:
    """Write the checkpoint of `step` under `root`; collective over all ranks. Returns its folder.

    pieces: what this rank owns, each with its flat tensors by kind ("master", "exp_avg", ...). extra: small tensors of
    this rank. manifest: JSON values of the run, taken from rank 0.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    final = root / f"step-{step:08d}"
    temporary = final.with_suffix(".tmp")
    if rank == 0:
        _remove(temporary)
        temporary.mkdir(parents=True)
    _barrier()
    table, tensors = [], {f"extra/{name}": value.detach().cpu().contiguous() for name, value in extra.items()}
    for piece, kinds in pieces:
        table.append(piece)
        tensors |= {f"{kind}/{len(table) - 1}": value.detach().cpu().contiguous() for kind, value in kinds.items()}
    path = temporary / _rank_file(rank)
    save_file(tensors, path, metadata={"pieces": json.dumps(table)})
    _sync(path)
    _write_text(path.with_suffix(".json"), json.dumps(_digest(path)))  # every rank hashes its own
    _barrier()
    if rank == 0:
        files = {_rank_file(r): _take_json((temporary / _rank_file(r)).with_suffix(".json")) for r in range(world)}
        _publish(temporary, final, {"format": FORMAT, "step": step, "files": files} | manifest)
    _barrier()
    return final


def _publish(temporary: Path, final: Path, manifest: dict[str, Any]) -> None:
    """Complete the folder and give it its name; an older one of that name goes only when `latest` is safe again."""
    root, old = final.parent, final.with_suffix(".old")
    _write_text(temporary / "manifest.json", json.dumps(manifest, indent=1))
    _sync(temporary)
    if final.is_dir():
        os.rename(final, old)
    os.rename(temporary, final)
    _write_text(root / "latest.tmp", final.name)
    os.replace(root / "latest.tmp", root / "latest")
    _sync(root)
    _remove(old)


def find(resume: str, root: Path) -> Path | None:
    """The folder that `resume` means: a path, or "auto" for the one `latest` names (None when there is none yet)."""
    if resume != "auto":
        path = Path(resume)
        if not (path / "manifest.json").is_file():
            raise ConfigError(
                f"--resume {resume}: no manifest.json there; give a folder step-N written by this engine, or auto"
            )
        return path
    latest = root / "latest"
    if not latest.is_file():
        return None
    path = root / latest.read_text().strip()
    if not (path / "manifest.json").is_file():
        raise DataError(
            f"{latest} names {path.name}, which has no manifest.json; give --resume the folder of another checkpoint"
        )
    return path


class Reader:
    """A checkpoint opened for reading; sizes and SHA-256 of all files are verified first (DataError names the file)."""

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            self.manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
        except ValueError as error:
            raise DataError(
                f"{folder / 'manifest.json'}: not JSON ({error}); resume from another checkpoint"
            ) from error
        if self.manifest.get("format") != FORMAT:
            raise DataError(f"{folder}: format {self.manifest.get('format')}, this version reads format {FORMAT}")
        for name, expected in self.manifest["files"].items():
            if not (folder / name).is_file() or _digest(folder / name) != expected:
                raise DataError(
                    f"{folder / name}: missing, cut short or changed since it was written; "
                    "resume from another checkpoint"
                )
        self.files = {name: safe_open(folder / name, "pt") for name in self.manifest["files"]}
        self.pieces: dict[str, list[tuple[str, int, Piece]]] = {}
        for file, opened in self.files.items():
            for i, (name, box, start, length) in enumerate(json.loads(opened.metadata()["pieces"])):
                self.pieces.setdefault(name, []).append((file, i, Piece(name, tuple(map(tuple, box)), start, length)))

    def whole(self, name: str, kind: str, shape: tuple[int, ...]) -> Tensor:
        """The whole tensor of one kind of one weight, put together from every rank's pieces (fp32)."""
        boxes: dict[Box, Tensor] = {}
        found = 0
        for file, i, piece in self.pieces.get(name, []):
            sides = [stop - start for start, stop in piece.box]
            flat = boxes.setdefault(piece.box, torch.empty(torch.Size(sides).numel()))
            flat[piece.start : piece.start + piece.length] = self.files[file].get_tensor(f"{kind}/{i}")
            found += piece.length
        if found != torch.Size(shape).numel():
            raise DataError(
                f"{self.folder}: {name} has {found} elements here and {torch.Size(shape).numel()} in the run; "
                "resume with the model that wrote it"
            )
        out = torch.empty(shape)
        for box, flat in boxes.items():
            place = tuple(slice(*side) for side in box)
            out[place] = flat.view(out[place].shape)
        return out

    def extra(self, rank: int) -> dict[str, Tensor]:
        """The small tensors that rank `rank` of the writing run stored."""
        opened = self.files[_rank_file(rank)]
        names = [key for key in opened.keys() if key.startswith("extra/")]  # noqa: SIM118 (not a dict)
        return {name.removeprefix("extra/"): opened.get_tensor(name) for name in names}


def _rank_file(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def _digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _take_json(path: Path) -> Any:
    value = json.loads(path.read_text())
    path.unlink()
    return value


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text)
    _sync(path)


def _remove(folder: Path) -> None:
    if folder.is_dir():
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
