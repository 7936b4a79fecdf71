"""Faults with intent: files that would run code, lead out of their folder, or take all memory, and what they get.

G1   pickles in every file that is read           never run
G2   names and files that lead elsewhere          refused, not followed, no waiting (paths.py)
G3   safetensors headers                          refused at once, or read as they say (headers.py)
G5   YAML and config.json that ask for too much   refused at once, nothing imported
G6   text that acts on a terminal                 printed as escapes (terminal.py)
"""

import hashlib
import io
import itertools
import json
import resource
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from moe_engine.checkpoint.find import find_checkpoint, verify
from moe_engine.checkpoint.manifest import NAME, SEAL, read_manifest
from moe_engine.checkpoint.open import Checkpoint
from moe_engine.config.command_line import load
from moe_engine.data.loader import open_domains
from moe_engine.data.shards import MANIFEST
from moe_engine.errors import ConfigError
from moe_engine.log.logger import Logger
from moe_engine.log.rows import read_rows
from moe_engine.prepare.tokenizer.load import load_tokenizer
from tests.faults.arena import Arena, Fault, Injections
from tests.faults.headers import headers
from tests.faults.paths import paths
from tests.faults.rows import in_folder, make, refusal
from tests.faults.targets import (
    ALONE,
    SHARD,
    entry_of,
    read_data,
    resealed,
    rewritten,
    small_checkpoint,
    small_data,
    within,
)
from tests.faults.terminal import evil_text

SECONDS, MEMORY = 2.0, 100  # MB
YAML_BYTES = 100_000_000
MODULE = "configuration_evil"


def payloads(marker: Path) -> list[bytes]:
    """Pickles that make the file `marker` when they are loaded: two protocols, as torch and as numpy pack them."""
    command = f"touch {marker}".encode()
    text = b"cposix\nsystem\n(S'" + command + b"'\ntR."
    binary = b"\x80\x02cposix\nsystem\nX" + len(command).to_bytes(4, "little") + command + b"\x85R."
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("archive/data.pkl", binary)
        file.writestr("archive/version", "3\n")
    header = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }".ljust(117) + b"\n"
    array = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + binary
    return [text, binary, archive.getvalue(), array]


def pickles(arena: Arena, count: int) -> Injections:
    """G1: each payload in each of the files below."""
    for target in itertools.islice(itertools.cycle(PICKLED), count):
        yield in_folder(arena, f"a pickle as {target.__name__}", nothing_runs, target)


def nothing_runs(folder: Path, target: Callable[[Path, bytes], None]) -> str | None:
    """The engine reads the file, or refuses it in its own words; the marker is not made."""
    marker = folder / "marker"
    for i, payload in enumerate(payloads(marker)):
        (place := folder / str(i)).mkdir()
        refusal(target, place, payload)
        if marker.exists():
            return "it ran"
    return None


def a_shard(place: Path, payload: bytes) -> None:
    folder = small_checkpoint(place)
    (folder / SHARD).write_bytes(payload)
    (place / "latest").write_bytes(payload)
    resealed(folder, files={SHARD: entry_of(payload)})
    assert find_checkpoint("auto", place, ALONE, [].append) == folder, "the checksums were made to hold"
    Checkpoint(folder).whole("w")


def a_manifest(place: Path, payload: bytes) -> None:
    folder = small_checkpoint(place)
    (folder / NAME).write_bytes(payload)
    assert verify(folder, ALONE), "taken for a manifest"
    find_checkpoint(str(folder), place, ALONE, [].append)


def a_sealed_manifest(place: Path, payload: bytes) -> None:
    folder = small_checkpoint(place)
    (folder / NAME).write_bytes(payload + SEAL + hashlib.sha256(payload).hexdigest().encode() + b'"\n}\n')
    assert verify(folder, ALONE), "taken for a manifest"
    read_manifest(folder)


def a_data_manifest(place: Path, payload: bytes) -> None:
    folder = small_data(place)
    (folder / MANIFEST).write_bytes(payload)
    read_data(folder)


def tokens(place: Path, payload: bytes) -> None:
    folder = small_data(place)
    (file := folder / "d-train-00000.bin").write_bytes(payload.ljust(file.stat().st_size, b".")[: file.stat().st_size])
    read_data(folder)


def an_index(place: Path, payload: bytes) -> None:
    folder = small_data(place)
    (file := folder / "d-train-00000.idx").write_bytes(payload.ljust(file.stat().st_size, b".")[: file.stat().st_size])
    read_data(folder)


def tokens_that_are_objects(place: Path, payload: bytes) -> None:
    """The type of the tokens is "a pointer to an object": none may be followed."""
    folder = small_data(place)
    file = folder / "d-train-00000.bin"
    count = file.stat().st_size // 2
    file.write_bytes(payload.ljust(8 * count, b"."))
    rewritten(folder, dtype="|O", vocab_size=1 << 62)
    if refusal(open_domains, [("d", str(folder), 1.0)]) is None:
        raise ValueError("tokens of type object are mapped")


def a_tokenizer(place: Path, payload: bytes) -> None:
    for name in ("tokenizer.model", "tokenizer.json", "vocab.json"):
        (folder := place / name).mkdir(parents=True)
        for file in (name, "merges.txt", "tokenizer_config.json", "special_tokens_map.json", "config.json"):
            (folder / file).write_bytes(payload)
        refusal(load_tokenizer, str(folder))
        refusal(load_tokenizer, str(folder / name))


def a_configuration(place: Path, payload: bytes) -> None:
    for flag, name in (("config", "a.yaml"), ("model", "config.json"), ("model", "b.yaml"), ("deepspeed", "d.json")):
        (place / name).write_bytes(payload)
        refusal(load, [f"--{flag}", str(place / name)], 1)


def a_log(place: Path, payload: bytes) -> None:
    for name in ("metrics.jsonl", "eval.jsonl"):
        (place / name).write_bytes(payload + b'\n{"step": 1}\n' + payload)
        assert [row["step"] for row in read_rows(place / name)] == [1]
    Logger(place, True, 1, quiet=True).truncate_after(1)


def text(place: Path, payload: bytes) -> None:
    for suffix in (".txt", ".py", ".json", ".jsonl", ".parquet", ".txt.gz", ".jsonl.gz"):
        (place / f"a{suffix}").write_bytes(payload)
        refusal(make, place / f"a{suffix}", place / f"out{suffix}", on_bad_row="skip")


PICKLED = (
    *(a_shard, a_manifest, a_sealed_manifest, a_data_manifest, tokens, an_index, tokens_that_are_objects),
    *(a_tokenizer, a_configuration, a_log, text),
)


def settings(arena: Arena, count: int) -> Injections:
    """G5: each of the files below."""
    for what, flag, content in itertools.islice(itertools.cycle(greedy()), count):
        yield in_folder(arena, what, refused_at_once, flag, content)


def greedy() -> Iterator[tuple[str, str, bytes]]:
    """(what, flag, content), with MARKER for the path of a file that is made when something runs."""
    call = b'["touch MARKER"]'
    yield "a call in YAML", "config", b"train: !!python/object/apply:os.system " + call
    yield "an object in YAML", "config", b"train: !!python/object/new:os.system " + call
    yield "a module in YAML", "config", b"train: !!python/module:" + MODULE.encode()
    yield "a name in YAML", "config", b"train: {out: !!python/name:" + MODULE.encode() + b".run }"
    yield "a call in a setting", "set", b"train.steps=!!python/object/apply:os.system " + call
    yield "a tag of its own", "config", b"train: !evil {steps: 1}"
    levels = (f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]\n" for i in range(1, 30))
    yield "an alias bomb", "config", f"l0: &l0 [x]\n{''.join(levels)}".encode()
    merges = (f"m{i}: &m{i} {{<<: [{', '.join([f'*m{i - 1}'] * 9)}]}}\n" for i in range(1, 30))
    yield "a bomb of merged keys", "config", f"m0: &m0 {{x: 1}}\n{''.join(merges)}".encode()
    yield "deep nesting", "config", b"train: " + b"[" * 30_000 + b"]" * 30_000
    yield "a number of 60,000 digits", "config", b"train: {steps: " + b"9" * 60_000 + b"}"
    yield "100 MB of YAML", "config", b"a: 1\n" * (YAML_BYTES // 5)
    yield "deep JSON", "model", b'{"model_type": ' + b"[" * 30_000 + b"]" * 30_000 + b"}"
    base = {"model_type": "mixtral", "vocab_size": 64, "hidden_size": 8, "intermediate_size": 8}
    base |= {"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
    remote = {"AutoConfig": f"{MODULE}.Config", "AutoModel": f"{MODULE}.Model"}
    yield "auto_map", "model", json.dumps(base | {"auto_map": remote, "trust_remote_code": True}).encode()
    yield "attention of a hub", "model", json.dumps(base | {"_attn_implementation": "evil/repo:attn"}).encode()
    yield "a class of its own", "model", json.dumps(base | {"model_type": MODULE, "auto_map": remote}).encode()


def refused_at_once(folder: Path, flag: str, content: bytes) -> str | None:
    marker, name = folder / "marker", folder / ("config.json" if flag == "model" else "a.yaml")
    content = content.replace(b"MARKER", str(marker).encode())
    name.write_bytes(content)
    (folder / f"{MODULE}.py").write_text(f"open({str(marker)!r}, 'w')\n")
    value = content.decode() if flag == "set" else str(folder if flag == "model" else name)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.monotonic()
    sys.path.insert(0, str(folder))
    try:
        error = within(5 * SECONDS, refusal, load, [f"--{flag}", value], 1)
    finally:
        sys.path.remove(str(folder))
    seconds = time.monotonic() - began
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) >> 10
    if marker.exists() or MODULE in sys.modules:
        return "it ran"
    if not isinstance(error, ConfigError):
        return f"accepted: {error}"
    return f"{seconds:.1f} s, {grown} MB" if seconds > SECONDS or grown > MEMORY else None


HOSTILE: dict[str, Fault] = {
    "G1": Fault("pickles in every file that is read", pickles, 12, 12),
    "G2": Fault("names and files that lead out of their folder, or nowhere", paths, 40, 40),
    "G3": Fault("safetensors headers that lie", headers, 300, 2000),
    "G5": Fault("settings that run code or take all memory", settings, 15, 15),
    "G6": Fault("text that acts on a terminal", evil_text, 31, 31),
}
