"""A checkpoint of weights alone: pieces as they were given, hashes that depend on bits and dtype, space looked for."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from moe_engine.checkpoint.find import verify
from moe_engine.checkpoint.open import Checkpoint
from moe_engine.checkpoint.pieces import Box, Piece
from moe_engine.checkpoint.weights_only import Written, hash_of, write_weights
from moe_engine.config import Model
from moe_engine.errors import StorageError
from tests.checkpoint.small import ALONE

MODEL = Model(vocab_size=4, hidden_size=8, intermediate_size=4, num_hidden_layers=1, num_attention_heads=2)


class Computed(NamedTuple):
    """Weights that lie in no file: dtypes differ by weight."""

    tensors: Mapping[str, Tensor]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def part(self, name: str, box: Box, dtype: torch.dtype | None = None) -> Tensor:
        part = self.tensors[name][tuple(slice(*side) for side in box)]
        return part.to(dtype or part.dtype)

    def dtype(self, name: str, box: Box) -> torch.dtype:
        return self.tensors[name].dtype


SOURCE = Computed(
    {
        "experts": torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(0)).bfloat16(),
        "norm": torch.tensor([float("nan"), -0.0, 1e-40, 3.0]),
    }
)
PIECES = {f"their.{e}": Piece("experts", ((e, e + 1), (0, 2), (0, 5)), 0, 10) for e in range(3)}
NORM = {"their.norm": Piece("norm", ((0, 4),), 0, 4)}


def write(out: Path, files: list[dict[str, Piece]], **options: object) -> Written:
    side = {"tokenizer.model": bytes(range(256)), "empty.txt": b""}
    return write_weights(SOURCE, MODEL, files, side, {"family": "f"}, out, "x", **options)  # type: ignore[arg-type]


def test_is_a_checkpoint_with_the_bits_it_was_given(tmp_path: Path) -> None:
    beats: list[int] = []
    written = write(tmp_path / "out", [PIECES, NORM], progress=beats.append)
    assert verify(tmp_path / "out", ALONE) == []
    reader = Checkpoint(tmp_path / "out")
    for name, tensor in SOURCE.tensors.items():
        found = reader.whole(name, dtype=None)
        assert found.dtype == tensor.dtype and torch.equal(found.view(torch.uint8), tensor.view(torch.uint8)), name
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == bytes(range(256))
    assert reader.manifest["step"] == 0 and reader.manifest["hf"] == {"family": "f"}
    assert Model.model_validate(reader.manifest["run"]["model"]) == MODEL
    assert written.bytes == sum(beats) == 3 * 20 + 16 and written.tensors.keys() == PIECES.keys() | NORM.keys()


def test_the_digest_is_of_the_tensors_and_not_of_their_files(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a", [PIECES, NORM]), write(tmp_path / "b", [NORM | PIECES])
    assert first.digest() == second.digest()
    name = next(iter(PIECES))
    assert Written(first.tensors | {name: first.tensors["their.norm"]}, 0).digest() != first.digest()


def test_the_hash_sees_a_bit_and_the_dtype() -> None:
    zero, negative = torch.zeros(3), torch.tensor([0.0, -0.0, 0.0])
    assert torch.equal(zero, negative) and hash_of(zero) != hash_of(negative)
    assert hash_of(zero) != hash_of(zero.to(torch.int32)) and hash_of(zero.half()) != hash_of(zero.bfloat16())
    column = torch.arange(6.0).view(2, 3).T
    assert hash_of(column) == hash_of(column.contiguous()) and hash_of(torch.empty(0)).endswith(" float32")


def test_a_disk_that_is_too_small_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.statvfs(tmp_path)
    full = os.statvfs_result((*tuple(real)[:4], 0, *tuple(real)[5:]))
    monkeypatch.setattr(os, "statvfs", lambda path: full)
    with pytest.raises(StorageError):
        write(tmp_path / "out", [PIECES, NORM])
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("*/rank-*"))
