"""The files of an input: found once each, and opened.

    list_files(paths)   folders walked in sorted order, links followed, hidden entries left out; named files as given
    open_file(path)     its bytes, unpacked where the name ends in .gz or .zst, all members and frames of it

A file or folder that is met again, by a link or another path, is read once and listed; a file of a folder with an
ending that is not read is counted. Endings are told without regard to case.
"""

import gzip
import io
import os
import zlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from moe_engine.errors import ConfigError, DataError

TEXT_SUFFIXES = (".txt", ".md", ".py")
ROW_SUFFIXES = (".jsonl", ".json", ".parquet")
COMPRESSION = (".gz", ".zst")
OTHER_COMPRESSION = (".xz", ".bz2", ".lz4", ".zip", ".tar", ".tgz", ".7z")
READ_ERRORS = (OSError, EOFError, zlib.error)


class Listing(NamedTuple):
    """What a walk found: files in order; (path, the path it was met by first); counts of files not read, by ending."""

    files: list[Path]
    again: list[tuple[Path, Path]]
    passed_over: Counter[str]


def suffix_of(path: Path) -> str:
    """The ending that tells the format, in lower case: .jsonl of A.JSONL.GZ."""
    return Path(path.stem if path.suffix.lower() in COMPRESSION else path.name).suffix.lower()


def list_files(paths: Iterable[str | Path]) -> Listing:
    """Every file to read, each once. ConfigError for a path that cannot be read, DataError for what a folder holds."""
    walk = _Walk()
    for path in map(Path, paths):
        if path.is_dir():
            if walk.is_new(path):
                walk.folder(path)
        elif path.is_file():
            if packed := {path.suffix.lower(), suffix_of(path)} & {*OTHER_COMPRESSION}:
                raise ConfigError(f"{path}: {packed.pop()} is not read; unpack it, or compress with gzip or zstd")
            walk.file(path)
        else:
            raise ConfigError(f"{path}: no such file or folder; check the path given as input")
    return Listing(walk.files, walk.again, walk.passed_over)


def _readable() -> str:
    return f"{' '.join(TEXT_SUFFIXES + ROW_SUFFIXES)} (each also with {' or '.join(COMPRESSION)})"


class _Walk:
    def __init__(self) -> None:
        self.files: list[Path] = []
        self.again: list[tuple[Path, Path]] = []
        self.passed_over: Counter[str] = Counter()
        self.seen: dict[tuple[int, int], Path] = {}

    def is_new(self, path: Path) -> bool:
        """Whether this file or folder was not met before, by whatever path."""
        status = path.stat()
        first = self.seen.setdefault((status.st_dev, status.st_ino), path)
        if first is not path:
            self.again.append((path, first))
        return first is path

    def file(self, path: Path) -> None:
        """Take the file unless it was met before."""
        if self.is_new(path):
            self.files.append(path)

    def folder(self, top: Path) -> None:
        """Take the files below `top` whose ending is read, sorted folder by folder, through links. DataError for a
        folder that cannot be listed, for a pipe or broken link with such an ending, and for no file at all."""
        before = len(self.files) + len(self.again)
        for root, folders, names in os.walk(top, followlinks=True, onerror=_refuse):
            hidden = [name for name in folders + names if name.startswith(".")]
            self.passed_over.update(["hidden"] * len(hidden))
            for name in sorted({*names}.difference(hidden)):
                path = Path(root, name)
                if suffix_of(path) not in TEXT_SUFFIXES + ROW_SUFFIXES:
                    self.passed_over[_ending(path)] += 1
                    continue
                if not path.is_file():
                    raise DataError(f"{path}: a pipe, a device or a link to nothing, not a file; take it out")
                self.file(path)
            folders[:] = [name for name in sorted({*folders}.difference(hidden)) if self.is_new(Path(root, name))]
        if len(self.files) + len(self.again) == before:
            raise DataError(f"{top}: no file to read in this folder; expected {_readable()}")


def _ending(path: Path) -> str:
    """How a file that is not read is counted: .pdf, .csv.gz, or what it is instead of a file with an ending."""
    if not path.exists():
        return "link to nothing"
    suffix = path.suffix.lower()
    packed = suffix in COMPRESSION + OTHER_COMPRESSION
    return Path(path.stem).suffix.lower() + suffix if packed else suffix or "no ending"


def _refuse(error: OSError) -> None:
    raise DataError(f"{error.filename}: cannot be listed: {error.strerror}; make it readable or take it out")


def open_file(path: Path) -> gzip.GzipFile | io.BufferedReader:
    """The bytes of the file, unpacked. Damage, and an end before the end of the stream, raise one of READ_ERRORS."""
    packed = path.suffix.lower()
    if packed == ".gz":
        return gzip.open(path)
    return io.BufferedReader(_Zstd(_unpacked(path))) if packed == ".zst" else open(path, "rb")


def _unpacked(path: Path) -> Any:
    try:
        import pyarrow
    except ImportError:
        raise ConfigError(f"{path}: reading .zst needs pyarrow; pip install pyarrow") from None
    return pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd")


class _Zstd(io.RawIOBase):
    """Arrow's stream as one of Python's. A read that meets damage loses what it has so far, hence small reads."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Bytes put into the buffer, at most 4 KiB; 0 at the end."""
        part = self.stream.read(min(len(buffer), 1 << 12))
        buffer[: len(part)] = part
        return len(part)

    def close(self) -> None:
        self.stream.close()
        super().close()
