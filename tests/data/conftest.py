"""Small token datasets for the tests of this folder."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from moe_engine.data.shards import ShardWriter, token_dtype, write_data_manifest
from moe_engine.host.atomic_folder import atomic_folder

MakeDataset = Callable[..., Path]


@pytest.fixture
def make_dataset(tmp_path: Path) -> MakeDataset:
    """make(name, {domain: [document, ...]}, eval_documents): a prepared folder; documents get the eos id appended."""

    def make(
        name: str,
        domains: dict[str, Sequence[Sequence[int]]],
        held_out: Sequence[Sequence[int]] = ((1, 2, 3),),
        vocab_size: int = 50_000,
        shard_tokens: int = 1000,
    ) -> Path:
        eos_id = vocab_size - 1
        dtype = token_dtype(vocab_size)
        entries = {}
        with atomic_folder(tmp_path / name) as folder:
            for domain, documents in domains.items():
                splits = {}
                for split, texts in ("train", documents), ("eval", held_out):
                    writer = ShardWriter(folder, f"{domain}-{split}", dtype, shard_tokens)
                    for text in texts:
                        writer.add(np.array([*text, eos_id], dtype), np.array([len(text) + 1]))
                    shards = writer.close()
                    counts = {"documents": writer.documents, "tokens": writer.tokens}
                    splits[split] = {**counts, "max_id": eos_id, "shards": shards}
                entries[domain] = {"splits": splits, "bad_rows": 0, "empty_documents": 0, "sources": []}
            tokenizer = {"spec": "made up", "kind": "test", "fingerprint": "f" * 64}
            sizes = {"dtype": dtype.str, "vocab_size": vocab_size, "eos_id": eos_id}
            write_data_manifest(folder, {"key": "", **sizes, "tokenizer": tokenizer, "domains": entries})
        return tmp_path / name

    return make


@pytest.fixture
def unique_documents() -> Callable[..., list[list[int]]]:
    """Documents of random lengths in which no token id occurs twice, so that a token tells where it came from."""

    def documents(tokens: int, seed: int = 0, first: int = 0) -> list[list[int]]:
        generator = np.random.default_rng(seed)
        lengths, left = [], tokens
        while left:
            lengths.append(min(left, int(generator.integers(1, 60))))
            left -= lengths[-1]
        ends = np.cumsum(lengths)
        return [list(range(first + end - length, first + end)) for end, length in zip(ends.tolist(), lengths)]

    return documents
