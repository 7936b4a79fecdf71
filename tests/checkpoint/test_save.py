"""A save is complete or nothing, in the background too; what fails on one rank fails on all."""

import errno
import os
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from moe_engine.checkpoint.find import verify
from moe_engine.checkpoint.folders import prune, set_aside, steps_in
from moe_engine.checkpoint.open import Checkpoint
from moe_engine.checkpoint.pieces import Piece
from moe_engine.checkpoint.save import Saver, Shard
from moe_engine.errors import DataError, StorageError
from moe_engine.host import disk
from moe_engine.parallel.local_ranks import run_on_ranks
from moe_engine.parallel.mesh import build_mesh
from tests.checkpoint.small import ALONE, MANIFEST, WHOLE, save_one, saver_of, shard_of


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_background_save_takes_the_values_of_its_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Training changes the weights while the copy is being written; nothing is visible before it is complete."""
    gate, real = threading.Event(), disk.sync

    def slow(descriptor: int) -> None:
        if threading.current_thread() is not threading.main_thread():
            assert gate.wait(10)
        real(descriptor)

    monkeypatch.setattr(disk, "sync", slow)
    saver, shard = saver_of(tmp_path, background=True), shard_of()
    assert saver.save(1, shard, MANIFEST) is None
    for _, kinds in shard.pieces:
        for tensor in kinds.values():
            tensor.fill_(-1)
    assert saver.poll() is None and steps_in(tmp_path) == [] and names(tmp_path) == ["step-00000001.tmp"]
    gate.set()
    assert saver.save(2, shard_of(5.0), MANIFEST) == tmp_path / "step-00000001"  # the second waits for the first
    assert saver.finish() == tmp_path / "step-00000002" and saver.finish() is None and saver.poll() is None
    assert torch.equal(Checkpoint(tmp_path / "step-00000001").whole("w"), WHOLE)
    assert torch.equal(Checkpoint(tmp_path / "step-00000002").whole("w"), WHOLE + 5)
    assert names(tmp_path) == ["latest", "step-00000001", "step-00000002"]


def test_poll_completes_when_every_rank_has_written(tmp_path: Path):
    def on_rank(rank: int) -> list[str | None]:
        saver = Saver(tmp_path, build_mesh(2, 1, 1).world, background=True)
        half = WHOLE.flatten()[12 * rank : 12 * rank + 12].clone()
        saver.save(1, Shard([(Piece("w", ((0, 4), (0, 6)), 12 * rank, 12), {"master": half})], {}), MANIFEST)
        seen = []
        while saver.pending is not None:
            folder = saver.poll()
            seen.append(folder and folder.name)
        return seen

    one, two = run_on_ranks(on_rank, 2)
    assert one == two and one[-1] == "step-00000001" and not any(one[:-1])
    assert verify(tmp_path / "step-00000001", ALONE) == []


def test_pieces_have_to_make_up_the_weights(tmp_path: Path):
    half = Shard([(Piece("w", ((0, 4), (0, 6)), 0, 12), {"master": torch.zeros(12)})], {})
    with pytest.raises(AssertionError, match="do not make up"):
        saver_of(tmp_path).save(1, half, MANIFEST)


def test_no_space_is_known_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save_one(tmp_path, 1)
    before = names(tmp_path)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1_000_000))
    with pytest.raises(StorageError, match=r"needs 0\.00\d GB, has 0\.001 GB at .*; free some space, keep fewer"):
        save_one(tmp_path, 2)
    assert names(tmp_path) == before and verify(tmp_path / "step-00000001", ALONE) == []


def test_the_disk_fills_on_one_rank(tmp_path: Path):
    """All ranks hear of it, the half-written folder goes, the older checkpoint stays, and the next save works."""

    def on_rank(rank: int) -> list[str]:
        saver = Saver(tmp_path, build_mesh(2, 1, 1).world, keep_last=2)
        half = WHOLE.flatten()[12 * rank : 12 * rank + 12].clone()
        shard = Shard([(Piece("w", ((0, 4), (0, 6)), 12 * rank, 12), {"master": half})], {})
        saver.save(1, shard, MANIFEST)
        real, said = disk.sync, []

        def full(descriptor: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        if rank == 1:
            disk.sync = full
        try:
            saver.save(2, shard, MANIFEST)
        except StorageError as error:
            said.append(str(error))
        disk.sync = real
        saver.save(3, shard, MANIFEST)
        return said

    one, two = run_on_ranks(on_rank, 2)
    assert one == two and len(one) == 1
    assert one[0].startswith("rank 1: ") and "No space left on device; free some space" in one[0]
    assert names(tmp_path) == ["latest", "step-00000001", "step-00000003"]
    assert verify(tmp_path / "step-00000003", ALONE) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written(tmp_path: Path):
    root = tmp_path / "checkpoints"
    root.mkdir(mode=0o500)
    with pytest.raises(StorageError, match="Permission denied; choose an --out that you may write to"):
        save_one(root)


def test_a_file_is_in_the_way(tmp_path: Path):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(StorageError, match=r"checkpoints: (File exists|Not a directory); check the disk"):
        save_one(tmp_path / "checkpoints")


def test_an_old_one_that_cannot_be_removed_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    saver = saver_of(tmp_path, keep_last=1)
    saver.save(1, shard_of(), MANIFEST)
    real = disk.remove

    def busy(folder: Path) -> None:
        if folder.name == "step-00000001.tmp":
            raise StorageError("busy")
        real(folder)

    monkeypatch.setattr(disk, "remove", busy)
    assert saver.save(2, shard_of(), MANIFEST) == tmp_path / "step-00000002"
    assert saver.notes == ["an old checkpoint could not be removed: busy"]


def test_a_link_is_not_followed_to_be_emptied(tmp_path: Path):
    root, elsewhere = tmp_path / "checkpoints", tmp_path / "elsewhere"
    save_one(root, 1).rename(elsewhere)
    (root / "step-00000001").symlink_to(elsewhere)
    saver = saver_of(root, keep_last=1)
    for step in (2, 3):
        saver.save(step, shard_of(), MANIFEST)
    assert steps_in(root) == [1, 3] and verify(elsewhere, ALONE) == []


def test_a_save_that_failed_does_not_take_the_next_one_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    saver, real = saver_of(tmp_path, background=True), disk.sync

    def fail(descriptor: int) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise OSError(errno.EIO, "no")
        real(descriptor)

    with monkeypatch.context() as context:
        context.setattr(disk, "sync", fail)
        saver.save(1, shard_of(), MANIFEST)
        assert saver.pending is not None
        saver.pending.thread.join()
    with pytest.raises(StorageError, match="no; check the disk"):
        saver.save(2, shard_of(2.0), MANIFEST)
    assert saver.finish() == tmp_path / "step-00000002" and steps_in(tmp_path) == [2]


def test_a_folder_that_is_not_shared(tmp_path: Path):
    def on_rank(rank: int) -> str:
        with pytest.raises(DataError) as caught:
            Saver(tmp_path / str(rank) / "checkpoints", build_mesh(2, 1, 1).world)
        return str(caught.value)

    assert all("rank 1: " in said and "--out must be shared by all nodes" in said for said in run_on_ranks(on_rank, 2))


def test_leftovers_of_a_run_that_died(tmp_path: Path):
    save_one(tmp_path, 3)
    leftover = tmp_path / "step-00000006.tmp"
    leftover.mkdir()
    (leftover / "rank-00007.safetensors").write_bytes(b"of another layout")
    (tmp_path / "step-00000003").rename(tmp_path / "step-00000003.old")  # it died between the two renames
    assert steps_in(tmp_path) == []
    saver_of(tmp_path)
    assert names(tmp_path) == ["latest", "step-00000003"] and verify(tmp_path / "step-00000003", ALONE) == []


def test_same_step_again_replaces(tmp_path: Path):
    save_one(tmp_path)
    assert torch.equal(Checkpoint(save_one(tmp_path, value=9.0)).whole("w"), WHOLE + 9)
    assert names(tmp_path) == ["latest", "step-00000003"]


def test_what_is_kept(tmp_path: Path):
    saver = saver_of(tmp_path, keep_last=2, keep_every=20)
    for step in range(5, 60, 5):
        saver.save(step, shard_of(), MANIFEST)
    assert steps_in(tmp_path) == [20, 40, 50, 55]
    set_aside(tmp_path / "step-00000040")
    assert prune(tmp_path, 1, 0) == [tmp_path / "step-00000020", tmp_path / "step-00000050"]
    assert names(tmp_path) == ["latest", "step-00000040.aside", "step-00000055"]
    assert prune(tmp_path, 0, 0) == [] and prune(tmp_path, 1, 0) == []
