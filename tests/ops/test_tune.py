"""A tile is measured once, and the first process to write it down decides for all."""

import json
import multiprocessing
import os
import stat
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend

from moe_engine.ops import tune
from moe_engine.ops.experts import triton as experts
from moe_engine.ops.grouped_mm import triton as grouped
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
    monkeypatch.setattr(tune, "target", lambda: tune.HOPPER)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
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


@pytest.mark.parametrize(
    "text", ["", "{", '{"m": 64, "shape": 3}', '{"m": 64, "n": 64, "k": 0, "warps": 4, "stages": 4}']
)
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


def refuse(*refused: Tile, error: Exception):
    """A measurement in which these tiles fail and others win by their size."""

    def milliseconds(tile: Tile, run: object) -> float:
        if tile in refused:
            raise error
        return float(tile.m)

    return milliseconds


@pytest.mark.parametrize("error", [RuntimeError("PassManager::run failed"), torch.OutOfMemoryError("no room")])
def test_a_candidate_that_fails_is_passed_over(
    measured: list[Tile], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception
) -> None:
    monkeypatch.setattr(tune, "_milliseconds", refuse(FAST, error=error))
    assert choose() == SLOW
    assert [tune._read(path) for path in files(tmp_path)] == [SLOW]


def test_without_a_measurement_the_smallest_serves_and_nothing_is_written(
    measured: list[Tile], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tune, "_milliseconds", refuse(SLOW, FAST, error=torch.OutOfMemoryError("no room")))
    with pytest.warns(RuntimeWarning, match="experts_up.* could be measured .OutOfMemoryError: no room."):
        assert choose() == FAST
    assert choose() == FAST  # kept in the process: no second warning
    assert not (tmp_path / "moe_engine_tiles").exists()
    monkeypatch.setattr(tune, "_milliseconds", refuse(error=RuntimeError()))
    forget()
    assert choose() == FAST and [tune._read(path) for path in files(tmp_path)] == [FAST]


@pytest.mark.parametrize("tiles", [grouped.MATMUL, grouped.DW, experts.UP, experts.DOWN])
def test_the_last_candidate_is_the_smallest(tiles: Tiles) -> None:
    for candidates in tiles:
        assert min(tile.m * tile.n for tile in candidates) == candidates[-1].m * candidates[-1].n


def test_nothing_is_measured_while_a_graph_is_captured(
    measured: list[Tile], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert choose() == SLOW and not measured and not (tmp_path / "moe_engine_tiles").exists()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert choose() == FAST  # that was for the capture alone
    forget()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert choose() == FAST and len(measured) == 2  # from disk


def test_a_tile_measured_in_one_precision_does_not_serve_another(measured: list[Tile], tmp_path: Path) -> None:
    before = torch.get_float32_matmul_precision()
    try:
        for mode in ("highest", "high"):
            torch.set_float32_matmul_precision(mode)
            choose(dtype=torch.float32)
            choose()
    finally:
        torch.set_float32_matmul_precision(before)
    assert [path.name.split("-")[2] for path in files(tmp_path)] == ["bfloat16", "float32_ieee", "float32_tf32"]
    assert measured == [SLOW, SLOW, FAST, SLOW]


def test_other_users_can_read_a_tile(measured: list[Tile], tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        choose()
    finally:
        os.umask(before)
    (path,) = files(tmp_path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


TARGETS = {
    target.arch: target
    for target in (
        *(GPUTarget("cuda", arch, 32) for arch in (80, 89, 90, 100, 120)),
        *(GPUTarget("hip", arch, 64) for arch in ("gfx90a", "gfx942", "gfx950")),
    )
}


@pytest.mark.parametrize("target", TARGETS.values(), ids=lambda target: str(target.arch))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def test_case_25_a_back_end_is_asked_for_what_it_knows(
    target: GPUTarget, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Launch options and precisions, those of Triton's own classes; "high" asks for TF32 where there is any."""
    monkeypatch.setattr(tune, "target", lambda: target)
    known = make_backend(target).parse_options(dict(tune.FUSED))
    for tiles in (grouped.MATMUL, grouped.DW, experts.UP, experts.DOWN):
        for tile in tiles.candidates(dtype):
            for options in (tile.options(), tile.options(indexed=True), tune.launch_options(3)):
                assert options.keys() <= vars(known).keys()
    before = torch.get_float32_matmul_precision()
    try:
        for mode in ("highest", "high"):
            torch.set_float32_matmul_precision(mode)
            assert {tune.precision(dtype), tune.mixed_precision(dtype)} <= {*known.allowed_dot_input_precisions}
    finally:
        torch.set_float32_matmul_precision(before)


def test_case_25_tiles_and_descriptors_are_those_of_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    """Descriptors from sm_90 on; the large tiles where 228 KiB are, which sm_120 has not."""
    found = {}
    for arch, target in TARGETS.items():
        monkeypatch.setattr(tune, "target", lambda target=target: target)
        tiles = TILES.candidates(torch.bfloat16)
        found[arch] = (tune.has_descriptors(), next(name for name in Tiles._fields if getattr(TILES, name) == tiles))
    assert found == {
        80: (False, "ampere"), 89: (False, "ampere"), 90: (True, "hopper"), 100: (True, "hopper"),
        120: (True, "ampere"), "gfx90a": (False, "ampere"), "gfx942": (False, "ampere"), "gfx950": (False, "ampere"),
    }  # fmt: skip


RANKS, ROUNDS = 8, 300


def race(rank: int, folder: Path, barrier: Barrier) -> None:
    """In each round, store a tile of its own in a file that is absent, empty or cut off, and note what was adopted."""
    adopted = []
    for round_ in range(ROUNDS):
        barrier.wait()
        adopted.append(tune._store(folder / f"{round_}.json", FAST._replace(stages=1 + rank)))
    (folder / f"rank{rank}").write_text(json.dumps(adopted))


def test_processes_that_race_adopt_the_same_tile(tmp_path: Path) -> None:
    for round_ in range(ROUNDS):
        if round_ % 3:
            (tmp_path / f"{round_}.json").write_text(["", '{"m": 64'][round_ % 3 - 1])
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(RANKS)
    processes = [context.Process(target=race, args=(rank, tmp_path, barrier)) for rank in range(RANKS)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    adopted = [json.loads((tmp_path / f"rank{rank}").read_text()) for rank in range(RANKS)]
    on_disk = [list(tune._read(tmp_path / f"{round_}.json") or ()) for round_ in range(ROUNDS)]
    assert adopted == [on_disk] * RANKS
    assert len(list(tmp_path.iterdir())) == ROUNDS + RANKS  # no draft is left
