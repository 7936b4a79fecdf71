"""The values of a JSON array, one by one, without holding the array.

After a value that does not parse, reading goes on at the next object that has the fields of the last good row,
so that one broken row costs one row (objects nested in the broken row are passed over).
"""

import json
import re
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

BLOCK = 1 << 20  # characters
BLANK = re.compile(r"[\s,]*")
NEXT_ROW = re.compile(r"[,}]\s*(?=\{)")


class BadValue(NamedTuple):
    """Why a value of the array cannot be used."""

    reason: str


def unique_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of `pairs`; ValueError for a field given twice (json keeps the last one without a word)."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the field {next(n for n in fields if names.count(n) > 1)!r} appears twice")
    return fields


def array_values(
    stream: IO[str], max_length: int, read_errors: tuple[type[Exception], ...]
) -> Iterator[tuple[str, Any | BadValue]]:
    """("line" or "line:column", value or BadValue) for every value of the array in `stream`, in order."""
    yield from _Array(stream, max_length, read_errors).values()


class _Array:
    def __init__(self, stream: IO[str], max_length: int, read_errors: tuple[type[Exception], ...]) -> None:
        self.stream, self.max_length, self.read_errors = stream, max_length, read_errors
        self.buffer, self.at, self.line, self.ended = "", 0, 1, False
        self.column_base = 0  # characters of the current line that lie before the buffer
        self.damage: str | None = None
        self.bad_where = ""

    def values(self) -> Iterator[tuple[str, Any | BadValue]]:
        fields: set[str] = set()
        lost = False  # inside a broken row
        self.skip_blank()
        self.at += 1  # the opening bracket
        while char := self.skip_blank():
            if char == "]":
                self.at += 1
                if self.skip_blank():
                    yield self.where(self.at), BadValue("text after the end of the array")
                return
            where = self.where(self.at).partition(":")[0]
            value = self.decode()
            if not isinstance(value, BadValue):
                known = isinstance(value, dict)
                if known and lost and fields and fields != set(value):
                    self.next_row()
                    continue
                fields = set(value) if known else fields
                lost = False
                yield where, value
            else:
                if not lost:
                    yield self.bad_where, value
                lost = True
                self.next_row()
        if self.damage or not lost:
            yield self.where(self.at), BadValue(self.damage or "the file ends inside the array; expected ]")

    def fill(self) -> None:
        """Drop what was read and read at least as much again as is kept: linear in all."""
        line_start = self.buffer.rfind("\n", 0, self.at) + 1
        self.column_base = self.at - line_start + (0 if line_start else self.column_base)
        self.line += self.buffer.count("\n", 0, self.at)
        self.buffer, self.at = self.buffer[self.at :], 0
        try:
            more = self.stream.read(max(BLOCK, len(self.buffer)))
        except self.read_errors as error:
            more, self.damage = "", f"the file ends early or is damaged here: {error}"
        self.buffer += more
        self.ended = not more

    def skip_blank(self) -> str:
        """The next character that is neither blank nor a comma; "" at the end of the file."""
        while True:
            match = BLANK.match(self.buffer, self.at)
            self.at = match.end() if match else self.at
            if self.at < len(self.buffer) or self.ended:
                return self.buffer[self.at : self.at + 1]
            self.fill()

    def decode(self) -> Any | BadValue:
        """The value at the reading position, which moves past it; BadValue leaves the position where it was."""
        decoder = json.JSONDecoder(object_pairs_hook=unique_fields)
        while True:
            length = len(self.buffer) - self.at
            try:
                value, end = decoder.raw_decode(self.buffer, self.at)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos > len(self.buffer) - 16
                if cut and not self.ended and length <= self.max_length:
                    self.fill()
                    continue
                self.bad_where = self.where(error.pos)
                if cut and not self.ended:
                    return BadValue(f"the value is longer than {self.max_length >> 20} Mi characters")
                near = self.buffer[max(0, error.pos - 20) : error.pos + 20]
                return BadValue(f"not JSON: {error.msg}, near {near!r}")
            except (ValueError, RecursionError) as error:
                self.bad_where = self.where(self.at)
                return BadValue(f"not JSON that can be read: {error}")
            self.at = end
            return value

    def next_row(self) -> None:
        while True:
            match = NEXT_ROW.search(self.buffer, self.at)
            if match or self.ended:
                self.at = match.end() if match else len(self.buffer)
                return
            self.at = max(self.at, len(self.buffer) - 256)
            self.fill()

    def where(self, position: int) -> str:
        start = self.buffer.rfind("\n", 0, position)
        column = position - start + (self.column_base if start < 0 else 0)
        return f"{self.line + self.buffer.count(chr(10), 0, position)}:{column}"
