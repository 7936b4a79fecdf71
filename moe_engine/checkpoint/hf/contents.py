"""What lies in a Hugging Face folder: which files are its weights, and which go along with them, byte for byte.

    model.safetensors                 all tensors; what transformers looks for first, and so do we
    model.safetensors.index.json      {"weight_map": {tensor: file}}, where the former is not there
    other weights                     stay: another set, another format, what an earlier save left
    sub/ with config and weights      stays: another model, or a checkpoint
    .git/ .cache/ __pycache__/        stay: of the tools that made the folder
    everything else                   goes along, sub-folders too; code is copied and never run

A link is followed to a regular file of the same folder, or of the blobs of the same repository in the hub's cache:
snapshots/REVISION/FILE -> blobs/DIGEST. What leads elsewhere is refused.
"""

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from moe_engine.checkpoint.manifest import NAME
from moe_engine.checkpoint.partial import PROGRESS
from moe_engine.config.messages import shown
from moe_engine.errors import ConfigError, DataError
from moe_engine.host.files import size_in

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER = "adapter_config.json"
WEIGHTS = re.compile(
    r"\.(safetensors|bin|pt|pth|ckpt|gguf|ggml|h5|keras|msgpack|onnx|onnx_data|ot|tflite|nemo|pdparams)"
    r"(\.index(\.[\w-]+)?\.json)?\Z",
    re.IGNORECASE,
)
MAX_FILES = 10_000  # a model has a hundred; this is somebody's home


class SideFiles(Mapping[str, bytes]):
    """Files by name ("sub/file" in a sub-folder), each read when it is asked for."""

    def __init__(self, paths: Mapping[str, Path]):
        self._paths = dict(sorted(paths.items()))

    def __getitem__(self, name: str) -> bytes:
        path = self._paths[name]
        try:
            return path.read_bytes()
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)


class Contents(NamedTuple):
    """side: the files that go along. weights: the names of all weights, of the sub-folders that stay too."""

    side: SideFiles
    weights: list[str]


def contents_of(folder: Path) -> Contents:
    """Look through a folder. DataError for what can neither go along nor stay: it would be lost without a word."""
    side: dict[str, Path] = {}
    weights: list[str] = []
    pending = [folder]
    while pending:
        here = pending.pop()
        try:
            entries = sorted(here.iterdir())
        except OSError as error:
            raise DataError(f"{here}: cannot be read ({error.strerror})") from None
        if here != folder and is_model({path.name for path in entries}):
            weights.append(f"{here.relative_to(folder).as_posix()}/")
            continue
        for path in entries:
            name = path.relative_to(folder).as_posix()
            if path.is_dir() and not path.is_symlink():
                pending += [] if path.name.startswith(".") or path.name == "__pycache__" else [path]
            elif is_weights(name):
                weights.append(name)
            elif name in (NAME, PROGRESS):
                raise DataError(f"{path}: checkpoints have a file of this name themselves; rename it or move it away")
            else:
                side[name] = regular(folder, path)
        if len(side) > MAX_FILES:
            raise DataError(f"{folder}: holds more than {MAX_FILES:,} files; give a folder of the model alone")
    return Contents(SideFiles(side), sorted(weights))


def is_weights(name: str) -> bool:
    """Whether a file has a name of weights, or of an index of weights, in any format."""
    return WEIGHTS.search(name) is not None


def is_model(names: set[str]) -> bool:
    """Whether files of these names make up a model of their own, or a checkpoint that is finished or not."""
    return bool(names & {CONFIG, NAME, PROGRESS}) and any(map(is_weights, names))


def chosen(folder: Path, config: Mapping[str, Any]) -> str:
    """The file that says where a folder's tensors are, of those that transformers would read the first.

    ConfigError where config.json names another, or where it would depend on what is installed; DataError where there is
    none.
    """
    if named := config.get("transformers_weights"):
        raise ConfigError(
            f"{folder}: config.json names {shown(named)} as its weights (transformers_weights), and {SINGLE} and "
            f"{INDEX} are read: rename the file that holds the model, and remove the key"
        )
    if os.path.lexists(folder / ADAPTER):
        raise ConfigError(
            f"{folder}: {ADAPTER} is there too, and whether its adapter counts depends on who reads the folder: merge "
            "it into the weights (merge_and_unload) or move it away"
        )
    for name in (SINGLE, INDEX):
        if os.path.lexists(folder / name):
            return name
    other = sorted(path.name for path in folder.glob("*.bin"))
    why = f"{other[0]} is a pickle, which is not read: save it with safe_serialization=True" if other else ""
    raise DataError(f"{folder}: neither {SINGLE} nor {INDEX} is there; {why or 'is the download complete?'}")


def regular(folder: Path, path: Path) -> Path:
    """The regular file that a path in a folder is, or that it links to inside; DataError if there is none."""
    if size_in(path.parent, path) is not None:
        return path
    if not path.is_symlink():
        raise DataError(f"{path}: missing, or no regular file; is the download complete?")
    root, real = folder.resolve(), Path(os.path.realpath(path))
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else root
    if (root in real.parents or blobs == real.parent) and size_in(real.parent, real) is not None:
        return real
    what = "a link to elsewhere, which is not followed" if path.exists() else "a link to nothing"
    raise DataError(f"{path}: {what}; copy the file here (cp -L), or remove it")
