"""Faults of the input: rows that are no rows, and files that are no text.

F1   one bad row   named by file and line; left out, the tokens are those of the file without it
F2   odd text      every document and every bad row is counted, whatever the bytes are
"""

import contextlib
import gzip
import io
import json
import random
import re
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from moe_engine.errors import DataError, EngineError
from moe_engine.prepare.out_folder import BAD_ROWS
from moe_engine.prepare.pipeline import PrepareOptions, prepare
from moe_engine.prepare.tokenizer.byte_files import END
from moe_engine.text import printable
from tests.faults.arena import Arena, Injections

DEFECTS: dict[str, bytes] = {
    "open string": b'{"text": "a',
    "no closing brace": b'{"text": "a"',
    "trailing comma": b'{"text": "a",}',
    "single quotes": b"{'text': 'a'}",
    "bare value": b'{"text": a}',
    "no colon": b'{"text" "a"}',
    "plain text": b"just words",
    "null row": b"null",
    "list row": b'["a"]',
    "number row": b"12",
    "no text": b'{"title": "a"}',
    "null text": b'{"text": null}',
    "number text": b'{"text": 1.5}',
    "object text": b'{"text": {"a": "b"}}',
    "latin-1 byte": b'{"text": "n\xe9e"}',
    "lone surrogate": b'{"text": "a\\ud800b"}',
    "NUL": b'{"text": "a\\u0000b"}',
    "control character": b'{"text": "a\x01b"}',
    "field twice": b'{"text": "a", "text": "b"}',
    "deep nesting": b'{"text": "a", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
}
OPEN = ("open string", "no closing brace")
ROW_FILES = (".jsonl", ".jsonl.gz", ".json")
SUFFIXES = (".txt", ".md", ".jsonl", ".json", ".txt.gz", ".jsonl.gz", ".json.gz", ".parquet")
BOM = b"\xef\xbb\xbf"
ODD = "aé日😀\U0010ffff\ufffd\uffff\u2028\u2029\u0085\x0b\x0c\x1c\x7f\ufeff\u200b\u202e\u0301\u00a0 \t\"\\[]{},:'"
BAD_LINES = (
    *(b'{"text": "\\u0000"}', b'{"text": "a\0b"}', b'{"text": "\\udc00"}', b'{"text": "\xed\xa0\x80"}', b"\xff\xfe{}"),
    *(b'{"text": "\\u12"}', b'{"text": "\xc3"}', b'"\xf5"', BOM + b"{}", b"\xc2\xa0", b"{", b"[]"),
)
NOISE = (b'{"text": "', b'"}', b"\n", b"[", b"]", b",", b"\xff", b"\xed\xa0\x80", b"\0", b"\\u", BOM, b"a")
LONG_LINE, MEMORY = 100_000_000, 400  # bytes; MB


def tried(label: str, check: Callable[..., str | None], *args: Any) -> str | None:
    """What `check` found, in one line; an exception that it lets through is a finding too."""
    try:
        problem = check(*args)
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
    return printable(f"{label}: {problem}")[:500] if problem else None


def in_folder(arena: Arena, label: str, check: Callable[..., str | None], *args: Any) -> str | None:
    """check(folder, *args) in a folder of its own, which goes when nothing was found."""
    folder = arena.folder(re.sub(r"\W+", "-", label).lower())
    problem = tried(label, check, folder, *args)
    if problem is None:
        shutil.rmtree(folder)
    return problem


def refusal(action: Callable[..., object], *args: Any, **options: Any) -> EngineError | None:
    """The error that ends an action, None when it ends well."""
    try:
        action(*args, **options)
    except EngineError as error:
        return error
    return None


def make(path: Path, out: Path, **options: Any) -> dict[str, Any]:
    """Prepared data of one file, as domain d; what it prints is kept from the console."""
    with contextlib.redirect_stderr(io.StringIO()):
        return prepare({"d": [path]}, out, None, PrepareOptions(**options), workers=1, quiet=True)


def bad_rows(arena: Arena, count: int) -> Injections:
    """F1: every defect at every place; each further round in another kind of file."""
    names = list(DEFECTS)
    for i in range(count):
        defect, place = names[i % len(names)], i // len(names) % 3
        suffix = ROW_FILES[(i + i // (3 * len(names))) % 3]
        if defect in OPEN and suffix == ".json":
            suffix = ".jsonl"  # in an array they run into their neighbour
        good = [json.dumps({"text": odd_text(arena.draw, 60) + "."}).encode() for _ in range(12)]
        label = f"{defect}, {('first', 'middle', 'last')[place]} in {suffix}"
        yield in_folder(arena, label, one_row_lost, suffix, good, DEFECTS[defect], 6 * place)


def write_rows(path: Path, rows: list[bytes]) -> Path:
    """One row a line, as lines or as an array."""
    array = path.suffix == ".json"
    content = b"[\n" + b",\n".join(rows) + b"\n]" if array else b"\n".join(rows) + b"\n"
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def one_row_lost(folder: Path, suffix: str, good: list[bytes], bad: bytes, place: int) -> str | None:
    dirty = write_rows(folder / f"dirty{suffix}", [*good[:place], bad, *good[place:]])
    clean = write_rows(folder / f"clean{suffix}", good)
    line = place + 1 + (suffix == ".json")
    error = refusal(make, dirty, folder / "stop")
    named = re.match(re.escape(f"{dirty}:{line}") + r"(:\d+)?: \S", str(error))
    if not isinstance(error, DataError) or not named:
        return f"stop: expected {dirty}:{line} and a reason, found {error}"
    if left := [path.name for path in folder.glob("stop*")]:
        return f"stop: left {left} behind"
    manifest = make(dirty, folder / "skip", on_bad_row="skip", eval_fraction=0.2)
    make(clean, folder / "clean", eval_fraction=0.2)
    listed = [json.loads(row) for row in (folder / "skip" / BAD_ROWS).read_text().splitlines()]
    if manifest["bad_rows"] != 1 or [row["where"].partition(":")[0] for row in listed] != [str(line)]:
        return f"skip: {manifest['bad_rows']} bad rows, listed {listed}"
    streams = [
        {file.name: file.read_bytes() for file in sorted((folder / name).glob("d-*"))} for name in ("skip", "clean")
    ]
    return None if streams[0] == streams[1] else "skip: the tokens are not those of the cleaned file"


class Sample(NamedTuple):
    """A file and what has to come of it. texts None: anything but a crash. cut: the first of the texts alone."""

    suffix: str
    content: bytes
    texts: list[str] | None
    bad: int = 0
    per: Literal["file", "line"] = "file"
    cut: bool = False


def odd_text(draw: random.Random, most: int) -> str:
    return "".join(draw.choices(ODD, k=draw.randrange(most)))


def json_lines(draw: random.Random) -> Sample:
    texts, lines = [], []
    for _ in range(draw.randrange(1, 20)):
        kind = draw.random()
        if kind < 0.6:
            texts.append(odd_text(draw, 40) + draw.choice(("", "\n", "\r\n", "\r")))
            lines.append(json.dumps({"text": texts[-1]}, ensure_ascii=draw.random() < 0.5).encode())
        else:
            lines.append(draw.choice(BAD_LINES if kind < 0.8 else (b"", b" ", b"\t\x0b")))
    end = draw.choice((b"\n", b"\r\n"))
    content = BOM * draw.randrange(2) + end.join(lines) + draw.choice((b"", end))
    packed = draw.random() < 0.3
    bad = sum(bool(line.strip()) for line in lines) - len(texts)
    return Sample(".jsonl.gz" if packed else ".jsonl", gzip.compress(content) if packed else content, texts, bad)


def json_array(draw: random.Random) -> Sample:
    texts = [odd_text(draw, 40) for _ in range(draw.randrange(1, 20))]
    odd = [draw.choice(("\0", "\ud800", "a\udfff", None, 1)) for _ in range(draw.randrange(3))]
    values: list[Any] = [*texts]
    for value in odd:
        values.insert(draw.randrange(len(values) + 1), value)
    ascii_only = bool(odd) or draw.random() < 0.5
    content = json.dumps([{"text": v} for v in values], ensure_ascii=ascii_only, indent=draw.choice((None, 1)))
    return Sample(".json", BOM * draw.randrange(2) + content.encode(), texts, len(odd))


def text_lines(draw: random.Random) -> Sample:
    lines = [odd_text(draw, 40).lstrip("\ufeff") for _ in range(draw.randrange(1, 12))]
    kept = [line for line in lines if line.encode().strip()]
    return Sample(".txt", draw.choice(("\n", "\r\n")).join(lines).encode(), kept, per="line")


def whole_text(draw: random.Random) -> Sample:
    text = odd_text(draw, 200).replace(" ", draw.choice(("\n", "\r\n", "\r"))).lstrip("\ufeff")
    bad = draw.choice((b"", b"", b"\0", b"\xed\xb0\x80", b"\xff"))
    content = BOM * draw.randrange(2) + text.encode() + bad
    texts = [text.replace("\r\n", "\n")] if content and not bad else []
    return Sample(draw.choice((".txt", ".md")), content, texts, len(bad) > 0)


def cut_gzip(draw: random.Random) -> Sample:
    texts = [f"{i} {draw.getrandbits(256)}" for i in range(draw.randrange(1, 300))]
    suffix = draw.choice((".jsonl.gz", ".json.gz", ".txt.gz"))
    rows = texts if suffix == ".txt.gz" else [json.dumps({"text": text}) for text in texts]
    content = "[" + ",".join(rows) + "]" if suffix == ".json.gz" else "\n".join(rows)
    whole = gzip.compress(content.encode())
    return Sample(suffix, whole[: draw.randrange(1, len(whole))], texts if suffix != ".txt.gz" else [], 1, cut=True)


def blank(draw: random.Random) -> Sample:
    content = draw.choice((b"", b"", b" ", b"\n\n", b"\r\n \r\n", BOM, BOM + b"\n", b"\t\x0b\x0c"))
    return Sample(draw.choice(SUFFIXES), content, None if content else [])


def noise(draw: random.Random) -> Sample:
    content = b"".join(draw.choices(NOISE, k=draw.randrange(60))) if draw.random() < 0.7 else draw.randbytes(200)
    suffix = draw.choice(SUFFIXES)
    packed = suffix.endswith(".gz") and draw.random() < 0.7
    return Sample(suffix, gzip.compress(content) if packed else content, None)


RECIPES = (json_lines, json_array, text_lines, whole_text, cut_gzip, blank, noise)


def odd_files(arena: Arena, count: int) -> Injections:
    """F2: seeded files of each recipe in turn."""
    for i in range(count):
        recipe = RECIPES[i % len(RECIPES)]
        yield in_folder(arena, recipe.__name__, all_counted, recipe(arena.draw))


def all_counted(folder: Path, sample: Sample) -> str | None:
    path = folder / f"odd{sample.suffix}"
    path.write_bytes(sample.content)
    if sample.bad:
        stop = refusal(make, path, folder / "stop", per=sample.per)
        if not isinstance(stop, DataError) or not str(stop).startswith(str(path)):
            return f"stop: expected {path} and a reason, found {stop}"
    try:
        found = make(path, folder / "out", per=sample.per, eval_fraction=0.0, on_bad_row="skip")
    except DataError as error:
        lost = [] if sample.cut else [text for text in sample.texts or [] if text.strip()]
        return None if "no text in 1 files" in str(error) and not lost else f"refused: {error}"
    if sample.texts is None:
        return None
    texts, kept = texts_of(folder / "out"), [text for text in sample.texts if text.strip()]
    if sample.cut:
        return None if texts == kept[: len(texts)] and found["bad_rows"] else "cut short, and it does not show"
    counts = found["bad_rows"], found["domains"]["d"]["empty_documents"]
    wanted = sample.bad, len(sample.texts) - len(kept)
    if counts != wanted:
        return f"(bad rows, empty documents): found {counts}, expected {wanted}"
    return None if texts == kept else f"the text is {texts}, expected {kept}"


def texts_of(folder: Path) -> list[str]:
    """The training text of a folder prepared as bytes, document by document."""
    tokens = np.concatenate([np.fromfile(file, "<u2") for file in sorted(folder.glob("d-train-*.bin"))])
    parts = np.split(tokens, np.flatnonzero(tokens == END) + 1)
    return [part[:-1].astype(np.uint8).tobytes().decode() for part in parts[:-1]]


def long_lines(arena: Arena, count: int) -> Injections:
    """F2: 100 MB without a line end, passed over in little memory."""
    for i in range(count):
        yield in_folder(arena, f"a line of 100 MB in {ROW_FILES[i % 3]}", passed_over, ROW_FILES[i % 3])


def passed_over(folder: Path, suffix: str) -> str | None:
    path, array = folder / f"long{suffix}", suffix == ".json"
    with gzip.open(path, "wb", 1) if suffix.endswith(".gz") else path.open("wb") as file:
        file.write(b'[{"text": "a"},\n' if array else b'{"text": "a"}\n')
        for part in (b'{"text": "', *[b"x" * (LONG_LINE // 100)] * 100, b'"}', b"," * array, b"\n"):
            file.write(part)
        file.write(b'{"text": "b"}' + b"]" * array)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = make(path, folder / "out", eval_fraction=0.0, on_bad_row="skip")
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10
    if grown > MEMORY:
        return f"{grown} MB more memory"
    texts = texts_of(folder / "out")
    return None if texts == ["a", "b"] and found["bad_rows"] == 1 else f"{texts}, {found['bad_rows']} bad rows"
