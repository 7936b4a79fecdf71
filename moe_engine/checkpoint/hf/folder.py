"""A Hugging Face folder, opened as a source of weights: looked at whole before anything is taken from it.

config.json says what the model is, contents.py which files hold its tensors. Refused, with every reason at once: files
that are missing, cut short, or lead out of the folder; tensors that the model does not have, or lacks; two layouts of
experts in one folder; shapes and dtypes that do not fit.
"""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from moe_engine.checkpoint.hf.contents import CONFIG, INDEX, SINGLE, chosen, contents_of, regular
from moe_engine.checkpoint.hf.places import Place, Shape, places
from moe_engine.checkpoint.pieces import Piece, volume
from moe_engine.checkpoint.shard import MAX_HEADER, SUFFIX, TORCH_OF, Entry
from moe_engine.checkpoint.source import Source, Stored
from moe_engine.config import Model
from moe_engine.config.files import model_in, read_mapping
from moe_engine.config.hf import family_in
from moe_engine.config.hf.families import FAMILIES
from moe_engine.config.hf.families.family import Tensors
from moe_engine.config.messages import BULLET, shown
from moe_engine.config.weights import weight_shapes
from moe_engine.errors import ConfigError, DataError

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
COMPUTED = "rotary_emb.inv_freq"  # written by old versions; it follows from the configuration
SHOWN = 5


class HfFolder(Source):
    """The weights of a Hugging Face folder under the engine's names.

    config: of config.json. model, family, layout: what it is, and how its experts are written. side: the files that go
    along. places: of each tensor on disk, in order. entries: its dtype and shape. files: where it lies. chosen: the
    file that says so; unread: other weights that are there. notes: for the user, of config.json.
    """

    def __init__(self, folder: Path, keep_open: int = 1):
        self.config = read_config(folder)
        self.chosen = chosen(folder, self.config)
        self.notes: list[str] = []
        self.model: Model = model_in(folder / CONFIG, self.config, self.notes)
        self.family = family_in(self.config)
        self.side, weights = contents_of(folder)
        try:
            self.files = files_of(folder, self.chosen)
            self.entries: dict[str, Entry] = {}
            shapes, stored = self._look(folder)
            super().__init__(folder, shapes, stored, keep_open)
            self._check_tied()
        except DataError as error:
            if self.chosen == INDEX or not os.path.lexists(folder / INDEX):
                raise
            hint = f"{SINGLE} is read first, as by transformers, and {INDEX} is there too: remove the one that is stale"
            raise DataError(f"{error}{BULLET}{hint}") from None
        used = {self.chosen, *(path.name for path in self.files.values())}
        self.unread = [name for name in weights if name not in used]

    def __str__(self) -> str:
        """The folder, and which of the weights in it are read."""
        unread = f"; not read: {_some(self.unread)}" if self.unread else ""
        return f"{self.folder} ({self.chosen}{unread})"

    def _look(self, folder: Path) -> tuple[dict[str, Shape], dict[str, list[Stored]]]:
        """Headers against the model: the weights' shapes, and the pieces that make them up."""
        problems: list[str] = []
        for path in sorted(set(self.files.values())):
            self._read_header(path, problems)
        if self.model.num_hidden_layers > len(self.files):
            raise DataError(f"{folder}: num_hidden_layers {self.model.num_hidden_layers} of {len(self.files)} tensors")
        shapes = weight_shapes(self.model)
        self.layout, self.places = matching_layout(FAMILIES[self.family].tensors, shapes, self.files)
        if self.model.tie_word_embeddings and EMBEDDING not in self.files and HEAD in self.files:
            # one tensor under either name, as in transformers
            self.places = {HEAD if name == EMBEDDING else name: place for name, place in self.places.items()}
        problems += mismatches(self.places, self.entries)
        if problems:
            more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
            raise DataError(f"{folder}: " + BULLET.join([*problems[:SHOWN], *more]))
        stored: dict[str, list[Stored]] = {}
        for name, place in self.places.items():
            piece = Piece(place.weight, place.box, 0, volume(place.box))
            stored.setdefault(place.weight, []).append(Stored(self.files[name], name, piece))
        return shapes, stored

    def key(self, kind: str, stored: Stored) -> str:
        """The tensor's own name; there are no moments in such a folder."""
        assert kind == "master", kind
        return stored.key

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
        if not bool(((a == b) | (a.isnan() & b.isnan())).all()):
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


def files_of(folder: Path, chosen: str) -> dict[str, Path]:
    """The file of each tensor, from the index; for a single file, its tensors. DataError for what may not be read."""
    if chosen == SINGLE:
        path = inside(folder, SINGLE)
        return {name: path for name in header_of(path) if not name.endswith(COMPUTED)}
    text = regular(folder, folder / INDEX).read_bytes()
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
    """The file of a folder that its index names."""
    plain = isinstance(name, str) and name == Path(name).name and name not in ("", ".", "..")
    if not plain or not name.endswith(SUFFIX):
        raise DataError(f"{folder / INDEX}: names {shown(name)}, expected the name of a .safetensors file beside it")
    path = folder / name
    regular(folder, path)
    return path


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


def matching_layout(
    tensors: Tensors, shapes: Mapping[str, tuple[int, ...]], names: Mapping[str, Any]
) -> tuple[str, dict[str, Place]]:
    """The layout in which a folder's tensors are written: of those that the family has, the one they fit best."""
    found = {layout: places(rows, shapes) for layout, rows in tensors.items()}
    return max(found.items(), key=lambda item: len(item[1].keys() & names.keys()) / len(item[1]))


def mismatches(expected: Mapping[str, Place], entries: Mapping[str, Entry]) -> list[str]:
    """What is wrong with the names and shapes of the tensors that were found, one line each."""
    problems = list(_lists("lacks", [name for name in expected if name not in entries]))
    extra = [name for name in entries if name not in expected]
    if extra == [HEAD] and not any(place.weight == "head.weight" for place in expected.values()):
        extra = []  # a tied head that was stored all the same
    problems += _lists("holds what the model does not have:", extra)
    for name, place in expected.items():
        if name in entries and entries[name].shape != place.shape:
            problems.append(f"{name}: shape {list(entries[name].shape)}, expected {list(place.shape)} from config.json")
    return problems


def _lists(verb: str, names: list[str]) -> Iterator[str]:
    if names:
        yield f"{verb} {_some(names)}"


def _some(names: list[str]) -> str:
    rest = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{', '.join(shown(name)[1:-1] for name in names[:SHOWN])}{rest}"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in pairs:
        if key in out:
            raise ValueError(f"{shown(key)} is there twice")
        out[key] = value
    return out
