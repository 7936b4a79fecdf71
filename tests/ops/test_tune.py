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

    monkeypatch.setattr(tune, "FOLDER", tmp_path / "tiles")
    monkeypatch.setattr(tune, "_milliseconds", milliseconds)
    monkeypatch.setattr(tune, "has_descriptors", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    tune._decided.cache_clear()
    return tiles


def choose(rows: float = 2048.0, dtype: torch.dtype = torch.bfloat16) -> Tile:
    sizes = {"d": 4096, "f": 14336}
    return tune.choose("experts_up", torch.device("cuda"), dtype, sizes, rows, TILES, lambda tile: None)


def test_the_fastest_is_kept_on_disk_and_not_measured_again(measured: list[Tile], tmp_path: Path) -> None:
    assert choose() == FAST and measured == [SLOW, FAST]
    assert [path.name for path in (tmp_path / "tiles").iterdir()] == [
        "experts_up-nvidia_h100_80gb_hbm3-bfloat16-d4096-f14336-rows2e11.json"
    ]
    tune._decided.cache_clear()  # as in another process
    assert choose(rows=2300.0) == FAST and len(measured) == 2
    assert choose(rows=100.0) == FAST and len(measured) == 4  # another power of two
    assert choose(dtype=torch.float32) == SLOW


def test_the_first_process_decides_and_a_file_can_be_edited(measured: list[Tile], tmp_path: Path) -> None:
    path = tmp_path / "tiles" / "x.json"
    tune._decide(path, SLOW)
    tune._decide(path, FAST)
    assert tune._decided(path) == SLOW
    path.write_text(path.read_text().replace('"stages": 3', '"stages": 2'))
    tune._decided.cache_clear()
    assert tune._decided(path) == SLOW._replace(stages=2)
    assert [file.name for file in path.parent.iterdir()] == ["x.json"]  # no draft is left
