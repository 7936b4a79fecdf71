"""Files and folders to documents, in bounded memory; what cannot be used comes out as a BadRow that says where and why.

    list_files(paths)         folders walked in sorted order, named files as given
    read_pieces(file)         a file as Pieces of about 1 MiB: picklable, so that a worker can parse them
    documents(piece, key)     a piece as Documents (text) or BadRows

    .txt .md .py  (and any other text file that is named explicitly)  one document a file; BOM dropped, CRLF becomes LF;
                  above 8 MiB cut at line ends into documents of at most 8 MiB; or one document a line (per="line")
    .jsonl        one JSON object a line; lines end at \\n only (U+2028 and U+0085 are text)
    .json         a list of objects, JSON lines under the wrong name, or one object whose values are the objects
    .parquet      one row a document
    a further .gz is unpacked on the way (not for .parquet)

Text is UTF-8. In rows it is the field `text_key`, or the first of TEXT_KEYS that the row has. Blank lines are no rows.
"""

import gzip
import io
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from moe_engine.errors import ConfigError, DataError
from moe_engine.prepare.json_array import BadValue, array_values, unique_fields

TEXT_SUFFIXES = (".txt", ".md", ".py")
ROW_SUFFIXES = (".jsonl", ".json", ".parquet")
OTHER_COMPRESSION = (".zst", ".xz", ".bz2", ".lz4", ".zip", ".tar", ".tgz")
TEXT_KEYS = ("text", "content", "raw_content", "document", "body")
MAX_ROW = 32 << 20  # bytes; a longer line, or a value of twice this length in an array, is reported and passed over
MAX_TEXT = 8 << 20  # bytes of one plain-text document
BLOCK = 1 << 20
BOM = b"\xef\xbb\xbf"
READ_ERRORS = (OSError, EOFError, zlib.error)


class BadRow(NamedTuple):
    """A row, or the rest of a file, that cannot be used. `where` is "line", "line:column", "row n" or "" (the file)."""

    path: str
    where: str
    reason: str

    def __str__(self) -> str:
        return ": ".join([f"{self.path}:{self.where}" if self.where else self.path, self.reason])


class Document(NamedTuple):
    """The text of one document and where it came from."""

    path: str
    where: str
    text: str


class Piece(NamedTuple):
    """A part of a file that can be parsed alone: whole lines, a whole text, or (where, value) rows read already."""

    path: str
    kind: Literal["text", "lines", "jsonl", "rows"]
    line: int  # number of the first line
    payload: Any  # bytes, or for "rows" a list of (where, value)

    @property
    def size(self) -> int:
        """Bytes of text, roughly."""
        if isinstance(self.payload, bytes):
            return len(self.payload)
        rows = (value.values() if isinstance(value, dict) else [value] for _, value in self.payload)
        return sum(len(field) for row in rows for field in row if isinstance(field, str))


def list_files(paths: Iterable[str | Path]) -> list[Path]:
    """Every file to read: folders recursively in sorted order, hidden entries left out, each file once."""
    files: dict[Path, None] = {}
    for path in map(Path, paths):
        if path.is_dir():
            found = [file for file in _walk(path) if _suffix(file) in TEXT_SUFFIXES + ROW_SUFFIXES]
            if not found:
                known = " ".join(TEXT_SUFFIXES + ROW_SUFFIXES)
                raise DataError(f"{path}: no file to read in this folder; expected {known} (each also with .gz)")
            if odd := next((file for file in found if not file.is_file()), None):
                raise DataError(f"{odd}: a pipe, a device or a link to nothing, not a file; take it out of the folder")
            files.update(dict.fromkeys(found))
        elif path.is_file():
            if path.suffix in OTHER_COMPRESSION:
                raise ConfigError(f"{path}: {path.suffix} is not read; unpack it, or compress with gzip")
            files[path] = None
        else:
            raise ConfigError(f"{path}: no such file or folder; check the path given as input")
    return list(files)


def _walk(folder: Path) -> Iterator[Path]:
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(root) / name for name in sorted(names) if not name.startswith("."))


def _suffix(path: Path) -> str:
    return (path.with_suffix("") if path.suffix == ".gz" else path).suffix.lower()


def _open(path: Path) -> gzip.GzipFile | io.BufferedReader:
    return gzip.open(path) if path.suffix == ".gz" else open(path, "rb")


def read_pieces(
    path: Path, per: Literal["file", "line"] = "file", text_key: str | None = None
) -> Iterator[Piece | BadRow]:
    """The file as pieces, in order. `per`: whether a plain text file is one document or one document a line."""
    suffix = _suffix(path)
    try:
        if suffix == ".parquet":
            yield from _parquet(path, text_key)
        elif suffix == ".json":
            yield from _json(path)
        elif suffix == ".jsonl":
            yield from _lines(path, "jsonl")
        elif per == "line":
            yield from _lines(path, "lines")
        else:
            yield from _texts(path)
    except READ_ERRORS as error:
        yield BadRow(str(path), "", f"cannot be read: {error}")


def _lines(path: Path, kind: Literal["lines", "jsonl"]) -> Iterator[Piece | BadRow]:
    """Whole lines in blocks; a line over MAX_ROW is passed over without being held."""
    line, tail, too_long = 1, b"", False
    with _open(path) as stream:
        while True:
            try:
                chunk = stream.read1(BLOCK)  # read() would lose what precedes the damage
            except READ_ERRORS as error:
                yield BadRow(str(path), str(line), f"the file ends early or is damaged here: {error}")
                return
            if not chunk:
                break
            if too_long:
                end = chunk.find(b"\n") + 1
                if not end:
                    continue
                line, chunk, too_long = line + 1, chunk[end:], False
            end = chunk.rfind(b"\n") + 1
            if end:
                block = tail + chunk[:end]
                yield Piece(str(path), kind, line, block)
                line, tail = line + block.count(b"\n"), chunk[end:]
            else:
                tail += chunk
            if len(tail) > MAX_ROW:
                yield BadRow(str(path), str(line), f"the line is longer than {MAX_ROW >> 20} MiB")
                tail, too_long = b"", True
    if tail:
        yield Piece(str(path), kind, line, tail)


def _texts(path: Path) -> Iterator[Piece]:
    line, tail = 1, b""
    with _open(path) as stream:
        while chunk := stream.read(MAX_TEXT - len(tail)):
            text = tail + chunk
            if len(text) < MAX_TEXT:
                tail = text
                continue
            end = text.rfind(b"\n") + 1 or _character_end(text)
            yield Piece(str(path), "text", line, text[:end])
            line, tail = line + text.count(b"\n", 0, end), text[end:]
    if tail:
        yield Piece(str(path), "text", line, tail)


def _character_end(text: bytes) -> int:
    """Where the last whole UTF-8 character of `text` ends."""
    for end in range(len(text), len(text) - 4, -1):
        if text[end - 1] < 0x80 or text[end - 1] >= 0xC0:
            return end if text[end - 1] < 0x80 else end - 1
    return len(text)


def _json(path: Path) -> Iterator[Piece | BadRow]:
    with _open(path) as stream:
        head = stream.read(BLOCK).removeprefix(BOM).lstrip()
    if not head.startswith(b"["):
        first = head.partition(b"\n")[0]
        if len(first) < len(head) and _is_json(first):
            yield from _lines(path, "jsonl")
        else:
            yield from _json_object(path)
        return
    rows: list[tuple[str, Any]] = []
    with _open(path) as raw, io.TextIOWrapper(raw, "utf-8-sig", errors="surrogateescape", newline="") as stream:
        for where, value in array_values(stream, MAX_ROW, READ_ERRORS):
            if isinstance(value, BadValue):
                if rows:
                    yield Piece(str(path), "rows", 0, rows)
                rows = []
                yield BadRow(str(path), where, value.reason)
                continue
            rows.append((where, value))
            if len(rows) == 256:
                yield Piece(str(path), "rows", 0, rows)
                rows = []
    if rows:
        yield Piece(str(path), "rows", 0, rows)


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _json_object(path: Path) -> Iterator[Piece | BadRow]:
    with _open(path) as stream:
        text = stream.read(8 * MAX_ROW + 1)
    if len(text) > 8 * MAX_ROW:
        yield BadRow(str(path), "", f"one JSON object of more than {8 * MAX_ROW >> 20} MiB; convert it to .jsonl")
        return
    try:
        value = json.loads(text.removeprefix(BOM).decode(errors="surrogateescape"), object_pairs_hook=unique_fields)
    except json.JSONDecodeError as error:
        yield BadRow(str(path), f"{error.lineno}:{error.colno}", f"not JSON: {error.msg}")
        return
    except (ValueError, RecursionError) as error:
        yield BadRow(str(path), "", f"not JSON: {error}")
        return
    if isinstance(value, dict) and value and all(isinstance(row, dict) for row in value.values()):
        rows = [(f"key {key!r}", row) for key, row in value.items()]
    else:
        rows = [("1", value)]
    for start in range(0, len(rows), 256):
        yield Piece(str(path), "rows", 0, rows[start : start + 256])


def _parquet(path: Path, text_key: str | None) -> Iterator[Piece | BadRow]:
    try:
        import pyarrow.parquet
        from pyarrow import ArrowException
    except ImportError:
        raise ConfigError(f"{path}: reading Parquet needs pyarrow; pip install pyarrow") from None
    number = 1
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            wanted = [name for name in ((text_key,) if text_key else TEXT_KEYS) if name in file.schema_arrow.names]
            for batch in file.iter_batches(batch_size=256, columns=wanted[:1] or None):
                rows = [(f"row {number + i}", row) for i, row in enumerate(batch.to_pylist())]
                number += len(rows)
                yield Piece(str(path), "rows", 0, rows)
    except (ArrowException, OSError, ValueError) as error:
        yield BadRow(str(path), f"row {number}" if number > 1 else "", f"not a readable Parquet file: {error}")


def documents(piece: Piece, text_key: str | None = None) -> Iterator[Document | BadRow]:
    """The documents of a piece in order, each a Document or the BadRow that stands in its place."""
    if piece.kind == "rows":
        for where, value in piece.payload:
            yield _row_document(piece.path, where, value, text_key)
        return
    content = piece.payload.removeprefix(BOM) if piece.line == 1 else piece.payload
    if piece.kind == "text":
        yield _text_document(piece.path, piece.line, content)
        return
    for number, line in enumerate(content.split(b"\n"), piece.line):
        if not line.strip():
            continue
        if piece.kind == "lines":
            yield _text_document(piece.path, number, line.removesuffix(b"\r"))
        else:
            yield _json_line(piece.path, number, line, text_key)


def _text_document(path: str, line: int, content: bytes) -> Document | BadRow:
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return BadRow(path, str(line), "UTF-16, not UTF-8; convert it with iconv -f UTF-16 -t UTF-8")
    if (zero := content.find(b"\0")) >= 0:
        return BadRow(path, _position(content, zero, line), "holds a NUL byte; is it a binary file?")
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        byte = content[error.start]
        reason = f"byte 0x{byte:02X} is not UTF-8; if the file is Latin-1: iconv -f ISO-8859-1 -t UTF-8"
        return BadRow(path, _position(content, error.start, line), reason)
    return Document(path, str(line), text.replace("\r\n", "\n"))


def _position(content: bytes, offset: int, line: int) -> str:
    """line:column of a byte offset; columns count bytes from 1."""
    row, column = content.count(b"\n", 0, offset), offset - content.rfind(b"\n", 0, offset)
    return f"{line + row}:{column}"


def _json_line(path: str, number: int, line: bytes, text_key: str | None) -> Document | BadRow:
    try:
        value = json.loads(line.decode(), object_pairs_hook=unique_fields)
    except UnicodeDecodeError as error:
        return BadRow(path, f"{number}:{error.start + 1}", f"byte 0x{line[error.start]:02X} is not UTF-8")
    except json.JSONDecodeError as error:
        near = error.doc[max(0, error.pos - 20) : error.pos + 20]
        return BadRow(path, f"{number}:{error.colno}", f"not JSON: {error.msg}, near {near!r}")
    except (ValueError, RecursionError) as error:
        return BadRow(path, str(number), f"not JSON that can be read: {error}")
    return _row_document(path, str(number), value, text_key)


def _row_document(path: str, where: str, value: Any, text_key: str | None) -> Document | BadRow:
    if not isinstance(value, dict):
        return BadRow(path, where, f"the row is {_type_name(value)}; expected an object with a text field")
    key = text_key or next((key for key in TEXT_KEYS if key in value), None)
    if key is None or key not in value:
        fields = ", ".join(map(str, list(value)[:8])) or "none"
        wanted = repr(text_key) if text_key else " or ".join(TEXT_KEYS)
        return BadRow(path, where, f"no text field: fields are {fields}; expected {wanted} (--text-key chooses)")
    text = value[key]
    if not isinstance(text, str):
        return BadRow(path, where, f"field {key!r} is {_type_name(text)}; expected a string")
    if "\0" in text:
        return BadRow(path, where, f"field {key!r} holds NUL (U+0000) at character {text.index(chr(0)) + 1}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        what = f"byte 0x{code - 0xDC00:02X}, not UTF-8," if 0xDC80 <= code <= 0xDCFF else f"lone surrogate U+{code:04X}"
        return BadRow(path, where, f"field {key!r} holds a {what} at character {error.start + 1}")
    return Document(path, where, text)


def _type_name(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)
