"""A tile is measured once, and the first process to write it down decides for all."""

from pathlib import Path

import pytest
import torch

from moe_engine.ops import tune
from moe_engine.ops.tune import Tile, Tiles

SLOW, FAST = Tile(128, 256, 64, 8, 3), Tile(64, 64, 64, 4, 4)
TILES = Tiles(hopper=(SLOW, FAST), ampere=(SLOW,), single=(SLOW,))


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Tile]:
    """A GPU that is only named, on which FAST wins; the tiles that were measured."""
    tiles: list[Tile] = []

    def milliseconds(tile: Tile, run: object) -> float:
        tiles.append(tile)
        return 1.0 if tile == FAST else 2.0

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tune, "_milliseconds", milliseconds)
    monkeypatch.setattr(tune, "has_descriptors", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    forget()
    return tiles


def forget() -> None:
    """As in another process."""
    tune._chosen.cache_clear()
    tune._path.cache_clear()


def choose(rows: float = 2048.0, dtype: torch.dtype = torch.bfloat16) -> Tile:
    return tune.choose("experts_up", torch.device("cuda"), dtype, (4096, 14336), rows, TILES, lambda tile: None)


def files(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "moe_engine_tiles").iterdir())


def test_the_fastest_is_kept_on_disk_and_not_measured_again(measured: list[Tile], tmp_path: Path) -> None:
    assert choose() == FAST and measured == [SLOW, FAST]
    (path,) = files(tmp_path)
    assert path.name.startswith("experts_up-nvidia_h100_80gb_hbm3-bfloat16-4096-14336-rows2e11-")
    forget()
    assert choose(rows=2300.0) == FAST and len(measured) == 2
    assert choose(rows=100.0) == FAST and len(measured) == 4  # another power of two
    assert choose(dtype=torch.float32) == SLOW


def test_the_first_process_decides_and_a_file_can_be_edited(measured: list[Tile], tmp_path: Path) -> None:
    choose()
    (path,) = files(tmp_path)
    assert tune._store(path, SLOW) == FAST
    path.write_text(path.read_text().replace('"stages": 4', '"stages": 2'))
    forget()
    assert choose() == FAST._replace(stages=2) and len(measured) == 2
    assert files(tmp_path) == [path]  # no draft is left


@pytest.mark.parametrize("text", ["", "{", '{"m": 64, "shape": 3}'])
def test_a_damaged_file_is_written_anew(measured: list[Tile], tmp_path: Path, text: str) -> None:
    choose()
    (path,) = files(tmp_path)
    path.write_text(text)
    forget()
    assert choose() == FAST and len(measured) == 4
    assert tune._read(path) == FAST


def test_a_folder_that_cannot_be_written_is_said_once_a_choice(measured: list[Tile], tmp_path: Path) -> None:
    (tmp_path / "moe_engine_tiles").write_text("a file in its place")
    with pytest.warns(RuntimeWarning, match="Set TRITON_CACHE_DIR"):
        assert choose() == FAST
    assert choose() == FAST and len(measured) == 2  # kept in the process


def test_memory_too_short_to_measure_takes_the_smallest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "_milliseconds", lambda tile, run: float("inf"))
    assert tune._fastest((SLOW, FAST), lambda tile: None) == FAST
