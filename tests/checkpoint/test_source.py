"""Any box of a weight from pieces in many files; how many files stay open; dtypes of pieces that differ."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moe_engine.checkpoint.pieces import Piece
from moe_engine.checkpoint.source import Source, Stored
from moe_engine.errors import DataError

WHOLE = torch.arange(5 * 6.0).view(5, 6)
COLUMNS = ((0, 1), (1, 4), (4, 6))  # a piece each, in a file of its own
KINDS = (torch.bfloat16, torch.float32, torch.float16)


def source_of(folder: Path, keep_open: int = 0) -> Source:
    """A weight in three pieces of three dtypes."""
    stored = []
    for i, ((start, stop), dtype) in enumerate(zip(COLUMNS, KINDS, strict=True)):
        save_file({"master/w": WHOLE[:, start:stop].to(dtype).flatten()}, folder / f"{i}.safetensors")
        piece = Piece("w", ((0, 5), (start, stop)), 0, 5 * (stop - start))
        stored.append(Stored(folder / f"{i}.safetensors", "w", piece))
    return Source(folder, {"w": (5, 6)}, {"w": stored}, keep_open)


def mapped(folder: Path) -> set[str]:
    """The files of a folder that this process has mapped, as the kernel says."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {Path(line.split()[-1]).name for line in lines if str(folder) in line}


@pytest.mark.parametrize("keep_open", [0, 1, 2])
@pytest.mark.parametrize("box", [((0, 5), (0, 6)), ((1, 3), (3, 5)), ((4, 5), (0, 1)), ((2, 5), (1, 4))])
def test_any_box(box: tuple[tuple[int, int], tuple[int, int]], keep_open: int, tmp_path: Path) -> None:
    (top, bottom), (left, right) = box
    source = source_of(tmp_path, keep_open)
    assert torch.equal(source.part("w", box).double(), WHOLE[top:bottom, left:right].double())
    assert source.part("w", box, torch.float64).dtype == torch.float64


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the kernel does not say what is mapped")
@pytest.mark.parametrize("keep_open", [0, 1, 2])
def test_files_beyond_keep_open_are_unmapped(keep_open: int, tmp_path: Path) -> None:
    source = source_of(tmp_path, keep_open)
    for _ in range(2):
        source.whole("w")
        assert mapped(tmp_path) == {f"{i}.safetensors" for i in range(3)[-keep_open:]}
    source.part("w", ((0, 5), (4, 6)))  # the one used last is not opened again
    assert f"{2}.safetensors" in mapped(tmp_path)


def test_the_dtype_is_the_wider_one_of_what_the_box_touches(tmp_path: Path) -> None:
    source = source_of(tmp_path)
    rows = (0, 5)
    assert source.dtype("w", (rows, (0, 1))) == torch.bfloat16
    assert source.dtype("w", (rows, (5, 6))) == torch.float16
    assert source.dtype("w", (rows, (0, 2))) == source.dtype("w", (rows, (3, 5))) == torch.float32
    assert source.whole("w", dtype=None).dtype == source.whole("w").dtype == torch.float32
    del source.stored["w"][1]  # type: ignore[attr-defined]
    assert source.dtype("w", (rows, (0, 6))) == torch.float32, "neither of bf16 and fp16 holds the other"


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    source = source_of(tmp_path)
    with pytest.raises(DataError, match="no weight v"):
        source.whole("v")
    del source.stored["w"][0]  # type: ignore[attr-defined]
    with pytest.raises(DataError, match="5 of 30 elements of w are not there"):
        source.whole("w")
