"""Nothing of an input is lost without a word: rows, files, and the right data for the right input."""

import gzip
import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from moe_engine.errors import ConfigError
from moe_engine.prepare.files import list_files
from moe_engine.prepare.formats import BadRow, documents, read_chunks
from moe_engine.prepare.pipeline import PrepareOptions, prepare

SKIP = PrepareOptions(on_bad_row="skip", eval_fraction=0.0)


def prepared(out: Path, *inputs: Path, options: PrepareOptions = SKIP) -> dict[str, Any]:
    return prepare({"data": list(inputs)}, out, "bytes", options, quiet=True)


def read(path: Path) -> tuple[list[str], list[BadRow]]:
    """Texts and bad rows of a file."""
    texts, bad = [], []
    for piece in read_chunks(path):
        for row in [piece] if isinstance(piece, BadRow) else documents(piece):
            bad.append(row) if isinstance(row, BadRow) else texts.append(row.text)
    return texts, bad


def lines(count: int, first: str = "") -> str:
    return "".join(json.dumps({"text": (first if i == 0 and first else f"row {i}")}) + "\n" for i in range(count))


def test_case_03_a_long_first_row_takes_no_other_with_it(tmp_path: Path) -> None:
    path = tmp_path / "long.json"
    path.write_text(lines(1001, "x" * 1_100_000))
    manifest = prepared(tmp_path / "out", path, options=PrepareOptions(eval_fraction=0.0))  # nothing is refused
    counts = {name: manifest[name] for name in ("rows_read", "documents_kept", "empty_documents", "bad_rows")}
    assert counts == {"rows_read": 1001, "documents_kept": 1001, "empty_documents": 0, "bad_rows": 0}


@pytest.mark.parametrize("first", ['{"text": "cut', '{"text": "a" "b"}', "nonsense", '{"text": 1}'])
def test_case_03_a_broken_first_line_is_one_bad_row(tmp_path: Path, first: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text(first + "\n" + lines(1000) + '{"text": " "}\n')
    manifest = prepared(tmp_path / "out", path)
    counts = [manifest[name] for name in ("rows_read", "documents_kept", "empty_documents", "bad_rows")]
    assert counts == [1002, 1000, 1, 1]
    assert json.loads((tmp_path / "out" / "bad_rows.jsonl").read_text())["where"].partition(":")[0] == "1"


PRETTY = json.dumps([{"text": f"row {i}", "more": {"a": [1, 2]}} for i in range(50)], indent=2)
KEYED = json.dumps({f"k{i}": {"text": f"row {i}"} for i in range(50)}, indent=1)


@pytest.mark.parametrize("whole", [PRETTY, KEYED, PRETTY.replace("\n", ""), lines(50)])
@pytest.mark.parametrize("place", [0, 7, 49])
@pytest.mark.parametrize("damage", [lambda row: row[:-1], lambda row: row + '"', lambda row: row.replace('"', "", 1)])
def test_case_03_more_a_broken_row_costs_itself_in_every_layout(
    tmp_path: Path, whole: str, place: int, damage: Any
) -> None:
    """A quote missing or too many in one row of fifty."""
    path = tmp_path / "rows.json"
    path.write_text(whole.replace(f'"row {place}"', damage(f'"row {place}"'), 1))
    texts, bad = read(path)
    assert texts == [f"row {i}" for i in range(50) if i != place] and len(bad) == 1


def test_case_03_more_objects_one_after_another_and_pretty_printed(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text("\n".join(json.dumps({"text": f"row {i}"}, indent=4) for i in range(40)))
    assert read(path) == ([f"row {i}" for i in range(40)], [])


def test_case_03_more_a_bad_string_in_parquet_costs_its_own_row(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    values = [f"row {i}".encode() for i in range(600)]
    values[300] = b"\xff\xfe"
    offsets = [0]
    for value in values:
        offsets.append(offsets[-1] + len(value))
    buffers = [None, pa.array(offsets, pa.int32()).buffers()[1], pa.py_buffer(b"".join(values))]
    column = pa.Array.from_buffers(pa.utf8(), len(values), buffers)
    pq.write_table(pa.table({"text": column}), tmp_path / "rows.parquet")
    texts, bad = read(tmp_path / "rows.parquet")
    assert texts == [f"row {i}" for i in range(600) if i != 300]
    assert [(row.where, row.rows) for row in bad] == [("row 301", 1)] and "not UTF-8" in bad[0].reason


def test_case_09_links_are_followed_once_and_what_is_not_read_is_named(tmp_path: Path) -> None:
    data, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    (data / "sub").mkdir(parents=True)
    elsewhere.mkdir()
    (data / "a.txt").write_text("alpha\n")
    (elsewhere / "b.txt").write_text("beta\n")
    (data / "linked").symlink_to(elsewhere)
    (data / "sub" / "loop").symlink_to(data)
    (data / "again.txt").symlink_to(data / "a.txt")
    os.link(data / "a.txt", data / "sub" / "hard.txt")
    for i in range(1000):
        (data / f"{i}.png").write_bytes(b"x")
    (data / "NOTES.pdf").write_bytes(b"x")
    listing = list_files([data, data / "sub" / ".." / "a.txt"])
    assert [file.name for file in listing.files] == ["a.txt", "b.txt"]
    assert sorted(path.name for path, _ in listing.again) == ["a.txt", "again.txt", "hard.txt", "loop"]
    assert listing.passed_over == {".png": 1000, ".pdf": 1}
    done = subprocess.run(
        ["python", "tools/prepare_data.py", "--input", str(data), "--out", str(tmp_path / "out"), "--quiet"],
        cwd=Path(__file__).parents[2], capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "not read in folders: 1,001 entries (1,000 .png, 1 .pdf)" in done.stdout
    assert f"{data / 'again.txt'} is {data / 'a.txt'}" in done.stdout and done.stdout.count("\n") <= 5


def zstd(*parts: bytes) -> bytes:
    """Each part as a frame of its own."""
    import pyarrow

    return b"".join(pyarrow.compress(part, codec="zstd", asbytes=True) for part in parts)


def test_case_09_endings_in_any_case_and_zstd_are_read(tmp_path: Path) -> None:
    (tmp_path / "A.JSONL.GZ").write_bytes(gzip.compress(lines(3).encode()) + gzip.compress(lines(2).encode()))
    (tmp_path / "b.jsonl.zst").write_bytes(zstd(lines(4).encode(), lines(5).encode()))
    (tmp_path / "C.Txt.Zst").write_bytes(zstd(b"some ", b"text"))
    manifest = prepared(tmp_path / "out", tmp_path)
    assert manifest["documents_kept"] == 15 and not manifest["domains"]["data"]["passed_over"]


@pytest.mark.parametrize("pack", [zstd, gzip.compress])
def test_case_09_more_a_cut_stream_keeps_the_rows_before_and_is_a_bad_row(tmp_path: Path, pack: Any) -> None:
    rows = "".join(json.dumps({"text": f"{i} {os.urandom(24).hex()}"}) + "\n" for i in range(20_000))
    path = tmp_path / ("rows.jsonl.zst" if pack is zstd else "rows.jsonl.gz")
    packed = pack(rows.encode())
    path.write_bytes(packed[: len(packed) // 2])
    texts, bad = read(path)
    assert len(texts) > 3000 and texts[0].startswith("0 ") and 1 <= len(bad) <= 2
    assert "ends early or is damaged" in bad[-1].reason or "ends early or is damaged" in bad[0].reason


def test_case_10_same_name_size_and_time_elsewhere_is_other_data(tmp_path: Path) -> None:
    for name, text in (("one", "a" * 100), ("two", "b" * 100)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.txt").write_text(text)
        os.utime(tmp_path / name / "x.txt", (10**9, 10**9))
    first = prepared(tmp_path / "out", tmp_path / "one" / "x.txt")
    assert prepared(tmp_path / "out", tmp_path / "one" / "x.txt")["key"] == first["key"]
    with pytest.raises(ConfigError, match="made of other files"):
        prepared(tmp_path / "out", tmp_path / "two" / "x.txt")


def test_case_10_more_a_file_changed_in_place_with_its_time_put_back_is_other_data(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    for text in ("a" * 300_000, "a" * 150_000 + "b" + "a" * 149_999):
        path.write_text(text)
        os.utime(path, (10**9, 10**9))
        if text.count("b"):
            with pytest.raises(ConfigError, match="made of other files"):
                prepared(tmp_path / "out", path)
        else:
            prepared(tmp_path / "out", path)


def seconds(path: Path) -> float:
    begun = time.perf_counter()
    assert len(read(path)[0]) == 20_000
    return time.perf_counter() - begun


def test_case_22_an_array_of_short_rows_takes_at_most_twice_the_time_of_lines(tmp_path: Path) -> None:
    """It took nine times as long: line numbers were counted from the start of the buffer for each row."""
    rows = [{"text": f"row {i}"} for i in range(20_000)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "rows.json").write_text(json.dumps(rows, indent=1))
    ratios = sorted(seconds(tmp_path / "rows.json") / seconds(tmp_path / "rows.jsonl") for _ in range(3))
    assert ratios[0] < 2, ratios
