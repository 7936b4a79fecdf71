"""Samples of every format: what a row means, what is left out and why, what is refused and where."""

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from moe_engine.errors import ConfigError, DataError
from moe_engine.prepare.formats import BadRow
from moe_engine.prepare.sample_formats import Sample
from moe_engine.prepare.samples import Samples, read_samples

SHARED = Path(__file__).parents[2].parent / "shared" / "data"


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def read(tmp_path: Path, rows: list[Any], **options: Any) -> tuple[Samples, list[Sample], list[BadRow]]:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    samples = read_samples([path], **options)
    found = list(samples)
    kept = [s for s in found if isinstance(s, Sample)]
    return samples, kept, [s for s in found if isinstance(s, BadRow)]


TURNS = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
READ = [
    ("alpaca", {"instruction": "I", "input": "", "output": "O"}, [user("I"), assistant("O")]),
    ("alpaca", {"instruction": "I", "input": "x", "response": "O"}, [user("I\n\nInput: x"), assistant("O")]),
    (
        "alpaca",
        {"instruction": "I", "output": "O", "system": "S", "history": [["a", "b"]]},
        [system("S"), user("a"), assistant("b"), user("I"), assistant("O")],
    ),
    ("sharegpt", {"conversations": TURNS, "system": "S"}, [system("S"), user("Q"), assistant("A")]),
    ("sharegpt", {"conversations": [*TURNS, {"from": "human", "value": "unanswered"}]}, [user("Q"), assistant("A")]),
    ("messages", {"messages": [user("Q"), assistant("A")]}, [user("Q"), assistant("A")]),
    ("question-answer", {"question": "Q", "answer": ["a", "b"]}, [user("Q"), assistant("a, b")]),
    ("question-answer", {"question": "Q", "answer": {"text": "t"}}, [user("Q"), assistant("t")]),
    ("question-answer", {"question": "Q", "answer": 1, "choices": ["x", "y"]}, [user("Q"), assistant("y")]),
    ("question-answer", {"question": "Q", "answer": "2 + 2 = 4\n#### 4"}, [user("Q"), assistant("2 + 2 = 4\n#### 4")]),
    ("prompt-completion", {"prompt": "P", "completion": "C"}, [user("P"), assistant("C")]),
    (
        "prompt-completion",
        {"prompt": [system("S"), user("P")], "response": [assistant("C")]},
        [system("S"), user("P"), assistant("C")],
    ),
]


@pytest.mark.parametrize(("name", "row", "messages"), READ, ids=[f"{i}-{row[0]}" for i, row in enumerate(READ)])
def test_a_row_of_each_format(tmp_path: Path, name: str, row: Any, messages: list[Any]) -> None:
    samples, (sample,), bad = read(tmp_path, [row])
    assert samples.format == name and sample.messages == messages and not bad and sample.rejected is None
    assert sample.where.endswith("rows.jsonl:1")


PAIRS = [
    ("preference", {"prompt": "P", "chosen": "C", "rejected": "R"}, 1),
    ("preference", {"prompt": [user("P")], "chosen": [assistant("C")], "rejected": [assistant("R")]}, 1),
    (
        "preference-sharegpt",
        {
            "conversations": [{"from": "human", "value": "P"}],
            "chosen": {"from": "gpt", "value": "C"},
            "rejected": {"from": "gpt", "value": "R"},
        },
        1,
    ),
    (
        "preference-orca",
        {
            "input": {"messages": [user("P")]},
            "preferred_output": [assistant("C")],
            "non_preferred_output": [assistant("R")],
        },
        1,
    ),
    ("preference-hh", {"chosen": "\n\nHuman: P\n\nAssistant: C", "rejected": "\n\nHuman: P\n\nAssistant: R"}, 1),
]


@pytest.mark.parametrize(("name", "row", "shared"), PAIRS, ids=[f"{i}-{row[0]}" for i, row in enumerate(PAIRS)])
def test_a_pair_of_each_format(tmp_path: Path, name: str, row: Any, shared: int) -> None:
    samples, (sample,), _ = read(tmp_path, [row])
    assert samples.format == name and sample.messages == [user("P"), assistant("C")]
    assert sample.rejected == [assistant("R")] and sample.shared == shared


def test_transcripts_share_as_many_turns_as_are_equal(tmp_path: Path) -> None:
    begin = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c"
    _, (sample,), _ = read(
        tmp_path, [{"chosen": f"{begin}\n\nAssistant: d", "rejected": f"{begin}\n\nAssistant: e\n\nHuman: f"}]
    )
    assert sample.shared == 3 and sample.messages[3:] == [assistant("d")] and sample.rejected == [assistant("e")]


def test_tools_and_calls(tmp_path: Path) -> None:
    call = {"name": "look", "arguments": {"id": 1}}
    turns = [
        {"from": "human", "value": "Q"},
        {"from": "function_call", "value": json.dumps(call)},
        {"from": "observation", "value": "found"},
        {"from": "gpt", "value": "A"},
    ]
    _, (sample,), _ = read(tmp_path, [{"conversations": turns, "tools": json.dumps([{"name": "look"}])}])
    assert sample.tools == [{"name": "look"}]
    assert sample.messages[1] == {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": call}],
    }
    assert sample.messages[2] == {"role": "tool", "content": "found"}


def test_every_row_counts_once(tmp_path: Path) -> None:
    rows = [
        {"instruction": "I", "output": "O"},
        {"instruction": "I", "output": " "},
        {"instruction": "", "output": "O"},
        {"instruction": 3, "output": "O"},
        {"text": "another format"},
        ["no object"],
        {"instruction": "\ud800", "output": "O"},
        {"instruction": "a\0b", "output": "O"},
    ]
    samples, kept, bad = read(tmp_path, rows, format="alpaca")
    assert samples.counts == {"read": 8, "kept": 1, "bad": 5}
    assert samples.left_out == {"empty response": 1, "empty instruction": 1}
    assert len(kept) == 1 and [row.where for row in bad] == ["4", "5", "6", "7", "8"]
    assert (
        "is int; expected a string" in bad[0].reason and "alpaca needs instruction, output or response" in bad[1].reason
    )


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"conversations": [{"from": "human", "value": "Q"}]}, "no assistant turn"),
        ({"conversations": [{"from": "gpt", "value": "A"}]}, "no user turn"),
        ({"messages": [user("Q"), assistant("A")], "label": False}, "labelled false"),
        ({"prompt": "P", "chosen": "same", "rejected": "same"}, "chosen and rejected are the same"),
        ({"prompt": "P", "chosen": "C", "rejected": ""}, "empty rejected"),
    ],
)
def test_left_out_with_a_reason(tmp_path: Path, row: Any, reason: str) -> None:
    samples, kept, bad = read(tmp_path, [row])
    assert not kept and not bad and samples.left_out == {reason: 1}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"conversations": "text"}, "field 'conversations' is str; expected a list of turns"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, "role 'alien'; expected system"),
        ({"conversations": [{"from": "function_call", "value": "no JSON"}]}, "a function_call that is no JSON"),
        ({"messages": [{"role": "user", "content": 3}]}, "content is int; expected a string"),
        ({"question": "Q", "answer": {"no": "text"}}, "field 'answer' is NoneType"),
        ({"prompt": "P", "chosen": "C", "rejected": 4}, "field 'rejected' is int; expected a list of turns"),
        ({"chosen": "no transcript", "rejected": "either"}, "no transcript of Human: and Assistant: turns"),
    ],
)
def test_malformed_rows_say_what_was_expected(tmp_path: Path, row: Any, reason: str) -> None:
    _, kept, (bad,) = read(tmp_path, [row])
    assert not kept and reason in bad.reason and bad.where == "1"


def message(name: str, parent: str | None, role: str, **more: Any) -> dict[str, Any]:
    return {"message_id": name, "parent_id": parent, "message_tree_id": "t", "role": role, "text": name, **more}


OASST = [
    message("a0", None, "prompter"),
    message("a2", "a0", "assistant", rank=1),
    message("a1", "a0", "assistant", rank=0),
    message("a3", "a1", "prompter", rank=None),
    message("a5", "a3", "assistant", rank=0, deleted=True),
    message("a4", "a3", "assistant"),
    message("a6", "a2", "prompter"),
    message("b0", None, "prompter", review_result=False),
    message("b1", "b0", "assistant"),
    message("c0", None, "prompter"),
]


def test_oasst_trees_give_the_path_of_the_best_replies(tmp_path: Path) -> None:
    """S0.19: rows that a `messages` list is looked for in give nothing."""
    samples, (sample,), bad = read(tmp_path, OASST)
    assert samples.format == "oasst" and not bad
    assert sample.messages == [user("a0"), assistant("a1"), user("a3"), assistant("a4")]
    assert samples.counts == {"read": 10, "kept": 4, "bad": 0}
    assert samples.left_out == {
        "deleted": 1, "failed review": 1, "another reply is better": 2, "its parent is not there": 1,
        "no assistant turn": 1,
    }  # fmt: skip


def test_nested_oasst_trees(tmp_path: Path) -> None:
    def node(name: str, role: str, *replies: Any, **more: Any) -> dict[str, Any]:
        return {"text": name, "role": role, "replies": list(replies), **more}

    answer = node("a1", "assistant", node("a2", "prompter", node("a3", "assistant")), rank=0)
    root = node("a0", "prompter", node("worse", "assistant", rank=1), answer)
    rows = [{"message_tree_id": "t", "prompt": root}, {"message_tree_id": "u", "prompt": node("x", "prompter")}]
    samples, (sample,), _ = read(tmp_path, rows)
    assert samples.format == "oasst-tree" and samples.left_out == {"no assistant turn": 1}
    assert sample.messages == [user("a0"), assistant("a1"), user("a2"), assistant("a3")]


def test_columns_and_labels(tmp_path: Path) -> None:
    rows = [{"ask": "Q", "reply": "A", "kind": "maths"}, {"ask": "Q", "reply": "B", "kind": None}]
    columns = {"prompt": "ask", "response": "reply", "label": "kind"}
    samples, kept, _ = read(tmp_path, rows, columns=columns)
    assert samples.format == "prompt-completion" and [s.label for s in kept] == ["maths", None]
    with pytest.raises(ConfigError, match=r"not recognised from its columns ask, reply, kind.*--columns"):
        read(tmp_path, rows)
    with pytest.raises(ConfigError, match=r"--format alpacca: expected one of .*did you mean alpaca"):
        read(tmp_path, rows, format="alpacca")


def test_files_of_every_kind(tmp_path: Path) -> None:
    rows = [{"question": str(i), "answer": str(i)} for i in range(40)]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.json").write_text(json.dumps(rows))
    (tmp_path / "in" / "b.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "in" / "c.parquet")
    samples = read_samples([tmp_path / "in"])
    assert Counter(s.messages[1]["content"] for s in samples if isinstance(s, Sample)) == {str(i): 3 for i in range(40)}
    from datasets import Dataset, DatasetDict

    DatasetDict(train=Dataset.from_list(rows[:7]), test=Dataset.from_list(rows[:3])).save_to_disk(str(tmp_path / "ds"))
    assert len(list(read_samples([tmp_path / "ds"]))) == 7 and len(list(read_samples([f"{tmp_path / 'ds'}:test"]))) == 3
    with pytest.raises(ConfigError, match="has no split dev; choose one of train, test"):
        list(read_samples([f"{tmp_path / 'ds'}:dev"]))


def test_an_empty_source(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match="no row in it"):
        read_samples([tmp_path / "a.jsonl"])


REAL = {
    "alpaca/alpaca_5000.json": ("alpaca", 4000, 3998),
    "alpaca/alpaca_zh_demo.json": ("alpaca", 600, 600),
    "code_alpaca/code_alpaca_2k.json": ("alpaca", 2017, 2015),
    "code_alpaca/gpteacher_codegen.other_languages.json": ("alpaca", 900, 900),
    "conversations/glaive_toolcall_en_demo.json": ("sharegpt", 240, 240),
    "conversations/sharegpt_original_example.json": ("sharegpt", 5, 5),
    "conversations/oasst1_en_validation.jsonl": ("oasst", 1624, 148),
    "conversations/oasst_en_100_tree.jsonl": ("oasst-tree", 80, 80),
    "gsm8k/train.jsonl": ("question-answer", 7000, 7000),
    "gsm8k/chat_messages_train.jsonl": ("messages", 449, 449),
    "nq_open/NQ-open.dev.jsonl": ("question-answer", 3010, 3010),
    "preference/maxtext_dpo_3_column_dataset.json": ("preference", 22, 22),
    "preference/orca_dpo_validation.jsonl": ("preference-orca", 200, 200),
    "preference/hh_harmless_base_test.jsonl.gz": ("preference-hh", 1812, 1811),
    "preference/dpo_en_demo.json": ("preference-sharegpt", 239, 239),
    "preference/kto_en_demo.json": ("messages", 200, 107),
}


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data files are not beside the repository")
@pytest.mark.parametrize("name", REAL)
def test_real_files(name: str) -> None:
    kind, asked, valid = REAL[name]
    samples = read_samples([SHARED / name])
    found = list(samples)
    assert samples.format == kind and samples.counts["read"] == asked and samples.counts["bad"] == 0
    assert len(found) == valid and all(s.messages[-1]["role"] == "assistant" for s in found if isinstance(s, Sample))
