"""What is read is what was written, from any cut; what was changed on the way is refused before it is read."""

import errno
import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moe_engine.checkpoint import manifest
from moe_engine.checkpoint.find import find_checkpoint, verify
from moe_engine.checkpoint.manifest import SEAL, read_manifest, write_manifest
from moe_engine.checkpoint.open import Checkpoint
from moe_engine.checkpoint.pieces import Piece
from moe_engine.checkpoint.save import Saver, Shard
from moe_engine.errors import ConfigError, DataError, StorageError
from moe_engine.parallel.local_ranks import run_on_ranks
from moe_engine.parallel.mesh import build_mesh
from tests.checkpoint.small import ALONE, MANIFEST, RNG, WHOLE, save_one


def test_round_trip(tmp_path: Path):
    folder = save_one(tmp_path)
    reader = Checkpoint(folder)
    assert torch.equal(reader.whole("w"), WHOLE) and torch.equal(reader.whole("w", "exp_avg"), -WHOLE)
    assert torch.equal(reader.extra(0)["rng"], RNG)
    assert reader.manifest["note"] == "x" and reader.manifest["step"] == 3
    assert sorted(p.name for p in folder.iterdir()) == ["manifest.json", "rank-00000.safetensors"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000003"]
    assert (tmp_path / "latest").read_text() == "step-00000003" and verify(folder, ALONE) == []


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
        saver = Saver(tmp_path, build_mesh(2, 1, 1).world)
        saver.save(1, Shard(pieces, {"rank": torch.tensor(rank)}), MANIFEST)  # type: ignore[arg-type]

    run_on_ranks(on_rank, 2)
    reader = Checkpoint(tmp_path / "step-00000001")
    assert torch.equal(reader.whole("w"), WHOLE)
    assert [int(reader.extra(rank)["rank"]) for rank in range(2)] == [0, 1]
    rows = torch.empty(7)
    reader.fill("master", Piece("w", ((1, 3), (0, 6)), 2, 7), rows)
    assert torch.equal(rows, WHOLE[1:3].reshape(-1)[2:9])
    with pytest.raises(DataError, match=r"6 of 30 elements of w are not there; resume with the model"):
        reader.fill("master", Piece("w", ((0, 5), (0, 6)), 0, 30), torch.empty(30))
    with pytest.raises(DataError, match="no weight v"):
        reader.whole("v")


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8 % len(content)] ^= 1 << bit % 8
    path.write_bytes(bytes(content))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def add(path: Path) -> None:
    path.with_name("rank-00001.safetensors").write_bytes(path.read_bytes())


DAMAGE: list[Callable[[Path], object]] = [
    cut,
    add,
    Path.unlink,
    lambda path: path.write_bytes(b""),
    lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    lambda path: flip(path, 3),
    lambda path: flip(path, -3),
]


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["rank-00000.safetensors", "manifest.json"])
def test_damage_is_found_and_named_and_the_older_one_used(tmp_path: Path, damage: Callable[[Path], object], name: str):
    older, folder = save_one(tmp_path, 2, value=7.0), save_one(tmp_path, 3)
    damage(folder / name)
    (problem, *_) = verify(folder, ALONE)
    assert problem.startswith(str(folder)) and ("rank-0000" in problem or "manifest.json" in problem)
    with pytest.raises(DataError, match="resume from another checkpoint"):
        if (folder / "manifest.json").is_file():
            find_checkpoint(str(folder), tmp_path, ALONE, print)
        else:
            raise DataError("resume from another checkpoint")
    said: list[str] = []
    assert find_checkpoint("auto", tmp_path, ALONE, said.append) == older
    assert len(said) == 1 and "DAMAGED CHECKPOINT" in said[0] and "Falling back to step 2" in said[0]
    assert problem in said[0]
    assert find_checkpoint("auto", tmp_path, ALONE, said.append) == older and len(said) == 2  # nothing was renamed


def test_every_bit_of_the_manifest_counts(tmp_path: Path):
    folder = save_one(tmp_path)
    path = folder / "manifest.json"
    whole = path.read_bytes()
    for bit in range(8 * len(whole)):
        flip(path, bit)
        assert verify(folder, ALONE), bit
        path.write_bytes(whole)
    assert verify(folder, ALONE) == []


def test_none_is_whole(tmp_path: Path):
    for step in (1, 2):
        cut(save_one(tmp_path, step) / "rank-00000.safetensors")
    for _ in range(2):  # a script that starts the run again gets no fresh start either
        with pytest.raises(DataError, match=r"no checkpoint under .* is whole: .*step-00000002.*step-00000001"):
            find_checkpoint("auto", tmp_path, ALONE, print)


def test_a_sealed_manifest_may_still_lack_things(tmp_path: Path):
    """Damage that somebody made with care: no traceback either."""
    folder = save_one(tmp_path)
    write_manifest(folder, {"step": 3, "files": {"rank-00000.safetensors": 7}})
    assert "a manifest without what belongs there" in verify(folder, ALONE)[0]
    write_manifest(folder, {"step": 3})
    assert "a manifest without what belongs there" in verify(folder, ALONE)[0]


@pytest.mark.parametrize("body", [b"no JSON", b"[1]", b'{"format": 1'])
def test_a_sealed_file_may_be_no_manifest(tmp_path: Path, body: bytes):
    folder = save_one(tmp_path)
    seal = SEAL + hashlib.sha256(body).hexdigest().encode() + b'"\n}\n'
    (folder / "manifest.json").write_bytes(body + seal)
    with pytest.raises((DataError, ConfigError), match=r"says nothing of a format|this version reads format 2"):
        read_manifest(folder)


OUTSIDE: dict[str, Callable[[Path], str]] = {
    "parent": lambda shard: f"../{shutil.move(shard, shard.parent.parent / 'x') and 'x'}",
    "absolute": lambda shard: str(shutil.move(shard, shard.parent.parent / "x")),
    "below": lambda shard: (shutil.copytree(shard.parent, shard.parent / ".y"), shard.unlink(), f".y/{shard.name}")[2],
    "link": lambda shard: (shard.symlink_to(shutil.move(shard, shard.parent.parent / "x")), shard.name)[1],
    "folder": lambda shard: (shard.unlink(), shard.mkdir(), shard.name)[2],
    "NUL": lambda shard: f"{shard.name}\0",
    "huge": lambda shard: "a" * 70_000,
}


@pytest.mark.parametrize("kind", OUTSIDE)
def test_names_that_lead_elsewhere_are_not_followed(tmp_path: Path, kind: str):
    folder = save_one(tmp_path)
    content = read_manifest(folder)
    (entry,) = content["files"].values()
    name = OUTSIDE[kind](folder / "rank-00000.safetensors")
    write_manifest(folder, content | {"files": {name: entry}})
    problems = verify(folder, ALONE)
    assert problems and all(problem.startswith(str(folder)) and len(problem) < 1000 for problem in problems)
    with pytest.raises(DataError):
        Checkpoint(folder)


@pytest.mark.parametrize("name", ["rank-00000.safetensors", "manifest.json"])
def test_a_pipe_is_not_waited_for(tmp_path: Path, name: str):
    folder = save_one(tmp_path)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    (problem,) = verify(folder, ALONE)
    assert "no regular file" in problem and name in problem


def test_a_folder_of_another_step_is_not_taken_for_it(tmp_path: Path):
    save_one(tmp_path, 3).rename(tmp_path / "step-00000009")
    assert "holds step 3; the folder was renamed or copied" in verify(tmp_path / "step-00000009", ALONE)[0]
    best = (tmp_path / "step-00000009").rename(tmp_path / "best-so-far")
    assert find_checkpoint(str(best), tmp_path, ALONE, print) == best  # a copy under a name of one's own


def test_shards_of_two_steps_do_not_mix(tmp_path: Path):
    """Same size, same header, other numbers."""
    one, two = save_one(tmp_path, 1, value=1.0), save_one(tmp_path, 2, value=2.0)
    name = "rank-00000.safetensors"
    assert (one / name).stat().st_size == (two / name).stat().st_size
    (two / name).write_bytes((one / name).read_bytes())
    assert "changed since it was written" in verify(two, ALONE)[0] and verify(one, ALONE) == []


def test_other_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = save_one(tmp_path)
    monkeypatch.setattr(manifest, "FORMAT", 1)
    save_one(tmp_path, 4)
    monkeypatch.undo()
    for _ in range(2):  # not damage: it is neither passed over nor renamed
        with pytest.raises(ConfigError, match="step-00000004: format 1, this version reads format 2; resume with the"):
            find_checkpoint("auto", tmp_path, ALONE, print)
    assert verify(folder, ALONE) == []


def test_a_disk_that_does_not_answer_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = save_one(tmp_path)

    def fail(path: Path, heartbeat: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr(manifest, "digest_of", fail)
    with pytest.raises(StorageError, match=r"rank-00000\.safetensors: Input/output error"):
        find_checkpoint("auto", tmp_path, ALONE, print)
    monkeypatch.undo()
    assert find_checkpoint("auto", tmp_path, ALONE, print) == folder


def test_choose(tmp_path: Path):
    assert find_checkpoint("auto", tmp_path / "nothing", ALONE, print) is None
    assert find_checkpoint("auto", tmp_path, ALONE, print) is None
    with pytest.raises(ConfigError, match=r"--resume .*no manifest\.json there; give a folder"):
        find_checkpoint(str(tmp_path / "nowhere"), tmp_path, ALONE, print)
    first, second = save_one(tmp_path, 1), save_one(tmp_path, 2)
    assert (
        find_checkpoint("auto", tmp_path, ALONE, print) == second
        and find_checkpoint(str(first), tmp_path, ALONE, print) == first
    )
    (tmp_path / "latest").write_text("step-00000001")  # a hint for people; a flipped bit in it costs nothing
    assert find_checkpoint("auto", tmp_path, ALONE, print) == second


def test_ranks_share_the_reading_and_agree(tmp_path: Path):
    save_one(tmp_path, 1)
    cut(save_one(tmp_path, 2) / "rank-00000.safetensors")

    def on_rank(rank: int) -> tuple[str, list[str]]:
        world = build_mesh(3, 1, 1).world
        problems = verify(tmp_path / "step-00000002", world)
        return find_checkpoint("auto", tmp_path, world, print).name, problems  # pyright: ignore[reportOptionalMemberAccess]

    results = run_on_ranks(on_rank, 3)
    assert {name for name, _ in results} == {"step-00000001"}
    assert all(problems == results[0][1] and len(problems) == 1 for _, problems in results)


def test_a_path_that_one_rank_does_not_see(tmp_path: Path):
    """All ranks hear of it at once; none is left waiting for the one that left."""
    folder = save_one(tmp_path)

    def on_rank(rank: int) -> str:
        path = folder if rank == 0 else tmp_path / "not-mounted"
        with pytest.raises(ConfigError) as caught:
            find_checkpoint(str(path), tmp_path, build_mesh(2, 1, 1).world, print)
        return str(caught.value)

    assert all("rank 1: --resume" in said and "no manifest.json there" in said for said in run_on_ranks(on_rank, 2))
