"""G3: safetensors files whose headers lie. open_shard refuses each in its own words, or the tensors are what the header
says and lie where it says; neither takes long or takes memory."""

import json
import random
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from moe_engine.checkpoint.shard import MAX_HEADER, open_shard
from moe_engine.errors import DataError
from tests.faults.arena import Arena, Injections
from tests.faults.rows import tried

SECONDS, MEMORY = 1.0, 200  # MB
HUGE = (-1, 0, 1, 3, 1 << 31, 1 << 62, (1 << 64) - 1, 1 << 64, 10**400, 1.5, 1e300, "1", None, [], {}, True)
TYPES = ("F32", "F64", "I64", "U8", "BF16", "F16", "BOOL", "f32", "NONE", "", None, 1, [], "F32\0")
TEXTS = ("", "a", "b", "__metadata__", "\x1b[2J\n", "\0", "../x", "é\u2028", "x" * 100_000)


def headers(arena: Arena, count: int) -> Injections:
    """G3: every kind of change below in turn."""
    path = arena.folder("headers") / "rank-00000.safetensors"
    whole = save(
        {"a": torch.arange(12.0).view(3, 4), "b": torch.arange(5), "c": torch.ones(2, dtype=torch.uint8)}, {"k": "v"}
    )
    for i in range(count):
        change = CHANGES[i % len(CHANGES)]
        content = change(arena.draw, whole)
        path.write_bytes(content)
        yield tried(f"{change.__name__}, injection {i}", refused_or_true, path, content, whole)


def refused_or_true(path: Path, content: bytes, whole: bytes) -> str | None:
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began, problem = time.monotonic(), None
    try:
        problem = untrue(open_shard(path), content)
    except DataError as error:
        if content == whole or not str(error).startswith(f"{path}: "):
            problem = f"refused: {error}"
    seconds = time.monotonic() - began
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) >> 10
    if grown > MEMORY or seconds > SECONDS:
        return f"{seconds:.1f} s, {grown} MB more memory"
    return problem


def untrue(opened: Any, content: bytes) -> str | None:
    """What an opened file gives that its header does not say."""
    start = 8 + int.from_bytes(content[:8], "little")
    table = json.loads(content[8:start])
    table.pop("__metadata__", None)
    if set(opened.keys()) != set(table):
        return f"the tensors are {list(opened.keys())[:8]}"
    for name, entry in table.items():
        tensor: torch.Tensor = opened.get_tensor(name)
        begin, end = entry["data_offsets"]
        found = tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        if list(tensor.shape) != entry["shape"] or found != content[start + begin : start + end]:
            return f"tensor {name[:80]!r} is not what the header says"
    return None


def parts_of(whole: bytes) -> tuple[dict[str, Any], bytes]:
    end = 8 + int.from_bytes(whole[:8], "little")
    return json.loads(whole[8:end]), whole[end:]


def joined(header: bytes | dict[str, Any], data: bytes, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def as_it_is(draw: random.Random, whole: bytes) -> bytes:
    return whole


def another_length(draw: random.Random, whole: bytes) -> bytes:
    true = int.from_bytes(whole[:8], "little")
    near = (0, 1, true - 1, true + 1, true + 8, len(whole) - 8, len(whole) - 7, len(whole))
    length = draw.choice((*near, MAX_HEADER, MAX_HEADER + 1, 10**8, 1 << 62, (1 << 64) - 1, draw.getrandbits(64)))
    return length.to_bytes(8, "little") + whole[8:]


def other_bytes(draw: random.Random, whole: bytes) -> bytes:
    content = bytearray(whole)
    for _ in range(draw.randrange(1, 9)):
        content[draw.randrange(8, 8 + int.from_bytes(whole[:8], "little"))] = draw.randrange(256)
    return bytes(content)


def cut_or_longer(draw: random.Random, whole: bytes) -> bytes:
    return whole[: draw.randrange(len(whole))] if draw.randrange(2) else whole + draw.randbytes(draw.randrange(1, 99))


def another_entry(draw: random.Random, whole: bytes) -> bytes:
    table, data = parts_of(whole)
    entry = table[draw.choice("abc")]
    key = draw.choice(("dtype", "shape", "data_offsets"))
    if key == "dtype":
        entry[key] = draw.choice(TYPES)
    elif draw.randrange(3):
        entry[key][draw.randrange(len(entry[key]))] = draw.choice(HUGE)
    else:
        entry[key] = draw.choice(([], [1 << 32, 1 << 32], [0] * 1000, {}, None, "12", entry[key][::-1], entry[key] * 2))
    if not draw.randrange(5):
        del entry[key]
    return joined(table, data)


def another_table(draw: random.Random, whole: bytes) -> bytes:
    table, data = parts_of(whole)
    metadata = ({"k": 1}, {"k": {"k": "v"}}, [], None, "x", {"k": None}, {t: t for t in TEXTS}, 1)
    name = draw.choice(TEXTS)
    draw.choice(
        (
            lambda: table.update({name: dict(table["a"])}),
            lambda: table.update({name: {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}),
            lambda: table.update({name: table.pop("b")}),
            lambda: table.pop(draw.choice("abc")),
            lambda: table.update(__metadata__=draw.choice(metadata)),
            lambda: table.update({name: draw.choice(HUGE)}),
            lambda: table.update({str(i): dict(table["a"]) for i in range(2000)}),
            lambda: table.clear(),
        )
    )()
    return joined(table, data)


def other_text(draw: random.Random, whole: bytes) -> bytes:
    """Headers that are no object, or that readers of JSON disagree on."""
    table, data = parts_of(whole)
    true = json.dumps(table).encode()
    a = json.dumps(table["a"]).encode()
    return joined(
        draw.choice(
            (
                *(b"", b"[]", b"null", b"{", b"1", b'"a"', b"\xff\xfe", b"{}", b"NaN", b"{}{}", b" " * 8),
                *(b"[" * 50_000 + b"]" * 50_000, b'{"a":' * 50_000 + b"1" + b"}" * 50_000),
                *(true + b" " * 100_000, b" " * 7 + true, true + b"\0" * 8, b"\xef\xbb\xbf" + true),
                true[:-1] + b', "a": ' + a + b"}",
                true[:-1] + b', "\\u0061": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}',
                true.replace(b'"b"', b'"\\ud800"'),
                true.replace(b'"b"', b'"\xed\xa0\x80"'),
                true.replace(b"[0, ", b"[-0, "),
                true.replace(b"[0, ", b"[0.0, "),
                true.replace(b"[0, ", b"[0e0, "),
            )
        ),
        data,
    )


def only_noise(draw: random.Random, whole: bytes) -> bytes:
    noise = draw.randbytes(draw.randrange(300))
    return noise if draw.randrange(2) else joined(noise, whole[-100:])


CHANGES: tuple[Callable[[random.Random, bytes], bytes], ...] = (
    *(as_it_is, another_length, other_bytes, cut_or_longer, another_entry, another_table, other_text, only_noise),
)
