"""A checkpoint, opened on any layout: each rank copies its own elements, whatever pieces they were written in."""

import json
from pathlib import Path

from torch import Tensor

from moe_engine.checkpoint.manifest import NAME, file_in, problems_of, read_manifest
from moe_engine.checkpoint.pieces import Piece
from moe_engine.checkpoint.shard import SUFFIX, rank_file
from moe_engine.checkpoint.source import Source, Stored
from moe_engine.config import Model
from moe_engine.errors import ConfigError, DataError


class Checkpoint(Source):
    """The weights and training state in a folder step-N, or in an imported checkpoint; read when they are asked for."""

    def __init__(self, folder: Path, keep_open: int = 0):
        self.manifest = read_manifest(folder)
        super().__init__(folder, {name: tuple(s) for name, s in self.manifest["weights"].items()}, {}, keep_open)
        stored: dict[str, list[Stored]] = {}
        files = [file_in(folder, name) for name in self.manifest["files"]]
        for path in (path for path in files if path.suffix == SUFFIX):
            for i, (name, box, start, length) in enumerate(json.loads(self.file(path).metadata()["pieces"])):
                piece = Piece(name, tuple(map(tuple, box)), start, length)
                stored.setdefault(name, []).append(Stored(path, f"{i}/{name}", piece))
        self.stored = stored

    @property
    def model(self) -> Model:
        """The model that it was written by."""
        return Model.model_validate(self.manifest["run"]["model"])

    def extra(self, rank: int) -> dict[str, Tensor]:
        """The small tensors that rank `rank` of the writing run stored."""
        opened = self.file(file_in(self.folder, rank_file(rank)))
        names = [key for key in opened.keys() if key.startswith("extra/")]  # noqa: SIM118 (not a dict)
        return {name.removeprefix("extra/"): opened.get_tensor(name) for name in names}


def open_checkpoint(folder: Path, verify: bool = True) -> Checkpoint:
    """For a tool that streams through it. ConfigError where there is none; DataError, if asked to `verify`, when its
    files are not what its manifest says."""
    if not (folder / NAME).is_file():
        raise ConfigError(f"{folder}: no manifest.json there; give an imported checkpoint, or step-N of a run")
    checkpoint = Checkpoint(folder, keep_open=1)
    if verify and (problems := problems_of(folder, checkpoint.manifest)):
        raise DataError("; ".join(problems))
    return checkpoint
