"""Files of a checkpoint: put together from any cut, complete or not there at all, and refused when damaged."""

import json
from pathlib import Path

import pytest
import torch

from moe_engine.checkpoint.store import Piece, Reader, find, save
from moe_engine.errors import ConfigError, DataError
from moe_engine.parallel.local_ranks import run_on_ranks

WHOLE = torch.arange(24.0).view(4, 6)


def save_one(root: Path, step: int = 3) -> Path:
    pieces = [(Piece("w", ((0, 4), (0, 6)), 0, 24), {"master": WHOLE.flatten(), "exp_avg": -WHOLE.flatten()})]
    return save(root, step, pieces, {"rng": torch.arange(5, dtype=torch.uint8)}, {"note": "x", "layout": {"dp": 1}})


def test_round_trip(tmp_path: Path):
    folder = save_one(tmp_path)
    reader = Reader(folder)
    assert torch.equal(reader.whole("w", "master", (4, 6)), WHOLE)
    assert torch.equal(reader.whole("w", "exp_avg", (4, 6)), -WHOLE)
    assert torch.equal(reader.extra(0)["rng"], torch.arange(5, dtype=torch.uint8))
    assert reader.manifest["note"] == "x" and reader.manifest["step"] == 3
    assert sorted(p.name for p in folder.iterdir()) == ["manifest.json", "rank-00000.safetensors"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000003"]


def test_put_together_from_boxes_and_runs(tmp_path: Path):
    """Two ranks hold the left and right columns; the right one is owned in two runs by different ranks."""

    def on_rank(rank: int) -> None:
        left, right = WHOLE[:, :2].reshape(-1), WHOLE[:, 2:].reshape(-1)
        if rank == 0:
            pieces = [
                (Piece("w", ((0, 4), (0, 2)), 0, 8), {"master": left}),
                (Piece("w", ((0, 4), (2, 6)), 0, 5), {"master": right[:5]}),
            ]
        else:
            pieces = [(Piece("w", ((0, 4), (2, 6)), 5, 11), {"master": right[5:]})]
        save(tmp_path, 1, pieces, {"rank": torch.tensor(rank)}, {})

    run_on_ranks(on_rank, 2)
    reader = Reader(tmp_path / "step-00000001")
    assert torch.equal(reader.whole("w", "master", (4, 6)), WHOLE)
    assert [int(reader.extra(rank)["rank"]) for rank in range(2)] == [0, 1]
    with pytest.raises(DataError, match=r"w has 24 elements here.* 30 in the run"):
        reader.whole("w", "master", (5, 6))
    with pytest.raises(DataError, match="v has 0 elements here"):
        reader.whole("v", "master", (2,))


def damage_cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def damage_flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 0x10
    path.write_bytes(bytes(content))


def damage_empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [damage_cut, damage_flip, damage_empty, Path.unlink])
def test_damaged_file_is_refused_by_name(tmp_path: Path, damage):
    folder = save_one(tmp_path)
    damage(folder / "rank-00000.safetensors")
    with pytest.raises(DataError, match=r"step-00000003/rank-00000\.safetensors: missing, cut short or changed"):
        Reader(folder)


@pytest.mark.parametrize("damage", [damage_cut, damage_empty])
def test_damaged_manifest_is_refused_by_name(tmp_path: Path, damage):
    folder = save_one(tmp_path)
    damage(folder / "manifest.json")
    with pytest.raises(DataError, match=r"manifest\.json"):
        Reader(folder)


def test_other_format_is_refused(tmp_path: Path):
    folder = save_one(tmp_path)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"format": 99}))
    with pytest.raises(DataError, match="format 99, this version reads format 1"):
        Reader(folder)


def test_half_written_folder_is_ignored_and_replaced(tmp_path: Path):
    save_one(tmp_path, step=3)
    leftover = tmp_path / "step-00000006.tmp"
    leftover.mkdir()
    (leftover / "rank-00000.safetensors").write_bytes(b"half")
    (leftover / "rank-00007.safetensors").write_bytes(b"of another layout")
    found = find("auto", tmp_path)
    assert found is not None and found.name == "step-00000003"
    folder = save_one(tmp_path, step=6)
    assert not leftover.exists() and sorted(p.name for p in folder.iterdir()) == [
        "manifest.json",
        "rank-00000.safetensors",
    ]
    assert find("auto", tmp_path) == folder
    assert torch.equal(Reader(folder).whole("w", "master", (4, 6)), WHOLE)


def test_same_step_again_replaces(tmp_path: Path):
    save_one(tmp_path)
    (tmp_path / "step-00000003" / "rank-00000.safetensors").write_bytes(b"old")
    Reader(save_one(tmp_path))


def test_find(tmp_path: Path):
    assert find("auto", tmp_path / "nothing") is None and find("auto", tmp_path) is None
    with pytest.raises(ConfigError, match=r"--resume .*no manifest\.json there; give a folder"):
        find(str(tmp_path / "nowhere"), tmp_path)
    first, second = save_one(tmp_path, 1), save_one(tmp_path, 2)
    assert find("auto", tmp_path) == second and find(str(first), tmp_path) == first
    (second / "manifest.json").unlink()
    with pytest.raises(DataError, match="latest names step-00000002, which has no manifest"):
        find("auto", tmp_path)
