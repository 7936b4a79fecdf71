"""Samples from files: the format is recognised from the first rows, each row becomes a sample or says why not.

    .jsonl .json .parquet, also .gz and .zst (formats.py), folders of them, folders that `datasets` saved (FOLDER:split)

Every row is counted once: kept, left out for a reason, or bad. Of flat OASST files the rows are messages.
"""

import difflib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

from moe_engine.errors import ConfigError, DataError
from moe_engine.prepare import oasst
from moe_engine.prepare.files import ROW_SUFFIXES, list_files, suffix_of
from moe_engine.prepare.formats import BadRow, Chunk, read_chunks, rows_of
from moe_engine.prepare.sample_formats import FORMATS, Format, LeftOut, Malformed, Sample

FLAT_OASST = "oasst"
ALL_FORMATS: dict[str, Format] = {
    "oasst-tree": Format(tuple((name,) for name in oasst.NESTED), oasst.tree),
    **FORMATS,
}
NAMES = (FLAT_OASST, *ALL_FORMATS)
KEYS = tuple(sorted({name for kind in ALL_FORMATS.values() for names in kind.needs for name in names} | {*oasst.FLAT}))
SHOWN_ROWS = 32  # that the format is recognised from

Located = tuple[str, str, Any]  # path, where, the row


class Samples:
    """The samples of one source. Iterating gives each Sample, or the BadRow that stands in its place.

    format: one of NAMES. After iterating, counts: rows "read", "kept" and "bad"; left_out: the others by reason.
    """

    def __init__(self, rows: Iterator[Located | BadRow], format: str, columns: Mapping[str, str]) -> None:
        self.rows, self.format, self.columns = rows, format, columns
        self.counts = Counter(read=0, kept=0, bad=0)
        self.left_out: Counter[str] = Counter()

    def __iter__(self) -> Iterator[Sample | BadRow]:
        yield from self._trees() if self.format == FLAT_OASST else self._each()
        assert self.counts["read"] == self.counts["kept"] + self.counts["bad"] + self.left_out.total(), self

    def _each(self) -> Iterator[Sample | BadRow]:
        read = ALL_FORMATS[self.format]
        for located in self.rows:
            self.counts["read"] += located.rows if isinstance(located, BadRow) else 1
            made = located if isinstance(located, BadRow) else self._read(read, *located)
            if isinstance(made, BadRow):
                self.counts["bad"] += made.rows
                yield made
            elif made is not None:
                self.counts["kept"] += 1
                yield made

    def _read(self, kind: Format, path: str, where: str, row: Any) -> Sample | BadRow | None:
        try:
            row = self._renamed(row)
            if not kind.fits(row):
                needed = ", ".join(" or ".join(names) for names in kind.needs)
                raise Malformed(f"fields are {', '.join(list(row)[:8]) or 'none'}; {self.format} needs {needed}")
            return checked(kind.read(row))._replace(where=f"{path}:{where}")
        except LeftOut as reason:
            self.left_out[str(reason)] += 1
            return None
        except Malformed as problem:
            return BadRow(path, where, str(problem))

    def _trees(self) -> Iterator[Sample | BadRow]:
        rows = []
        for located in self.rows:
            self.counts["read"] += located.rows if isinstance(located, BadRow) else 1
            bad = located if isinstance(located, BadRow) else None
            if not isinstance(located, BadRow):
                path, where, row = located
                if isinstance(row, Mapping) and "message_id" in row and row.get("role") in ("prompter", "assistant"):
                    rows.append(row)
                else:
                    bad = BadRow(path, where, "no message of OASST; expected message_id, role prompter or assistant")
            if bad:
                self.counts["bad"] += bad.rows
                yield bad
        samples, reasons = oasst.flat(rows)
        self.counts["kept"] += reasons.pop("in a sample", 0)
        self.left_out += reasons
        yield from samples

    def _renamed(self, row: Any) -> Mapping[str, Any]:
        if not isinstance(row, Mapping):
            raise Malformed(f"the row is {type(row).__name__}; expected an object")
        return {**row, **{ours: row[theirs] for ours, theirs in self.columns.items() if theirs in row}}


def read_samples(
    paths: Sequence[str | Path], format: str | None = None, columns: Mapping[str, str] | None = None
) -> Samples:
    """The samples of files and folders. format None: recognised from the first rows. columns: ours -> the file's.

    ConfigError for a format that is not known or not recognised, and for a path that cannot be read.
    """
    columns = {"expert_label" if ours == "label" else ours: theirs for ours, theirs in (columns or {}).items()}
    rows = _rows(paths)
    if format is None:
        first = list(islice(rows, SHOWN_ROWS))
        shown = [row for located in first if not isinstance(located, BadRow) for row in [located[2]]]
        format, rows = recognise(shown, columns, ", ".join(map(str, paths))), chain(first, rows)
    elif format not in NAMES:
        near = difflib.get_close_matches(format, NAMES, 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ConfigError(f"--format {format}: expected one of {', '.join(NAMES)}{hint}")
    return Samples(rows, format, columns)


def recognise(rows: Sequence[Any], columns: Mapping[str, str], source: str) -> str:
    """The format of most of the first rows; ConfigError when there is none."""
    found = Counter[str]()
    for row in rows:
        if isinstance(row, Mapping):
            row = {**row, **{ours: row[theirs] for ours, theirs in columns.items() if theirs in row}}
            if all(name in row for name in oasst.FLAT):
                found[FLAT_OASST] += 1
            elif name := next((name for name, kind in ALL_FORMATS.items() if kind.fits(row)), None):
                found[name] += 1
    if found:
        return found.most_common(1)[0][0]
    if not rows:
        raise DataError(f"{source}: no row in it; give a file with samples")
    keys = ", ".join(map(str, list(rows[0])[:12])) if isinstance(rows[0], Mapping) else type(rows[0]).__name__
    needs = "; ".join(f"{name}: {', '.join(' or '.join(n) for n in kind.needs)}" for name, kind in ALL_FORMATS.items())
    raise ConfigError(
        f"{source}: the format is not recognised from its columns {keys}. Name them with --columns ours=theirs, for "
        f"instance prompt=question,response=reply. Formats and the columns they need: {needs}"
    )


def checked(sample: Sample) -> Sample:
    """The sample; Malformed for text that cannot be encoded."""
    for message in [*sample.messages, *(sample.rejected or [])]:
        try:
            message["content"].encode()
        except UnicodeEncodeError as error:
            raise Malformed(f"a lone surrogate at character {error.start + 1} of a message") from None
        if "\0" in message["content"]:
            raise Malformed("a message that holds NUL (U+0000)")
    return sample


def files_of(paths: Sequence[str | Path]) -> list[Path]:
    """The files that samples of these paths are read from."""
    found: list[Path] = []
    for path in paths:
        saved = _saved_dataset(str(path))
        found += sorted(saved[0].rglob("*.arrow")) if saved else list_files([path]).files
    return found


def _rows(paths: Sequence[str | Path]) -> Iterator[Located | BadRow]:
    for path in paths:
        if (folder := _saved_dataset(str(path))) is not None:
            yield from _dataset_rows(*folder)
            continue
        for file in list_files([path]).files:
            if suffix_of(file) not in ROW_SUFFIXES:
                raise ConfigError(f"{file}: no rows; samples are read from {' '.join(ROW_SUFFIXES)}")
            for chunk in read_chunks(file, keys=KEYS):
                if isinstance(chunk, Chunk):
                    for where, row in rows_of(chunk):
                        yield row if isinstance(row, BadRow) else (chunk.path, where, row)
                else:
                    yield chunk


def _saved_dataset(path: str) -> tuple[Path, str | None] | None:
    """A folder that `datasets` saved, and the split that is asked for; None for another path."""
    folder, colon, split = path.rpartition(":") if not Path(path).exists() and ":" in path else (path, "", "")
    root = Path(folder)
    saved = any((root / name).is_file() for name in ("dataset_info.json", "dataset_dict.json"))
    return (root, split if colon else None) if saved and root.is_dir() else None


def _dataset_rows(folder: Path, split: str | None) -> Iterator[Located]:
    from datasets import load_from_disk

    found: Any = load_from_disk(str(folder))
    if (folder / "dataset_dict.json").is_file():
        name = split or "train"
        if name not in found:
            raise ConfigError(f"{folder}: has no split {name}; choose one of {', '.join(found)}, as {folder}:SPLIT")
        found = found[name]
    for number, row in enumerate(found, 1):
        yield str(folder), f"row {number}", row
