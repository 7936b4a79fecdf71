"""The rows of a JSON text, one by one, in memory for one row and in time linear in the text, whatever it holds.

    values   [ row, row ]        one array, or several, or rows one after another, on as many lines as they like
    keyed    { "key": row, ... } one object whose values are the rows
    lines    row \\n row \\n      rows that lines end: told here, read elsewhere

A row that does not parse costs one row. Where the next one begins is told by the brackets, reading the broken row as
loosely as it needs: a string ends at a quote that `,` `:` or a bracket follows, and at the end of the line. Where a
bracket or a quote is missing, a line that begins like the broken row's own line begins the next row, and so does an
object where only a field can be.
"""

import io
import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import IO, Any, Literal, NamedTuple

BLOCK = 1 << 16  # characters; json's errors count the lines of all that is held before them
CONTEXT = 128  # characters that are kept before the reading position
LINES_TRIED = 1000
CLOSING = {"": "", "[": "]", "{": "}"}
NAMES = {"[": "array", "{": "object"}
BLANK = re.compile(r"\s*")
BETWEEN = re.compile(r"[\s,]*")
OUTSIDE = re.compile(r'["{}\[\],:\n]')
INSIDE = re.compile(r'["\\\n]')
NEWLINE = re.compile(r"\n")
LINE_END = re.compile(r"[ \t\r]*(?:\n|\Z)")
KEYED = re.compile(r'\{\s*"([^"\\\n]*)"\s*:(?:[^"{}\[\]]*|[^{}\[\]]*[,}]\s*"[^"\\\n]*"\s*:\s*)\{')
ROW = {"{": r"(\{)", '"': r'(")[^"\n]*"\s*:\s*\{'}  # how a row begins in an array, and in an object of rows
ROW_ON_LINE = {begins: re.compile(r"[ \t]*,?[ \t]*" + row) for begins, row in ROW.items()}
ROW_IN_STRING = {"{": re.compile(r'[,}\]]\s*(\{)\s*"'), '"': re.compile(r"[,}\]]\s*" + ROW['"'])}


class BadValue(NamedTuple):
    """Why a row, or several, cannot be used."""

    reason: str
    rows: int = 1


def unique_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of `pairs`; ValueError for a field given twice (json keeps the last one without a word)."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        ((name, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the field {name!r} appears twice")
    return fields


def json_layout(
    stream: IO[str], max_length: int, read_errors: tuple[type[Exception], ...], text_keys: tuple[str, ...]
) -> Literal["values", "keyed", "lines"]:
    """How the rows of the text are laid out, told by its first two rows that parse.

    One object alone is a row if it has a string as one of `text_keys`; else it holds rows if most of its values are
    objects.
    """
    return _Reader(stream, max_length, read_errors).layout(text_keys)


def json_rows(
    stream: IO[str], max_length: int, read_errors: tuple[type[Exception], ...], keyed: bool
) -> Iterator[tuple[str, Any | BadValue]]:
    """(where, value or BadValue) for every row, in order; where is "line", "line:column" or "key 'k'".

    `max_length` in characters bounds a row, and the memory. An error of `read_errors` ends the text with one BadValue.
    """
    return _Reader(stream, max_length, read_errors).rows(keyed)


class _Reader:
    def __init__(self, stream: IO[str], max_length: int, read_errors: tuple[type[Exception], ...]) -> None:
        self.stream, self.max_length, self.read_errors = stream, max_length, read_errors
        self.ahead: IO[str] = io.StringIO()  # read already, comes before what the stream still has
        self.buffer, self.at, self.ended = "", 0, False
        self.line, self.line_start, self.counted = 1, 0, 0  # the line at buffer[counted], and where it begins
        self.damage: str | None = None
        # Of the last value that was decoded: where it broke, or whether it has a line, or the rest, to itself.
        self.bad_where, self.length, self.one_line, self.alone = "", 0, False, False
        self.decoder = json.JSONDecoder(object_pairs_hook=unique_fields)

    def layout(self, text_keys: tuple[str, ...]) -> Literal["values", "keyed", "lines"]:
        """See json_layout. Tries the first value, then the beginnings of at most LINES_TRIED lines."""
        start = self.skip(BLANK)
        if start == "[":
            return "values"
        head = KEYED.match(self.buffer, self.at)
        likely = "keyed" if head and head[1] not in text_keys else "values"
        first = self.decode() if start == "{" else BadValue("no object")
        if not isinstance(first, BadValue):
            objects = sum(isinstance(value, dict) for value in first.values())
            keyed = 2 * objects > len(first) and not any(isinstance(first.get(key), str) for key in text_keys)
            if self.alone or (keyed and self.peek() == ","):
                return "keyed" if keyed else "values"
            if not self.one_line:
                return "values"
            likely = "lines"
        for _ in range(LINES_TRIED):
            if not self.find(NEWLINE):
                break
            if self.here() == "{" and isinstance(self.decode(), dict):
                return "lines" if self.one_line else "values"
        return likely

    def rows(self, keyed: bool) -> Iterator[tuple[str, Any | BadValue]]:
        """See json_rows. After a bad row it goes on where the next one may begin (`skip_row`)."""
        opened = ""  # the bracket that the rows are in
        prefix, ended_line = "", 0
        if keyed:
            self.skip(BLANK)
            self.at, opened = self.at + 1, "{"
        while char := self.skip(BETWEEN):
            self.count_to(self.at)
            if opened and char == CLOSING[opened]:
                where = self.where(self.at)
                self.at += 1
                if opened == "{" and self.skip(BETWEEN) == '"':
                    yield where, BadValue("not JSON: a } too many")
                else:
                    opened, prefix = "", f"text after the end of the {NAMES[opened]}: "
                continue
            if char == "[" and not opened:
                self.at, opened = self.at + 1, "["
                continue
            where, line, column = str(self.line), self.line, self.at - self.line_start
            key = self.key() if opened == "{" else None
            value = key if isinstance(key, BadValue) else self.decode()
            if opened == "{" and self.alone and not isinstance(value, BadValue):
                self.at, self.bad_where = self.at - self.length, where
                value = BadValue("not JSON: the file ends inside this row, or a bracket is missing in it")
            if isinstance(value, BadValue):
                where, value = self.bad_where, value._replace(reason=value.reason if opened else prefix + value.reason)
                self.skip_row(CLOSING[opened], '"' if opened == "{" else "{", column if line > ended_line else -1)
                if not self.skip(BETWEEN):
                    if self.damage:
                        break
                    yield where, value
                    return
            yield where if key is None or isinstance(value, BadValue) else f"key {key!r}", value
            self.count_to(self.at)
            ended_line = self.line
        if self.damage or opened:
            reason = self.damage or f"the file ends inside the {NAMES[opened]}; expected {CLOSING[opened]}"
            yield self.where(self.at), BadValue(reason)

    def fill(self) -> None:
        """Drop what was read, and read at least as much again as is kept: linear in all."""
        drop = max(0, min(self.at, len(self.buffer)) - CONTEXT)
        self.count_to(drop)
        self.buffer, self.at = self.buffer[drop:], self.at - drop
        self.counted, self.line_start = self.counted - drop, self.line_start - drop
        size = max(BLOCK, len(self.buffer))
        more = self.ahead.read(size)
        if not more and not self.damage:
            try:
                more = self.stream.read(size)
            except self.read_errors as error:
                self.damage = f"the file ends early or is damaged here: {error}"
        self.buffer += more
        self.ended = not more

    def count_to(self, position: int) -> None:
        """The line number follows the reading; each line end is counted once."""
        if position > self.counted:
            self.line += self.buffer.count("\n", self.counted, position)
            last = self.buffer.rfind("\n", self.counted, position)
            self.line_start = last + 1 if last >= 0 else self.line_start
            self.counted = position

    def where(self, position: int) -> str:
        """line:column, both from 1, of a position at or after the last that was counted to."""
        last = self.buffer.rfind("\n", self.counted, position)
        start = last + 1 if last >= 0 else self.line_start
        return f"{self.line + self.buffer.count(chr(10), self.counted, position)}:{position - start + 1}"

    def here(self) -> str:
        """The next character; "" at the end of the file."""
        while self.at >= len(self.buffer) and not self.ended:
            self.fill()
        return self.buffer[self.at : self.at + 1]

    def skip(self, blank: re.Pattern[str]) -> str:
        """Moves past `blank` and gives the next character; "" at the end of the file."""
        while True:
            match = blank.match(self.buffer, self.at)
            self.at = match.end() if match else self.at
            if self.at < len(self.buffer) or self.ended:
                return self.here()
            self.fill()

    def peek(self) -> str:
        """The next character that is not blank, without moving."""
        while True:
            match = BLANK.match(self.buffer, self.at)
            end = match.end() if match else self.at
            if end < len(self.buffer) or self.ended:
                return self.buffer[end : end + 1]
            self.fill()

    def find(self, pattern: re.Pattern[str]) -> str:
        """Moves past the next match of one character, and gives it; "" at the end of the file."""
        while True:
            if match := pattern.search(self.buffer, self.at):
                self.at = match.end()
                return match[0]
            self.at = max(self.at, len(self.buffer))
            if self.ended:
                return ""
            self.fill()

    def key(self) -> str | BadValue:
        """The key before a row of an object; the position moves to the row."""
        key = self.decode()
        if not isinstance(key, BadValue) and (not isinstance(key, str) or self.skip(BLANK) != ":"):
            self.bad_where = self.where(self.at)
            return BadValue("not JSON: expected a key, a colon and a row")
        if isinstance(key, str):
            self.at += 1
            self.skip(BLANK)
        return key

    def decode(self) -> Any | BadValue:
        """The value at the reading position, which moves past it; BadValue leaves the position where it was."""
        if self.at > 4 * BLOCK:  # what came with a long row would be counted again for each error in it
            self.count_to(self.at)
            self.ahead = io.StringIO(self.buffer[self.at :] + self.ahead.read(), newline="")
            self.buffer, self.ended = self.buffer[: self.at], False
            self.fill()
        while True:
            length = len(self.buffer) - self.at
            try:
                value, end = self.decoder.raw_decode(self.buffer, self.at)
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
            blank = BLANK.match(self.buffer, end)
            self.alone = blank is not None and blank.end() == len(self.buffer)
            if self.alone and not self.ended:  # a number may go on
                self.fill()
                continue
            self.one_line = self.buffer.find("\n", self.at, end) < 0 and LINE_END.match(self.buffer, end) is not None
            self.at, self.length = end, end - self.at
            return value

    def skip_row(self, closing: str, begins: str, column: int) -> None:
        """From a broken row to where the next one may begin.

        closing: the bracket that ends all rows. begins: the first character of a row. column: where in its line the
        broken row begins, -1 where it is not the first of its line.
        """
        brackets, last, in_string = [], "", False
        if self.here() == "{":
            brackets, self.at = ["{"], self.at + 1
        while char := self.find(INSIDE if in_string else OUTSIDE):
            if char == "\n":
                in_string = False
                if self.line_begins_row(begins, column):
                    return
                continue
            if char == "\\":
                self.at += 1
            elif char == '"' and in_string:
                if self.peek() in ",:}]":  # "" too
                    in_string = False
                elif self.string_begins_row(begins):
                    return
            elif char == '"':
                in_string = True
            elif char == "{" and (last != ":" and brackets[-1] == "{" if brackets else not closing):
                self.at -= 1
                return
            elif char in "{[":
                brackets.append(char)
            elif char == "," and not brackets:
                return
            elif char in "}]":
                if (opening := "{" if char == "}" else "[") in brackets:
                    while brackets.pop() != opening:
                        pass
                elif char == closing:
                    self.at -= 1
                    return
                if not brackets:
                    return
            last = char

    def string_begins_row(self, begins: str) -> bool:
        """Whether the quote just read, at which no string can end, begins a row; the position then moves to the row."""
        for match in ROW_IN_STRING[begins].finditer(self.buffer, max(0, self.at - CONTEXT)):
            if match.start(1) < self.at <= match.end():
                self.at = match.start(1)
                return True
        return False

    def line_begins_row(self, begins: str, column: int) -> bool:
        """Whether the line here begins with a row, at or before `column`; the position then moves to the row."""
        while len(self.buffer) - self.at < 2 * CONTEXT and not self.ended:
            self.fill()
        match = ROW_ON_LINE[begins].match(self.buffer, self.at)
        if match is None or match.start(1) - self.at > column:
            return False
        self.at = match.start(1)
        return True
