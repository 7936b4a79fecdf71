"""Files to documents: every defect is one reported row, and leaving it out gives the documents of the cleaned file."""

import gzip
import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from moe_engine.errors import ConfigError, DataError
from moe_engine.prepare import formats
from moe_engine.prepare.files import list_files
from moe_engine.prepare.formats import BadRow, Document, documents, read_chunks

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data files are not beside the repository")

GOOD = [b'{"text": "one", "n": 1}', b'{"text": "two \\u2028 \xe2\x80\xa8 lines", "n": 2}', b'{"n": 3, "text": "three"}']
DEFECTS = {
    "cut short": b'{"text": "a',
    "trailing comma": b'{"text": "a",}',
    "single quotes": b"{'text': 'a'}",
    "bare value": b'{"text": a}',
    "no opening brace": b'"text": "a"}',
    "no colon": b'{"text" "a"}',
    "no quote": b'{"text: "a"}',
    "plain text": b"just words",
    "null row": b"null",
    "list row": b'["a"]',
    "number row": b"12",
    "string row": b'"a"',
    "no text": b'{"title": "a"}',
    "null text": b'{"text": null}',
    "number text": b'{"text": 1.5}',
    "list text": b'{"text": ["a"]}',
    "object text": b'{"text": {"a": "b"}}',
    "boolean text": b'{"text": true}',
    "latin-1 byte": b'{"text": "n\xe9e"}',
    "lone surrogate": b'{"text": "a\\ud800b"}',
    "NUL": b'{"text": "a\\u0000b"}',
    "control character": b'{"text": "a\x01b"}',
    "field twice": b'{"text": "a", "text": "b"}',
    "deep nesting": b'{"text": "a", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "huge number": b'{"text": "a", "x": ' + b"9" * 5000 + b"}",
    "BOM in the middle": b'\xef\xbb\xbf{"text": "a"}',
}


def read(path: Path, text_key: str | None = None, per: str = "file") -> tuple[list[str], list[BadRow]]:
    texts, bad = [], []
    for piece in read_chunks(path, per, text_key):  # type: ignore[arg-type]
        for row in [piece] if isinstance(piece, BadRow) else documents(piece, text_key):
            if isinstance(row, Document):
                texts.append(row.text)
            else:
                bad.append(row)
    return texts, bad


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize("place", [0, 1, 3], ids=["first", "middle", "last"])
@pytest.mark.parametrize("defect", DEFECTS)
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_defect_costs_its_own_line(tmp_path: Path, suffix: str, defect: str, place: int) -> None:
    rows = GOOD[:place] + [DEFECTS[defect]] + GOOD[place:]
    path = write(tmp_path / f"rows{suffix}", b"\n".join(rows) + b"\n")
    clean = write(tmp_path / f"clean{suffix}", b"\n".join(GOOD) + b"\n")
    if defect == "BOM in the middle" and place == 0:
        assert read(path)[1] == []  # at the start of a file it is an ordinary BOM
        return
    texts, bad = read(path)
    assert texts == read(clean)[0] == ["one", "two \u2028 \u2028 lines", "three"]
    assert len(bad) == 1
    assert str(bad[0]).startswith(f"{path}:{place + 1}") and bad[0].reason


@pytest.mark.parametrize("indent", ["\n  ", " "], ids=["a row a line", "one line"])
@pytest.mark.parametrize("place", [0, 1, 3], ids=["first", "middle", "last"])
@pytest.mark.parametrize("defect", DEFECTS)
def test_defect_in_an_array_costs_its_own_row(tmp_path: Path, defect: str, place: int, indent: str) -> None:
    rows = GOOD[:place] + [DEFECTS[defect]] + GOOD[place:]
    path = write(tmp_path / "rows.json", b"[" + b",".join(indent.encode() + row for row in rows) + b"]")
    texts, bad = read(path)
    if defect == "cut short":  # the open string swallows what follows up to the next quote
        assert set(texts) <= {"one", "two \u2028 \u2028 lines", "three"} and len(texts) >= 2
    else:
        assert texts == ["one", "two \u2028 \u2028 lines", "three"]
    assert bad and all(row.path == str(path) and row.reason for row in bad)
    if "\n" in indent:
        assert bad[0].where.partition(":")[0] == str(place + 2)


@pytest.mark.parametrize("seed", range(30))
def test_array_read_in_small_blocks_equals_json(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_engine.prepare import json_values

    monkeypatch.setattr(json_values, "BLOCK", 1 + seed)
    generator = random.Random(seed)
    alphabet = 'ab"\\{}[],: \n\té日😀\u2028'
    texts = ["".join(generator.choices(alphabet, k=generator.randrange(1, 60))) for _ in range(20)]
    rows = [{"text": text, "meta": [{"a": 1}, {"b": [text]}]} for text in texts]
    content = json.dumps(rows, ensure_ascii=bool(seed % 2), indent=seed % 3 or None)
    assert read(write(tmp_path / "rows.json", content.encode())) == (texts, [])


def test_array_names_line_and_column(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.json", b'[\n{"text": "a"},\n  {"text": oops},\n{"text": "b"}]')
    texts, bad = read(path)
    assert texts == ["a", "b"] and str(bad[0]).startswith(f"{path}:3:12: not JSON")
    assert "ends inside" in read(write(tmp_path / "cut.json", b'[{"text": "a"},'))[1][0].reason
    assert "after the end" in read(write(tmp_path / "more.json", b'[{"text": "a"}] x'))[1][0].reason


def test_json_files_that_are_no_arrays(tmp_path: Path) -> None:
    lines = write(tmp_path / "lines.json", b'{"text": "a"}\n{"text": "b"}')
    keyed = write(tmp_path / "keyed.json", b'{"7": {"text": "a"},\n "8": {"text": 2}}')
    single = write(tmp_path / "single.json", b'{\n"text": "a"\n}')
    assert read(lines) == (["a", "b"], [])
    texts, bad = read(keyed)
    assert texts == ["a"] and bad[0].where == "key '8'"
    assert read(single) == (["a"], [])
    assert "not JSON" in read(write(tmp_path / "broken.json", b'{"text": \n'))[1][0].reason


def test_only_newline_ends_a_row(tmp_path: Path) -> None:
    text = "a\u2028b\u2029c\u0085d\x1ce\x0bf\x0cg"
    path = write(tmp_path / "rows.jsonl", json.dumps({"text": text}, ensure_ascii=False).encode())
    assert read(path) == ([text], [])
    assert read(write(tmp_path / "a.txt", text.encode()), per="line") == ([text], [])


def test_plain_text_drops_bom_and_carriage_returns(tmp_path: Path) -> None:
    content = "\ufefffirst\r\nsecond \ufeff\r\n\r\nlast\rstill".encode()
    assert read(write(tmp_path / "a.txt", content)) == (["first\nsecond \ufeff\n\nlast\rstill"], [])
    assert read(write(tmp_path / "a.md", content), per="line")[0] == ["first", "second \ufeff", "last\rstill"]
    rows = b'\xef\xbb\xbf{"text": "a\\r\\nb"}\r\n\r\n{"text": "c"}\r\n'
    assert read(write(tmp_path / "a.jsonl", rows)) == (["a\r\nb", "c"], [])


def test_text_that_is_not_utf8_is_named_by_line_and_byte(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"ab\ncd n\xe9e\n")
    (row,) = read(path)[1]
    assert str(row).startswith(f"{path}:2:5: byte 0xE9 is not UTF-8") and "iconv" in row.reason
    assert "UTF-16" in read(write(tmp_path / "b.txt", "abc".encode("utf-16")))[1][0].reason
    assert "NUL" in read(write(tmp_path / "c.txt", b"ab\0c"))[1][0].reason


def test_long_text_is_cut_at_line_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "MAX_TEXT", 64)
    text = "".join(f"line {i} é日😀\n" for i in range(50))
    texts, bad = read(write(tmp_path / "a.txt.gz", text.encode()))
    assert "".join(texts) == text and not bad
    assert len(texts) > 5 and all(part.endswith("\n") and len(part.encode()) <= 64 for part in texts)
    unbroken = "é日😀" * 100
    texts, bad = read(write(tmp_path / "b.txt", unbroken.encode()))
    assert "".join(texts) == unbroken and not bad


def test_long_row_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "MAX_ROW", 4 << 20)
    long = b'{"text": "' + b"x" * (10 << 20) + b'"}'
    for place in range(3):
        rows = [b'{"text": "a"}', b'{"text": "b"}']
        rows.insert(place, long)
        for name, content in ("rows.jsonl", b"\n".join(rows)), ("rows.json", b"[" + b",".join(rows) + b"]"):
            texts, bad = read(write(tmp_path / name, content))
            assert texts == ["a", "b"] and len(bad) == 1 and "longer than" in bad[0].reason, name


def test_damaged_gzip_keeps_the_rows_before(tmp_path: Path) -> None:
    generator = random.Random(0)
    rows = [json.dumps({"text": f"{i} {generator.random()}"}) for i in range(5000)]
    whole = gzip.compress("\n".join(rows).encode())
    for name, content in ("cut.jsonl.gz", whole[: len(whole) // 2]), ("bad.jsonl.gz", whole[:50_000] + b"\0" * 99):
        path = tmp_path / name
        path.write_bytes(content)
        texts, bad = read(path)
        assert [json.loads(row)["text"] for row in rows[:1000]] == texts[:1000]
        assert "damaged" in bad[-1].reason and int(bad[-1].where) > len(texts)
    for name in ("a.jsonl.gz", "a.json.gz", "a.txt.gz"):
        (tmp_path / name).write_bytes(b"not gzip")
        assert "not a gzip" in str(read(tmp_path / name)[1][0]).lower()


@pytest.mark.parametrize("seed", range(200))
def test_random_bytes_never_crash(tmp_path: Path, seed: int) -> None:
    generator = random.Random(seed)
    parts = [
        b'{"text": "',
        b'"}',
        b"\n",
        b"[",
        b"]",
        b",",
        b"\xff",
        b"\xed\xa0\x80",
        b"\0",
        b"\\u",
        b"\xef\xbb\xbf",
        b"a",
    ]
    content = b"".join(generator.choices(parts, k=generator.randrange(40)))
    for name in ("a.txt", "a.jsonl", "a.json", "a.jsonl.gz"):
        texts, _ = read(write(tmp_path / name, content))
        assert all("\0" not in text and text.encode() for text in texts if text)
    for name in ("b.json.gz", "b.parquet"):
        (tmp_path / name).write_bytes(content)
        assert read(tmp_path / name)[0] == []


def test_text_key(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b'{"question": "q", "text": "t", "content": "c"}')
    assert read(path)[0] == ["t"]
    assert read(path, "question")[0] == ["q"]
    (row,) = read(path, "answer")[1]
    assert "question, text, content" in row.reason and "--text-key" in row.reason


def test_parquet(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    texts = [f"text {i}" for i in range(600)]
    values = [*texts[:300], None, *texts[300:]]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"id": range(601), "content": values}), path, row_group_size=100)
    found, bad = read(path)
    assert found == texts and [row.where for row in bad] == ["row 301"] and "null" in bad[0].reason
    assert "no text field" in read(path, "body")[1][0].reason
    pq.write_table(pa.table({"text": [1, 2]}), path)
    assert len(read(path)[1]) == 2
    path.write_bytes(path.read_bytes()[:-9])
    assert "not a readable Parquet file" in read(path)[1][0].reason


def test_list_files_is_sorted_and_complete(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.jsonl", "a/b.md", ".hidden/x.txt", "a/.x.txt", "c.tex", "a.json.gz", "A.TXT"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    names = [file.relative_to(tmp_path).as_posix() for file in list_files([tmp_path, tmp_path / "b.txt"]).files]
    assert names == ["A.TXT", "a.json.gz", "b.txt", "a/b.md", "a/z.jsonl"]
    assert list_files([tmp_path / "c.tex"]).files == [tmp_path / "c.tex"]
    assert read(tmp_path / "c.tex")[0] == ["x"]
    with pytest.raises(ConfigError, match="no such file"):
        list_files([tmp_path / "missing.txt"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no file to read.*\.jsonl"):
        list_files([tmp_path / "empty"])
    with pytest.raises(ConfigError, match="gzip"):
        (tmp_path / "a.xz").write_text("x")
        list_files([tmp_path / "a.xz"])


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero"), lambda p: p.symlink_to("no")])
def test_what_is_no_file_in_a_folder_is_named(tmp_path: Path, make: Callable[[Path], object]) -> None:
    (tmp_path / "b.txt").write_text("x")
    make(tmp_path / "a.txt")
    with pytest.raises(DataError, match=r"a\.txt: a pipe, a device or a link to nothing"):
        list_files([tmp_path])


@needs_shared
def test_shared_oddities() -> None:
    text = SHARED / "text"
    (latin,) = read(text / "books/sherlock_holmes_1661-8.txt")[1]
    content = (text / "books/sherlock_holmes_1661-8.txt").read_bytes()
    line, column = content[:47_068].count(b"\n") + 1, 47_068 - content.rfind(b"\n", 0, 47_068)
    assert latin.where == f"{line}:{column}" and content[47_067:47_070] == b"n\xe9e"
    pride, bad = read(text / "books/pride_and_prejudice_1342-0.txt")
    assert not bad and not pride[0].startswith("\ufeff") and "\r" not in pride[0]
    questions, bad = read(SHARED / "gsm8k/train.jsonl", "question")
    answers, _ = read(SHARED / "gsm8k/train.jsonl", "answer")
    assert len(questions) == 7000 and not bad and any("\u2028" in row for row in questions + answers)
    code, bad = read(text / "code_github/sample_github1.jsonl")
    assert len(code) == 100 and not bad and max(map(len, code)) == 596_507
    assert len(read(text / "web_c4/c4-train-00000-of-01637.parquet")[0]) == 200
    assert len(read(text / "web_ja_mc4/ja_mc4_texts.txt", per="line")[0]) == 110
    assert len(read(SHARED / "math_qa/aqua_dev.json", "rationale")[0]) == 254
    assert len(read(SHARED / "pubmedqa/ori_pqal.json", "LONG_ANSWER")[0]) == 800
    assert len(read(SHARED / "math_qa/mathqa.jsonl", "question")[0]) == 400
    assert len(read(SHARED / "preference/hh_harmless_base_test.jsonl.gz", "chosen")[0]) == 1812


JSON_ROWS = [path for path in sorted(SHARED.glob("*/*.json")) if path.parent.name not in ("configs_hf", "math_qa")]


@needs_shared
@pytest.mark.parametrize("path", JSON_ROWS, ids=lambda path: path.stem)
def test_shared_json_rows_equal_a_plain_load(path: Path) -> None:
    rows = json.loads(path.read_bytes())
    rows = list(rows.values()) if isinstance(rows, dict) else rows
    key = next((key for key in rows[0] if all(isinstance(row[key], str) for row in rows)), None)
    texts, bad = read(path, key)
    assert len(texts) + len(bad) == len(rows)
    assert key is None or texts == [row[key] for row in rows]
