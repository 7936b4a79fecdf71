"""Token shards: what is written is read, in any cut into files, and a damaged folder is refused."""

import json
import os
import random
import shutil
import subprocess
import sys
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest

from moe_engine.data.shards import MANIFEST, ShardWriter, TokenDataset, read_data_manifest, token_dtype
from moe_engine.errors import ConfigError, DataError
from moe_engine.host.atomic_folder import atomic_folder


def documents(count: int, seed: int = 0) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.integers(0, 60_000, generator.integers(1, 40)).astype("<u2") for _ in range(count)]


def read_all(folder: Path, stem: str, shards: list[dict], dtype: np.dtype) -> list[list[int]]:
    found = []
    for shard in shards:
        tokens = np.fromfile(folder / shard["file"], dtype)
        offsets = np.fromfile((folder / shard["file"]).with_suffix(".idx"), "<i8")
        assert offsets[0] == 0 and offsets[-1] == len(tokens) == shard["tokens"]
        found += [tokens[a:b].tolist() for a, b in pairwise(offsets)]
    return found


@pytest.mark.parametrize("shard_tokens", [1, 30, 100, 10_000])
@pytest.mark.parametrize("together", [1, 7, 200])
def test_writer_keeps_documents_whole(tmp_path: Path, shard_tokens: int, together: int) -> None:
    texts = documents(200)
    writer = ShardWriter(tmp_path, "a-train", np.dtype("<u2"), shard_tokens)
    for start in range(0, 200, together):
        group = texts[start : start + together]
        writer.add(np.concatenate(group), np.array([len(text) for text in group]))
    shards = writer.close()
    assert read_all(tmp_path, "a-train", shards, np.dtype("<u2")) == [text.tolist() for text in texts]
    assert writer.documents == 200 and writer.tokens == sum(map(len, texts))
    assert all(shard["tokens"] <= shard_tokens or shard["documents"] == 1 for shard in shards)


@pytest.mark.parametrize("seed", range(40))
def test_cut_tail_moves_the_last_tokens(tmp_path: Path, seed: int) -> None:
    generator = random.Random(seed)
    texts = documents(generator.randrange(1, 6), seed)
    writer = ShardWriter(tmp_path, "a-train", np.dtype("<u2"))
    writer.add(np.concatenate(texts), np.array([len(text) for text in texts]))
    count = min(generator.randrange(1, 40), sum(map(len, texts)) // 2)
    tail, lengths = writer.cut_tail(count, 65_000)
    stream = np.concatenate(texts)
    assert tail.tolist() == stream[len(stream) - count :].tolist() and lengths.sum() == count
    kept = read_all(tmp_path, "a-train", writer.close(), np.dtype("<u2"))
    expected = stream[: len(stream) - count].copy()
    expected[-1:] = 65_000
    assert list(chain(*kept)) == expected.tolist()
    assert writer.documents == len(kept) and writer.tokens == len(expected)
    ends = set(np.cumsum([len(text) for text in texts]).tolist())
    cut = len(stream) - count
    assert len(kept) + len(lengths) == len(texts) + (cut not in ends and cut > 0)


def test_dtype_follows_the_vocabulary() -> None:
    assert token_dtype(65_536) == np.uint16 and token_dtype(65_537) == np.uint32


def test_dataset_reads_views(make_dataset) -> None:  # type: ignore[no-untyped-def]
    texts = [text.tolist() for text in documents(100)]
    folder = make_dataset("d", {"web": texts}, vocab_size=65_536, shard_tokens=300)
    dataset = TokenDataset(folder, "web", "train")
    assert len(dataset.shards) > 3 and len(dataset) == 100 and dataset.tokens == sum(map(len, texts)) + 100
    for i, text in enumerate(texts):
        assert dataset.read(i, 0, int(dataset.lengths[i])).tolist() == [*text, 65_535]
        assert dataset.read(i, 1, 2).tolist() == [*text, 65_535][1:2]
    assert np.shares_memory(dataset.read(0, 0, 2), dataset.shards[0])
    with pytest.raises(ValueError, match="read-only"):
        dataset.read(0, 0, 1)[0] = 1


def test_damaged_folder_is_refused(make_dataset, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    folder = make_dataset("d", {"web": [[1, 2, 3], [4, 5]]})
    with pytest.raises(DataError, match=r"no domain 'books'; it holds web"):
        TokenDataset(folder, "books", "train")
    with pytest.raises(
        DataError,
        match=r"token id 49999 .* vocabulary of 40000; .* model.vocab_size >= 50000 .* --resize-vocab 50000",
    ):
        TokenDataset(folder, "web", "train", vocab_size=40_000)

    def broken(change) -> Path:  # type: ignore[no-untyped-def]
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy)
        change(copy)
        return copy

    cut = broken(lambda f: os.truncate(f / "web-train-00000.bin", 6))
    with pytest.raises(DataError, match=r"has 6 bytes, manifest.json says 14"):
        TokenDataset(cut, "web", "train")
    with pytest.raises(DataError, match="is missing"):
        TokenDataset(broken(lambda f: (f / "web-train-00000.idx").unlink()), "web", "train")
    with pytest.raises(DataError, match="not an index"):
        TokenDataset(broken(lambda f: (f / "web-train-00000.idx").write_bytes(b"\1" * 24)), "web", "train")
    with pytest.raises(DataError, match="cannot be read"):
        TokenDataset(broken(lambda f: (f / MANIFEST).write_text("{")), "web", "train")
    with pytest.raises(DataError, match=r"holds no manifest.json.*prepare_data"):
        read_data_manifest(broken(lambda f: (f / MANIFEST).unlink()))
    with pytest.raises(DataError, match=r"not moe_engine\.tokens version"):
        read_data_manifest(broken(lambda f: (f / MANIFEST).write_text(json.dumps({"format": "other"}))))
    with pytest.raises(DataError, match="no such folder"):
        read_data_manifest(tmp_path / "nowhere")


def test_what_a_manifest_names_lies_in_the_folder(make_dataset, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    folder = make_dataset("d", {"web": [[1, 2, 3], [4, 5]]})
    manifest = json.loads((folder / MANIFEST).read_text())
    shard = manifest["domains"]["web"]["splits"]["train"]["shards"][0]
    for suffix in ("bin", "idx"):
        shutil.copy(folder / f"web-train-00000.{suffix}", tmp_path / f"out.{suffix}")
    for name in ("../out.bin", str(tmp_path / "out.bin"), "a" * 70_000, "", "..", "web-train-00000.bin\0"):
        shard["file"] = name
        (folder / MANIFEST).write_text(json.dumps(manifest))
        with pytest.raises(DataError, match="no regular file of this folder"):
            TokenDataset(folder, "web", "train")
    for suffix in ("idx", "bin"):
        (folder / f"link.{suffix}").symlink_to(tmp_path / f"out.{suffix}")
        shard["file"] = "link.bin"
        (folder / MANIFEST).write_text(json.dumps(manifest))
        with pytest.raises(DataError, match="no regular file of this folder"):
            TokenDataset(folder, "web", "train")
    (folder / MANIFEST).unlink()
    os.mkfifo(folder / MANIFEST)
    with pytest.raises(DataError, match=r"holds no manifest.json"):
        read_data_manifest(folder)


@pytest.mark.parametrize("dtype", ["|O", "<u4", "<i8", [["a", "<u2"]]])
def test_tokens_of_another_type_are_refused(make_dataset, dtype: object) -> None:  # type: ignore[no-untyped-def]
    """As objects, the bytes of the file would be pointers."""
    folder = make_dataset("d", {"web": [[1, 2, 3], [4, 5]]})
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | {"dtype": dtype}))
    with pytest.raises(DataError, match="expected <u2"):
        TokenDataset(folder, "web", "train")


def test_publish_is_all_or_nothing(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with pytest.raises(RuntimeError), atomic_folder(out) as folder:
        (folder / "a").write_text("x")
        raise RuntimeError
    assert list((tmp_path / "deep").iterdir()) == []
    with atomic_folder(out) as folder:
        (folder / "a").write_text("x")
        assert not out.exists()
        with pytest.raises(ConfigError, match="another preparation"), atomic_folder(out):
            pass
    with atomic_folder(out) as folder:
        (folder / "b").write_text("x")
    assert [entry.name for entry in (tmp_path / "deep").iterdir()] == ["out"]
    assert [entry.name for entry in out.iterdir()] == ["b"]


def test_publish_after_a_kill_starts_clean(tmp_path: Path) -> None:
    script = """
import os, signal, sys
from pathlib import Path
from moe_engine.host.atomic_folder import atomic_folder
with atomic_folder(Path(sys.argv[1])) as folder:
    (folder / "left_over").write_text("x")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    out = tmp_path / "out"
    subprocess.run([sys.executable, "-c", script, str(out)], cwd=Path(__file__).parents[2], check=False)
    assert not out.exists() and (tmp_path / "out.partial" / "left_over").exists()
    with atomic_folder(out) as folder:
        (folder / "a").write_text("x")
    assert [entry.name for entry in out.iterdir()] == ["a"] and not (tmp_path / "out.partial").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_unwritable_output_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(ConfigError, match="cannot be written"), atomic_folder(tmp_path / "locked" / "out"):
        pass


def test_output_below_a_file_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="cannot be written"), atomic_folder(tmp_path / "file" / "out"):
        pass
