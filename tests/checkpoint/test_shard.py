"""Our files are safetensors files, and their digests are those of the bytes on disk."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
import xxhash
from safetensors.torch import load_file, save_file

from moe_engine.checkpoint import shard
from moe_engine.checkpoint.shard import digest_of, open_shard, size_of, write_shard
from moe_engine.errors import DataError, StorageError


def tensors() -> dict[str, torch.Tensor]:
    return {
        "u8": torch.arange(5, dtype=torch.uint8),
        "f32": torch.randn(3, 7),
        "not/contiguous": torch.randn(6, 4).t(),
        "bf16": torch.randn(3).bfloat16(),
        "i64": torch.tensor(3),
        "nothing": torch.empty(0),
        "grad": torch.randn(2, requires_grad=True),
    }


@pytest.mark.parametrize("chunk", [16, 1 << 24])
def test_safetensors_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int):
    monkeypatch.setattr(shard, "CHUNK", chunk)
    path, written = tmp_path / "a.safetensors", tensors()
    digest = write_shard(path, written, {"pieces": "[]"})
    loaded = load_file(path)
    assert loaded.keys() == written.keys()
    for name, tensor in written.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor.detach()), name
    content = path.read_bytes()
    assert digest == (len(content), xxhash.xxh3_128_hexdigest(content), hashlib.sha256(content).hexdigest())
    assert digest_of(path) == digest[:2] and size_of(written, {"pieces": "[]"}) == len(content)
    assert open_shard(path).metadata() == {"pieces": "[]"}


def test_what_a_bad_disk_changes_is_not_what_was_hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The digest is of the bytes in memory: a page that the disk garbles is found."""
    real = shard.write_file

    def garble(path, parts):
        real(path, parts)
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(bytes(content))

    monkeypatch.setattr(shard, "write_file", garble)
    digest = write_shard(tmp_path / "a", tensors(), {})
    assert digest_of(tmp_path / "a")[1] != digest.xxh3


def header(length: int, text: bytes = b"{}") -> bytes:
    return length.to_bytes(8, "little") + text


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"1234567",
        header(2**62),
        header(99_000_000, b" " * 1000),
        header(17 << 20, b" " * (17 << 20)),
        header(2, b"[]"),
        header(64, json.dumps({"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}).encode().ljust(64)),
        header(6, b"\xff\xfe{}{}"),
    ],
)
def test_a_hostile_header_is_refused_before_it_is_read(tmp_path: Path, content: bytes):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(DataError, match=f"{tmp_path / 'x'}: "):
        open_shard(tmp_path / "x")


def test_a_folder_that_is_not_there(tmp_path: Path):
    with pytest.raises(StorageError, match="No such file or directory; check the disk"):
        write_shard(tmp_path / "no" / "x", tensors(), {})


def test_files_of_the_library_open_too(tmp_path: Path):
    save_file({"a": torch.ones(2)}, tmp_path / "x", metadata={"k": "v"})
    assert open_shard(tmp_path / "x").metadata() == {"k": "v"}
