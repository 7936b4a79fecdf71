"""A Hugging Face folder, opened as a source of weights: looked at whole before anything is taken from it.

    config.json                       what the model is
    model.safetensors                 all tensors, or, for larger models,
    model.safetensors.index.json      {"weight_map": {tensor: file}} and the files that it names

Refused, with every reason at once: files that are missing, cut short, or lead out of the folder; tensors that the model
does not have, or lacks; two layouts of experts in one folder; shapes and dtypes that do not fit. What the hub's cache
links to is inside: snapshots/REVISION/FILE -> blobs/DIGEST of the same repository.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from moe_engine.checkpoint.hf.families import TABLES
from moe_engine.checkpoint.hf.table import Place, Table, places
from moe_engine.checkpoint.pieces import Piece, volume
from moe_engine.checkpoint.shard import MAX_HEADER, SUFFIX, TORCH_OF, Entry
from moe_engine.checkpoint.source import Source, Stored
from moe_engine.config import Model
from moe_engine.config_files import model_in, read_mapping
from moe_engine.config_hf import family_in
from moe_engine.config_report import BULLET, shown
from moe_engine.errors import ConfigError, DataError
from moe_engine.host.files import size_in
from moe_engine.weights import weight_shapes

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
COMPUTED = "rotary_emb.inv_freq"  # written by old versions; it follows from the configuration
SHOWN = 5


class HfFolder(Source):
    """The weights of a Hugging Face folder under the engine's names.

    config: of config.json. model, family, layout: what it is, and how its experts are written. places: of each tensor
    on disk, in order. entries: its dtype and shape. files: where it lies.
    """

    def __init__(self, folder: Path, keep_open: int = 1):
        self.config = read_config(folder)
        self.model: Model = model_in(folder / CONFIG, self.config)
        self.family = family_in(self.config)
        self.files = files_of(folder)
        self.entries: dict[str, Entry] = {}
        problems: list[str] = []
        for path in sorted(set(self.files.values())):
            self._read_header(path, problems)
        if self.model.num_hidden_layers > len(self.files):
            raise DataError(f"{folder}: num_hidden_layers {self.model.num_hidden_layers} of {len(self.files)} tensors")
        shapes = weight_shapes(self.model)
        self.layout, self.places = layout_of(TABLES[self.family], shapes, self.files)
        problems += mismatches(self.places, self.entries)
        if problems:
            more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
            raise DataError(f"{folder}: " + BULLET.join([*problems[:SHOWN], *more]))
        stored: dict[str, list[Stored]] = {}
        for name, place in self.places.items():
            piece = Piece(place.weight, place.box, 0, volume(place.box))
            stored.setdefault(place.weight, []).append(Stored(self.files[name], name, piece))
        super().__init__(folder, shapes, stored, keep_open)
        self._check_tied()

    def key(self, kind: str, stored: Stored) -> str:
        """The tensor's own name; there are no moments in such a folder."""
        assert kind == "master", kind
        return stored.key

    def elements_by_dtype(self) -> dict[str, int]:
        """Elements by dtype, the most frequent first."""
        count: dict[str, int] = {}
        for name in self.places:
            entry = self.entries[name]
            kind = str(entry.dtype).removeprefix("torch.")
            count[kind] = count.get(kind, 0) + torch.Size(entry.shape).numel()
        return dict(sorted(count.items(), key=lambda item: -item[1]))

    def _read_header(self, path: Path, problems: list[str]) -> None:
        expected = {name for name, file in self.files.items() if file == path}
        found = header_of(path)
        stray = [name for name in found if name not in expected and not name.endswith(COMPUTED)]
        problems += _lists(f"{path.name} holds what the index does not place there:", stray)
        problems += _lists(f"{path.name} lacks what the index places there:", sorted(expected - found.keys()))
        self.entries |= {name: found[name] for name in expected & found.keys()}

    def _check_tied(self) -> None:
        """A tied model may store its head all the same; it has to be the embedding."""
        spare = self.entries.keys() - self.places.keys()
        if not spare:
            return
        (head,) = spare
        embedding = next(name for name, place in self.places.items() if place.weight == "embedding.weight")
        a, b = (self.file(self.files[name]).get_tensor(name) for name in (head, embedding))
        if not torch.equal(a, b):
            raise DataError(
                f"{self.folder}: tie_word_embeddings is true and {head} differs from {embedding}; set it to false in "
                "config.json to keep both"
            )


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder. ConfigError when there is none."""
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder; give a folder with config.json and safetensors files")
    if not (folder / CONFIG).is_file():
        raise ConfigError(f"{folder}: no config.json there; this is no Hugging Face model")
    return read_mapping(folder / CONFIG)


def files_of(folder: Path) -> dict[str, Path]:
    """The file of each tensor, from the index; for a single file, its tensors. DataError for what may not be read."""
    if not (folder / INDEX).exists():
        if not (folder / SINGLE).exists():
            other = sorted(path.name for path in folder.glob("*.bin"))
            why = f"{other[0]} is a pickle, which is not read: save it with safe_serialization=True" if other else ""
            raise DataError(f"{folder}: neither {SINGLE} nor {INDEX} is there; {why or 'is the download complete?'}")
        path = inside(folder, SINGLE)
        return {name: path for name in header_of(path) if not name.endswith(COMPUTED)}
    text = inside(folder, INDEX).read_bytes()
    if len(text) > MAX_HEADER:
        raise DataError(f"{folder / INDEX}: {len(text)} bytes, more than any model needs")
    try:
        table = json.loads(text, object_pairs_hook=_unique)
        weight_map = table["weight_map"]
        pairs = [(name, file) for name, file in weight_map.items() if not name.endswith(COMPUTED)]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{folder / INDEX}: no index of safetensors files ({error})") from None
    paths = {file: inside(folder, file) for file in dict.fromkeys(file for _, file in pairs)}
    return {name: paths[file] for name, file in pairs}


def inside(folder: Path, name: Any) -> Path:
    """The path of a regular file of the folder itself, or of the blob that the hub's cache links it to."""
    plain = isinstance(name, str) and name == Path(name).name and name not in ("", ".", "..")
    if not plain or not (name.endswith(SUFFIX) or name == INDEX):
        raise DataError(f"{folder / INDEX}: names {shown(name)}, expected the name of a .safetensors file beside it")
    path = folder / name
    if size_in(folder, path) is not None:
        return path
    if blob_of(folder, path):
        return path
    if path.is_symlink():
        raise DataError(f"{path}: a link to elsewhere, which is not followed; copy the file here (cp -L)")
    raise DataError(f"{path}: missing, or no regular file; is the download complete?")


def blob_of(folder: Path, path: Path) -> Path | None:
    """What the hub's cache links a file to: a regular file in the blobs of the same repository. None if it is not."""
    blobs, real = folder.resolve().parent.parent / "blobs", path.resolve()
    hub = path.is_symlink() and folder.resolve().parent.name == "snapshots" and real.parent == blobs
    return real if hub and size_in(blobs, real) is not None else None


def header_of(path: Path) -> dict[str, Entry]:
    """Dtype and shape of each tensor of a safetensors file. DataError unless the file is whole and of floats."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(MAX_HEADER, size - 8):
            raise DataError(f"{path}: a header of {length} bytes in a file of {size}; damaged, or no safetensors file")
        text = file.read(length)
    try:
        table = json.loads(text, object_pairs_hook=_unique)
        table.pop("__metadata__", None)
        rows = [
            (name, str(row["dtype"]), tuple(map(int, row["shape"])), *map(int, row["data_offsets"]))
            for name, row in table.items()
        ]
        if any(len(row) != 5 or min(row[2], default=0) < 0 for row in rows):
            raise ValueError("a tensor without two offsets, or with a negative side")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise DataError(f"{path}: a header that is no safetensors header ({error})") from None
    end = 0
    out = {}
    for name, dtype, shape, start, stop in sorted(rows, key=lambda row: (row[3], row[4])):
        if TORCH_OF.get(dtype) not in FLOATS:
            raise DataError(
                f"{path}: {shown(name)} is {shown(dtype)}, expected F32, BF16 or F16 (quantised weights are not read)"
            )
        entry = Entry(TORCH_OF[dtype], shape)
        if start != end or stop - start != entry.nbytes:
            raise DataError(f"{path}: the places of {shown(name)} do not fit its shape {list(shape)}")
        end, out[name] = stop, entry
    if 8 + length + end != size:
        raise DataError(f"{path}: {size} bytes, its header describes {8 + length + end}; cut short, or not complete")
    return out


def layout_of(
    table: Table, shapes: Mapping[str, tuple[int, ...]], names: Mapping[str, Any]
) -> tuple[str, dict[str, Place]]:
    """The layout in which a folder's tensors are written: of those that the family has, the one they fit best."""
    found = {layout: places(rows, shapes) for layout, rows in table.items()}
    return max(found.items(), key=lambda item: len(item[1].keys() & names.keys()) / len(item[1]))


def mismatches(expected: Mapping[str, Place], entries: Mapping[str, Entry]) -> list[str]:
    """What is wrong with the names and shapes of the tensors that were found, one line each."""
    problems = list(_lists("lacks", [name for name in expected if name not in entries]))
    extra = [name for name in entries if name not in expected]
    if extra == ["lm_head.weight"] and not any(place.weight == "head.weight" for place in expected.values()):
        extra = []  # a tied head that was stored all the same
    problems += _lists("holds what the model does not have:", extra)
    for name, place in expected.items():
        if name in entries and entries[name].shape != place.shape:
            problems.append(f"{name}: shape {list(entries[name].shape)}, expected {list(place.shape)} from config.json")
    return problems


def _lists(verb: str, names: list[str]) -> Iterator[str]:
    if names:
        rest = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        yield f"{verb} {', '.join(shown(name)[1:-1] for name in names[:SHOWN])}{rest}"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in pairs:
        if key in out:
            raise ValueError(f"{shown(key)} is there twice")
        out[key] = value
    return out
