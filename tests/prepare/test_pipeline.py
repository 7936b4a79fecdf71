"""Preparation: the same shards for any number of workers, bad rows left out or refused, nothing half written."""

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_engine.data.loader import Loader, open_domains
from moe_engine.data.shards import MANIFEST, TokenDataset
from moe_engine.errors import ConfigError, DataError
from moe_engine.prepare.pipeline import PrepareOptions, prepare, stdlib_sources
from moe_engine.prepare.tokenizer.load import load_tokenizer

REPOSITORY = Path(__file__).parents[2]
SHARED = REPOSITORY.parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data files are not beside the repository")
WORDS = "alpha beta gamma delta é 日本 😀 epsilon\n zeta".split(" ")


def texts(count: int, seed: int = 0) -> list[str]:
    generator = random.Random(seed)
    return [" ".join(generator.choices(WORDS, k=generator.randrange(1, 200))) for _ in range(count)]


def corpus(folder: Path) -> dict[str, list[str | Path]]:
    """Two domains in several formats."""
    (folder / "web").mkdir(parents=True)
    rows = [json.dumps({"text": text}) for text in texts(300)]
    (folder / "web" / "a.jsonl").write_text("\n".join(rows))
    (folder / "web" / "b.jsonl.gz").write_bytes(gzip.compress("\n".join(rows[:50]).encode()))
    (folder / "web" / "c.json").write_text(json.dumps([{"text": text} for text in texts(40, 1)]))
    for i, text in enumerate(texts(30, 2)):
        (folder / f"{i}.txt").write_text(text)
    return {"web": [folder / "web"], "notes": sorted(folder.glob("*.txt"))}


def make(
    domains: dict[str, Any], out: Path, tokenizer: str | None = None, workers: int = 1, **options: Any
) -> dict[str, Any]:
    return prepare(domains, out, tokenizer, PrepareOptions(**options), workers, quiet=True)


def documents(folder: Path, domain: str, split: str = "train") -> list[list[int]]:
    dataset = TokenDataset(folder, domain, split)
    return [dataset.read(i, 0, int(dataset.lengths[i])).tolist() for i in range(len(dataset))]


def shards(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def encoded(text: str) -> list[int]:
    return [*text.encode(), 256]


def test_documents_come_out_in_order_with_their_end(tmp_path: Path) -> None:
    domains = corpus(tmp_path / "in")
    manifest = make(domains, tmp_path / "out", eval_fraction=0.0)
    expected = [encoded(text) for text in [*texts(300), *texts(300)[:50], *texts(40, 1)]]
    assert documents(tmp_path / "out", "web") == expected
    order = sorted(range(30), key=lambda i: f"{i}.txt")
    assert documents(tmp_path / "out", "notes") == [encoded(texts(30, 2)[i]) for i in order]
    train = manifest["domains"]["web"]["splits"]["train"]
    assert (train["documents"], train["tokens"]) == (390, sum(map(len, expected)))
    assert manifest["documents"] == 420 and manifest["dtype"] == "<u2" and manifest["vocab_size"] == 257
    assert manifest["tokenizer"]["fingerprint"] == load_tokenizer("bytes").fingerprint
    assert [source["bytes"] for source in manifest["domains"]["web"]["sources"]] == [
        (tmp_path / "in" / "web" / name).stat().st_size for name in ("a.jsonl", "b.jsonl.gz", "c.json")
    ]


def test_two_workers_write_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_engine.prepare import pipeline as module

    monkeypatch.setattr(module, "GROUP", 5000)
    domains = corpus(tmp_path / "in")
    (tmp_path / "in" / "web" / "a.jsonl").open("a").write('\n{"text": null}')
    for workers in (1, 2):
        make(domains, tmp_path / f"out{workers}", workers=workers, on_bad_row="skip", shard_tokens=20_000)
    one, two = shards(tmp_path / "out1"), shards(tmp_path / "out2")
    assert one == two and len(one) > 12 and "bad_rows.jsonl" in one


@needs_shared
@pytest.mark.parametrize("name", ["tiny_sentencepiece/m.model", "llama3:tiny_tiktoken", "tiny_hf", "llama3"])
def test_tokenizers_in_workers(tmp_path: Path, name: str) -> None:
    family, colon, path = name.rpartition(":")
    spec = f"{family}{colon}{SHARED / 'tokenizers' / path}"
    domains: dict[str, Any] = {"recipes": [SHARED / "text" / "howto_recipes"]}
    make(domains, tmp_path / "one", spec, 1)
    manifest = make(domains, tmp_path / "two", spec, 2)
    assert shards(tmp_path / "one") == shards(tmp_path / "two")
    tokenizer = load_tokenizer(spec)
    assert manifest["dtype"] == ("<u4" if name == "llama3" else "<u2")
    for document in documents(tmp_path / "one", "recipes")[:5]:
        assert document[-1] == tokenizer.eos_id and tokenizer.eos_id not in document[:-1]
        assert max(document) < tokenizer.vocab_size


@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_skipping_bad_rows_equals_the_cleaned_file(tmp_path: Path, place: str) -> None:
    rows = [json.dumps({"text": text}) for text in texts(100)]
    bad = ['{"text": null}', '{"text": "cut', "[1]", '{"title": "x"}', '{"text": "\\ud800"}']
    at = {"first": 0, "middle": 50, "last": 100}[place]
    (tmp_path / "clean").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "clean" / "a.jsonl").write_text("\n".join(rows))
    (tmp_path / "broken" / "a.jsonl").write_text("\n".join(rows[:at] + bad + rows[at:]))
    make({"d": [tmp_path / "clean"]}, tmp_path / "out1", on_bad_row="skip")
    manifest = make({"d": [tmp_path / "broken"]}, tmp_path / "out2", on_bad_row="skip")
    listed = [json.loads(row) for row in (tmp_path / "out2" / "bad_rows.jsonl").read_text().splitlines()]
    assert manifest["bad_rows"] == manifest["domains"]["d"]["bad_rows"] == len(listed) == 5
    assert [int(row["where"].partition(":")[0]) for row in listed] == list(range(at + 1, at + 6))
    clean, broken = shards(tmp_path / "out1"), shards(tmp_path / "out2")
    for left_out in (clean, broken):
        left_out.pop(MANIFEST)
        left_out.pop("bad_rows.jsonl", None)
    assert clean == broken
    for workers in (1, 2):
        with pytest.raises(DataError, match=rf"a.jsonl:{at + 1}: .*--on-bad-row skip"):
            make({"d": [tmp_path / "broken"]}, tmp_path / "out3", workers=workers)
    assert not (tmp_path / "out3").exists() and not (tmp_path / "out3.partial").exists()


def test_held_out_documents_depend_on_their_text_alone(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts(2000)))
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in reversed(texts(3000)[1000:])))
    make({"d": [tmp_path / "a.jsonl"]}, tmp_path / "out1", eval_fraction=0.05)
    make({"d": [tmp_path / "b.jsonl"]}, tmp_path / "out2", eval_fraction=0.05, workers=2)
    sides = [
        {split: {tuple(d) for d in documents(tmp_path / out, "d", split)} for split in ("train", "eval")}
        for out in ("out1", "out2")
    ]
    assert 60 < len(sides[0]["eval"]) < 140
    for here in sides:
        for there in sides:
            assert not here["train"] & there["eval"]
    assert len(sides[0]["train"]) + len(sides[0]["eval"]) == len(set(texts(2000)))


def test_small_domain_gives_its_last_tokens(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("".join(f"line {i}\n" for i in range(1000)))
    manifest = make({"book": [tmp_path / "book.txt"]}, tmp_path / "out", eval_fraction=0.1)
    whole = encoded((tmp_path / "book.txt").read_text())
    (train,), (held_out,) = documents(tmp_path / "out", "book"), documents(tmp_path / "out", "book", "eval")
    assert train == [*whole[: len(train) - 1], 256] and held_out == whole[len(train) :]
    assert len(held_out) == round(0.1 * len(whole)) and manifest["tokens"] == len(whole)
    none = make({"book": [tmp_path / "book.txt"]}, tmp_path / "none", eval_fraction=0.0)
    assert none["domains"]["book"]["splits"]["eval"]["tokens"] == 0


def test_begin_of_text_is_placed_on_request(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ConfigError, match="no begin-of-text token"):
        make({"d": [tmp_path / "a.txt"]}, tmp_path / "out", add_bos=True)
    if SHARED.is_dir():
        spec = f"llama3:{SHARED / 'tokenizers' / 'tiny_tiktoken'}"
        manifest = make({"d": [tmp_path / "a.txt"]}, tmp_path / "out", spec, add_bos=True, eval_fraction=0.0)
        (document,) = documents(tmp_path / "out", "d")
        assert document[0] == manifest["bos_id"] == 2000 and document[-1] == manifest["eos_id"] == 2001


def test_same_request_is_reused_and_another_refused(tmp_path: Path) -> None:
    domains = corpus(tmp_path / "in")
    out = tmp_path / "out"
    make(domains, out)
    before = (out / MANIFEST).stat()
    make(domains, out, workers=2)
    assert (out / MANIFEST).stat() == before
    with pytest.raises(ConfigError, match="--overwrite"):
        make(domains, out, eval_fraction=0.5)
    os.utime(tmp_path / "in" / "0.txt", (1, 1))
    with pytest.raises(ConfigError, match="other files"):
        make(domains, out)
    prepare(domains, out, None, PrepareOptions(), 1, overwrite=True, quiet=True)
    assert (out / MANIFEST).stat().st_ino != before.st_ino
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(ConfigError, match="is not prepared data"):
        prepare(domains, tmp_path / "mine", None, PrepareOptions(), 1, overwrite=True, quiet=True)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"


@pytest.mark.parametrize("content", ["", "\n\n", '{"text": ""}\n{"text": " \\n"}', '{"text": 1}'])
def test_corpus_without_text_is_a_data_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    (tmp_path / "b.txt").write_text("text")
    domains: dict[str, Any] = {"good": [tmp_path / "b.txt"], "empty": [tmp_path / "a.jsonl"]}
    with pytest.raises(DataError, match="domain empty: no text in 1 files"):
        make(domains, tmp_path / "out", on_bad_row="skip")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "workers", "named"),
    [({"eval_fraction": 1.0}, 1, "eval_fraction"), ({"shard_tokens": 0}, 0, "workers 0")],
)
def test_options_out_of_range(tmp_path: Path, options: dict[str, Any], workers: int, named: str) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ConfigError, match=named):
        make({"d": [tmp_path / "a.txt"]}, tmp_path / "out", workers=workers, **options)


def test_standard_library_is_a_corpus(tmp_path: Path) -> None:
    sources = stdlib_sources()
    assert sources == stdlib_sources() and {"json", "email"} <= {file.parent.name for file in sources}
    assert not any(part in ("site-packages", "test", "tests") for file in sources for part in file.parts[-4:-1])
    manifest = prepare({"stdlib": sources}, tmp_path / "out", quiet=True, options=PrepareOptions(on_bad_row="skip"))
    assert manifest["tokens"] > 5_000_000
    domains = open_domains([("stdlib", str(tmp_path / "out"), 1.0)], vocab_size=257)
    (batch,) = Loader(domains, seed=0, seq_length=256, micro_batch=4).next_step()
    text = load_tokenizer("bytes").decode(batch.tokens_BS[0].tolist())
    assert batch.tokens_BS.shape == (4, 256) and np.mean([c.isprintable() or c == "\n" for c in text]) > 0.99


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from /proc")
def test_long_line_in_bounded_memory(tmp_path: Path) -> None:
    with open(tmp_path / "a.jsonl", "wb") as file:
        file.write(b'{"text": "first"}\n{"text": "' + b"x" * 100_000_000 + b'"}\n{"text": "last"}\n')
    script = r"""
import re, sys
from moe_engine.prepare.pipeline import PrepareOptions, prepare
options = PrepareOptions(on_bad_row="skip", eval_fraction=0.0)
m = prepare({"d": [sys.argv[1]]}, sys.argv[2], options=options, workers=1, quiet=True)
peak = re.search(r"VmHWM:\s+(\d+) kB", open("/proc/self/status").read())
print(m["documents"], m["bad_rows"], int(peak[1]) // 1024)
"""
    command = [sys.executable, "-c", script, str(tmp_path / "a.jsonl"), str(tmp_path / "out")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    kept, bad, mebibytes = map(int, done.stdout.split())
    assert (kept, bad) == (2, 1) and mebibytes < 200


def test_workers_end_with_their_parent(tmp_path: Path) -> None:
    rows = "\n".join(json.dumps({"text": text}) for text in texts(20_000))
    (tmp_path / "a.jsonl").write_text(rows)
    command = [
        sys.executable,
        "tools/prepare_data.py",
        "--input",
        str(tmp_path / "a.jsonl"),
        "--out",
        str(tmp_path / "out"),
    ]
    parent = subprocess.Popen([*command, "--workers", "2", "--quiet"], cwd=REPOSITORY)
    children: list[int] = []
    deadline = time.monotonic() + 30
    while len(children) < 2 and time.monotonic() < deadline and parent.poll() is None:
        listed = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
        children = [int(pid) for pid in listed.read_text().split()] if listed.exists() else []
    if len(children) < 2:
        parent.kill()
        pytest.skip("no /proc listing of child processes, or they ended before they were seen")
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    while time.monotonic() < deadline and any(alive(pid) for pid in children):
        time.sleep(0.05)
    assert not any(alive(pid) for pid in children)
    assert not (tmp_path / "out").exists()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
