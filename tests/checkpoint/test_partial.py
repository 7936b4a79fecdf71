"""A folder made in many steps: gone on with when it was made of the same, begun anew when not, whole or not there."""

from pathlib import Path

import pytest

from moe_engine.checkpoint.partial import PROGRESS, Partial
from moe_engine.checkpoint.weights_only import write_bytes
from moe_engine.errors import ConfigError


def write(partial: Partial, name: str, content: bytes) -> bool:
    return partial.write(name, lambda path: (write_bytes(path, content), {f"hash of {name}": content.decode()}))


def begun(out: Path, identity: object) -> Partial:
    """One of two files is written, then the process is gone."""
    partial = Partial(out, identity)
    assert write(partial, "a", b"one")
    return partial


def test_goes_on_with_what_is_complete(tmp_path: Path) -> None:
    out = tmp_path / "out"
    begun(out, {"from": ("x", 1)})
    again = Partial(out, {"from": ["x", 1]})  # a tuple is a list in JSON
    assert not write(again, "a", b"not written") and write(again, "b", b"two")
    assert again.tensors() == {"hash of a": "one", "hash of b": "two"}
    again.publish()
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {"a": b"one", "b": b"two"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def spoil_nothing(folder: Path) -> None:
    """Another identity is enough."""


def spoil_file(folder: Path) -> None:
    (folder / "a").write_bytes(b"onE")


def lose_file(folder: Path) -> None:
    (folder / "a").unlink()


def cut_progress(folder: Path) -> None:
    (folder / PROGRESS).write_bytes((folder / PROGRESS).read_bytes()[:-2])


def other_progress(folder: Path) -> None:
    (folder / PROGRESS).write_text('{"identity": "x", "files": [1]}')


@pytest.mark.parametrize(
    ("spoil", "identity"),
    [(spoil_nothing, "y"), (spoil_file, "x"), (lose_file, "x"), (cut_progress, "x"), (other_progress, "x")],
)
def test_begins_anew(spoil: object, identity: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    partial = begun(out, "x")
    (partial.folder / "left over").write_bytes(b"half a file")
    assert callable(spoil)
    spoil(partial.folder)
    again = Partial(out, identity)
    assert list(again.folder.iterdir()) == [] and again.tensors() == {}
    assert write(again, "a", b"new")
    again.publish()
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {"a": b"new"}


def test_a_file_that_was_not_finished_is_made_again_and_the_rest_stays(tmp_path: Path) -> None:
    out = tmp_path / "out"
    partial = begun(out, "x")
    (partial.folder / "b").write_bytes(b"tw")  # the power went
    again = Partial(out, "x")
    assert not write(again, "a", b"") and write(again, "b", b"two")
    again.publish()
    assert (out / "b").read_bytes() == b"two"


def test_what_is_there_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "link"):
        with pytest.raises(ConfigError, match=f"{name} exists; remove it or choose another name"):
            Partial(tmp_path / name, "x")
        assert not (tmp_path / f"{name}.partial").exists()
    assert (tmp_path / "file").read_bytes() == b"mine"
