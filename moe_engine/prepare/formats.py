"""Files to documents, in bounded memory; what cannot be used comes out as a BadRow that says where and why.

    read_chunks(file)         a file as Pieces of about 1 MiB: picklable, so that a worker can parse them
    documents(chunk, key)     a chunk as Documents (text) or BadRows

    .txt .md .py  (and any other text file that is named explicitly)  one document a file; BOM dropped, CRLF becomes LF;
                  above 8 MiB cut at line ends into documents of at most 8 MiB; or one document a line (per="line")
    .jsonl        one JSON object a line; lines end at \\n only (U+2028 and U+0085 are text)
    .json         a list of objects, JSON lines, objects one after another, or one object whose values are the objects
    .parquet      one row a document
    a further .gz or .zst is unpacked on the way (not for .parquet)

Text is UTF-8. In rows it is the field `text_key`, or the first of TEXT_KEYS that the row has. Blank lines are no rows.
Every row comes out, as a Document or as a BadRow, and a row that is broken takes no other with it.
"""

import io
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from moe_engine.errors import ConfigError
from moe_engine.prepare.files import READ_ERRORS, open_file, suffix_of
from moe_engine.prepare.json_values import BadValue, json_layout, json_rows, unique_fields

TEXT_KEYS = ("text", "content", "raw_content", "document", "body")
MAX_ROW = 32 << 20  # bytes; a longer line, or a row of twice this length in a .json file, is reported and passed over
MAX_TEXT = 8 << 20  # bytes of one plain-text document
BLOCK = 1 << 20
BOM = b"\xef\xbb\xbf"


class BadRow(NamedTuple):
    """A row, or the rest of a file, that cannot be used. `where` is "line", "line:column", "row n" or "" (the file)."""

    path: str
    where: str
    reason: str
    rows: int = 1  # how many rows it stands for, where that is known

    def __str__(self) -> str:
        return ": ".join([f"{self.path}:{self.where}" if self.where else self.path, self.reason])


class Document(NamedTuple):
    """The text of one document and where it came from."""

    path: str
    where: str
    text: str


class Chunk(NamedTuple):
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


def read_chunks(
    path: Path, per: Literal["file", "line"] = "file", text_key: str | None = None, keys: Sequence[str] = TEXT_KEYS
) -> Iterator[Chunk | BadRow]:
    """The file as chunks, in order. `per`: whether a plain text file is one document or one document a line.

    keys: fields that tell a row of a .json file from a mapping of rows; unless they are those of text, a Parquet file
    gives all of its columns.
    """
    keys = (text_key,) if text_key else keys
    suffix = suffix_of(path)
    try:
        if suffix == ".parquet":
            yield from _parquet(path, keys)
        elif suffix == ".json":
            yield from _json(path, keys)
        elif suffix == ".jsonl":
            yield from _lines(path, "jsonl")
        elif per == "line":
            yield from _lines(path, "lines")
        else:
            yield from _texts(path)
    except READ_ERRORS as error:
        yield BadRow(str(path), "", f"cannot be read: {error}")


def _lines(path: Path, kind: Literal["lines", "jsonl"]) -> Iterator[Chunk | BadRow]:
    """Whole lines in blocks; a line over MAX_ROW is passed over without being held."""
    line, tail, too_long = 1, bytearray(), False  # of a tail that grows in small steps no copy is made at each
    with open_file(path) as stream:
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
                block = bytes(tail) + chunk[:end]
                yield Chunk(str(path), kind, line, block)
                line, tail = line + block.count(b"\n"), bytearray()
            tail += chunk[end:]
            if len(tail) > MAX_ROW:
                yield BadRow(str(path), str(line), f"the line is longer than {MAX_ROW >> 20} MiB")
                tail, too_long = bytearray(), True
    if tail:
        yield Chunk(str(path), kind, line, bytes(tail))


def _texts(path: Path) -> Iterator[Chunk]:
    line, tail = 1, b""
    with open_file(path) as stream:
        while chunk := stream.read(MAX_TEXT - len(tail)):
            text = tail + chunk
            if len(text) < MAX_TEXT:
                tail = text
                continue
            end = text.rfind(b"\n") + 1 or _character_end(text)
            yield Chunk(str(path), "text", line, text[:end])
            line, tail = line + text.count(b"\n", 0, end), text[end:]
    if tail:
        yield Chunk(str(path), "text", line, tail)


def _character_end(text: bytes) -> int:
    """Where the last whole UTF-8 character of `text` ends."""
    for end in range(len(text), len(text) - 4, -1):
        if text[end - 1] < 0x80 or text[end - 1] >= 0xC0:
            return end if text[end - 1] < 0x80 else end - 1
    return len(text)


def _json(path: Path, keys: Sequence[str]) -> Iterator[Chunk | BadRow]:
    with _open_text(path) as stream:
        layout = json_layout(stream, MAX_ROW, READ_ERRORS, tuple(keys))
    if layout == "lines":
        yield from _lines(path, "jsonl")
        return
    with _open_text(path) as stream:
        yield from _row_chunks(path, json_rows(stream, MAX_ROW, READ_ERRORS, layout == "keyed"))


def _row_chunks(path: Path, rows: Iterable[tuple[str, Any | BadValue]]) -> Iterator[Chunk | BadRow]:
    ready: list[tuple[str, Any]] = []
    for where, value in rows:
        bad = isinstance(value, BadValue)
        if not bad:
            ready.append((where, value))
        if ready and (bad or len(ready) == 256):
            yield Chunk(str(path), "rows", 0, ready)
            ready = []
        if bad:
            yield BadRow(str(path), where, *value)
    if ready:
        yield Chunk(str(path), "rows", 0, ready)


def _open_text(path: Path) -> io.TextIOWrapper:
    return io.TextIOWrapper(open_file(path), "utf-8-sig", errors="surrogateescape", newline="")


def _parquet(path: Path, keys: Sequence[str]) -> Iterator[Chunk | BadRow]:
    try:
        import pyarrow.parquet
        from pyarrow import ArrowException
    except ImportError:
        raise ConfigError(f"{path}: reading Parquet needs pyarrow; pip install pyarrow") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            text = len(keys) == 1 or keys is TEXT_KEYS
            wanted = [name for name in keys if name in file.schema_arrow.names] if text else []
            yield from _row_chunks(path, _parquet_rows(file, wanted[:1] or None, (ArrowException, OSError, ValueError)))
    except (ArrowException, OSError, ValueError) as error:
        yield BadRow(str(path), "", f"not a readable Parquet file: {error}")


def _parquet_rows(
    file: Any, columns: list[str] | None, errors: tuple[type[Exception], ...]
) -> Iterator[tuple[str, Any | BadValue]]:
    number, end = 1, 1
    for group in range(file.num_row_groups):
        number, end = end, end + file.metadata.row_group(group).num_rows
        try:
            for batch in file.iter_batches(256, [group], columns):
                for row in (batch.slice(i, 1) for i in range(batch.num_rows)) if _broken(batch) else [batch]:
                    values = [BadValue("a string that is not UTF-8")] if _broken(row) else row.to_pylist()
                    for value in values:
                        yield f"row {number}", value
                        number += 1
        except errors as error:
            reason = f"the file is damaged: rows {number} to {end - 1} cannot be read: {error}"
            yield f"row {number}", BadValue(reason, end - number)


def _broken(batch: Any) -> bool:
    """Whether a string of the batch is not UTF-8."""
    try:
        batch.validate(full=True)
    except ValueError:
        return True
    return False


def documents(chunk: Chunk, text_key: str | None = None) -> Iterator[Document | BadRow]:
    """The documents of a chunk in order, each a Document or the BadRow that stands in its place."""
    if chunk.kind in ("rows", "jsonl"):
        for where, value in rows_of(chunk):
            yield value if isinstance(value, BadRow) else _row_document(chunk.path, where, value, text_key)
        return
    content = chunk.payload.removeprefix(BOM) if chunk.line == 1 else chunk.payload
    if chunk.kind == "text":
        yield _text_document(chunk.path, chunk.line, content)
        return
    for number, line in _lines_of(content, chunk.line):
        yield _text_document(chunk.path, number, line.removesuffix(b"\r"))


def rows_of(chunk: Chunk) -> Iterator[tuple[str, Any | BadRow]]:
    """The values of a chunk of kind "rows" or "jsonl", each with where it is; a BadRow for what is no JSON."""
    if chunk.kind == "rows":
        yield from chunk.payload
        return
    content = chunk.payload.removeprefix(BOM) if chunk.line == 1 else chunk.payload
    for number, line in _lines_of(content, chunk.line):
        yield str(number), _json_line(chunk.path, number, line)


def _lines_of(content: bytes, first: int) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank, with their numbers."""
    for number, line in enumerate(content.split(b"\n"), first):
        if line.strip():
            yield number, line


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


def _json_line(path: str, number: int, line: bytes) -> Any | BadRow:
    try:
        return json.loads(line.decode(), object_pairs_hook=unique_fields)
    except UnicodeDecodeError as error:
        return BadRow(path, f"{number}:{error.start + 1}", f"byte 0x{line[error.start]:02X} is not UTF-8")
    except json.JSONDecodeError as error:
        near = error.doc[max(0, error.pos - 20) : error.pos + 20]
        return BadRow(path, f"{number}:{error.colno}", f"not JSON: {error.msg}, near {near!r}")
    except (ValueError, RecursionError) as error:
        return BadRow(path, str(number), f"not JSON that can be read: {error}")


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
