"""Samples as shards: the same for any number of workers, capped and split exactly, nothing lost without a count."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_engine.data.loader import Loader, open_domains
from moe_engine.data.shards import TokenDataset
from moe_engine.errors import ConfigError, DataError
from moe_engine.prepare.run_samples import mixture_lines
from moe_engine.prepare.sample_shards import SampleOptions, SampleSource, prepare_samples
from moe_engine.prepare.tokenizer.load import load_tokenizer

OPTIONS = SampleOptions(template="instruction")


def rows(path: Path, count: int, **more: Any) -> Path:
    lines = [{"question": f"q{i}", "answer": f"a{i}" if i % 10 else "", **more} for i in range(count)]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def texts(folder: Path, domain: str, split: str) -> list[str]:
    dataset = TokenDataset(folder, domain, split)
    read = [dataset.read(i, 0, int(dataset.lengths[i])) for i in range(len(dataset))]
    return [bytes(int(t) for t in tokens if t < 256).decode() for tokens in read]


@pytest.mark.parametrize(("count", "held"), [(1, 0), (2, 1), (20, 1), (21, 2), (101, 6)])
def test_the_split_is_exact(tmp_path: Path, count: int, held: int) -> None:
    """S0.24: ceil(0.05 * samples); a single sample is trained on."""
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"question": f"q{i}", "answer": f"a{i}"}) for i in range(count)))
    source = {"d": SampleSource((str(path),))}
    prepare_samples(source, tmp_path / "out", "bytes", OPTIONS, quiet=True)
    train, held_out = (texts(tmp_path / "out", "d", split) for split in ("train", "eval"))
    assert len(held_out) == held and len({*train, *held_out}) == count == len(train) + held
    assert train == sorted(train, key=lambda t: int(t[t.index("q") + 1 : t.index("\n\n###")]))  # the order of the file


def test_the_whole_of_s0() -> None:
    """S0.23 and S0.24: 37,473 samples of four sources hold out 1,874."""
    sizes = (15_000, 10_000, 7_473, 5_000)
    assert sum(math.ceil(0.05 * n) for n in sizes) == 1_874 and sum(sizes) - 1_874 == 35_599


def test_caps_counts_and_what_is_said(tmp_path: Path) -> None:
    path = rows(tmp_path / "a.jsonl", 100)
    sources = {"one": SampleSource((str(path),), max_samples=30), "two": SampleSource((str(path),), max_samples=500)}
    manifest = prepare_samples(sources, tmp_path / "out", "bytes", OPTIONS, quiet=True)
    assert [manifest["domains"][name]["valid"] for name in sources] == [30, 90]
    assert manifest["domains"]["two"]["left_out"] == {"empty answer": 10}
    lines = mixture_lines(manifest)
    assert lines[0] == "Loading one (question-answer format, 30 samples)..."
    assert lines[1].startswith("Loaded 30 valid samples from one (left out: 10 empty answer) (tokens: mean ")
    assert lines[4] == "warning: two: 500 samples were asked for and 90 are there"
    assert lines[5:] == [
        "Mixing 2 dataset(s)...",
        "Final mixed dataset: 120 samples",
        "Train samples: 113, eval samples: 7",
    ]
    again = prepare_samples(sources, tmp_path / "out", "bytes", OPTIONS, quiet=True)
    assert again == manifest
    with pytest.raises(ConfigError, match="other files, or with another tokenizer or other options"):
        prepare_samples(sources, tmp_path / "out", "bytes", SampleOptions(template="instruction", seed=1), quiet=True)


def test_workers_do_not_show(tmp_path: Path) -> None:
    path = rows(tmp_path / "a.jsonl", 700)
    found = []
    for workers in (1, 2):
        out = tmp_path / f"out{workers}"
        prepare_samples({"d": SampleSource((str(path),))}, out, "bytes", OPTIONS, workers, quiet=True)
        found.append({file.name: file.read_bytes() for file in sorted(out.glob("d-*"))})
    assert found[0] == found[1] and len(found[0]) == 6


def test_labels_are_columns(tmp_path: Path) -> None:
    lines = [
        {"question": f"q{i}", "answer": "a", "expert_label": label} for i, label in enumerate(["b", "a", None] * 4)
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    source = SampleSource((str(tmp_path / "a.jsonl"),))
    options = SampleOptions(template="instruction", eval_fraction=0.0)
    prepare_samples({"d": source}, tmp_path / "out", "bytes", options, quiet=True)
    dataset = TokenDataset(tmp_path / "out", "d", "train")
    assert dataset.expert_labels == ["a", "b"] and dataset.columns["expert_label"].tolist() == [1, 0, -1] * 4
    loader = Loader(
        open_domains([("d", str(tmp_path / "out"), 1.0)]), seed=0, seq_length=64, micro_batch=4, epochs=True
    )
    (batch,) = loader.next_step()
    assert set(batch.expert_label_BS.unique().tolist()) <= {-1, 0, 1} and loader.expert_labels == ["a", "b"]
    fixed = SampleSource((str(tmp_path / "a.jsonl"),), expert_label="c")
    prepare_samples({"d": fixed}, tmp_path / "out2", "bytes", options, quiet=True)
    assert TokenDataset(tmp_path / "out2", "d", "train").expert_labels == ["a", "b", "c"]


def test_pairs_are_neighbours(tmp_path: Path) -> None:
    lines = [{"prompt": f"p{i}", "chosen": f"c{i}", "rejected": f"r{i}"} for i in range(10)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    source = SampleSource((str(tmp_path / "a.jsonl"),))
    manifest = prepare_samples({"d": source}, tmp_path / "out", "bytes", OPTIONS, quiet=True)
    assert manifest["domains"]["d"]["pairs"] and manifest["domains"]["d"]["splits"]["eval"]["documents"] == 2
    dataset, found = TokenDataset(tmp_path / "out", "d", "train"), texts(tmp_path / "out", "d", "train")
    assert dataset.columns["rejected"].tolist() == [0, 1] * 9
    for chosen, rejected in zip(found[::2], found[1::2]):
        assert chosen.partition("Response:\n")[0] == rejected.partition("Response:\n")[0]
        assert chosen.rpartition("\n")[2][1:] == rejected.rpartition("\n")[2][1:]
    domains = open_domains([("d", str(tmp_path / "out"), 1.0)])
    loader = Loader(domains, seed=0, seq_length=128, micro_batch=9, packing="none", epochs=True)
    (batch,) = loader.next_step()
    trained = {bytes(row[(row >= 0) & (row < 256)].tolist()).decode() for row in batch.labels_BS}
    assert len(trained) == 9 and all(answer.startswith("c") for answer in trained)  # what was rejected is not followed


def test_what_cannot_be_used(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"question": "q", "answer": "a"}\n{"question": 3, "answer": "a"}\n')
    source = {"d": SampleSource((str(path),))}
    with pytest.raises(DataError, match=r"a\.jsonl:2: field 'question' is int; expected a string\. Mend it"):
        prepare_samples(source, tmp_path / "out", "bytes", OPTIONS, quiet=True)
    assert not (tmp_path / "out").exists()
    skipping = SampleOptions(template="instruction", on_bad_row="skip")
    manifest = prepare_samples(source, tmp_path / "out", "bytes", skipping, quiet=True)
    assert manifest["domains"]["d"]["bad_rows"] == 1 and (tmp_path / "out" / "bad_rows.jsonl").is_file()
    masked = SampleOptions(template="instruction", max_length=20, max_prompt=30)  # the template alone is longer
    with pytest.raises(DataError, match=r"domain d: none of 1 rows gives a sample: 1 no token to train within the lim"):
        path.write_text('{"question": "q", "answer": "a"}\n')
        prepare_samples(source, tmp_path / "other", "bytes", masked, quiet=True)
    with pytest.raises(ConfigError, match="max_length 1: expected at least 2"):
        prepare_samples(source, tmp_path / "other", "bytes", SampleOptions(max_length=1))


def test_bos_comes_once(tmp_path: Path) -> None:
    from tests.prepare.test_template import CHATML, LLAMA3, folder

    path = rows(tmp_path / "a.jsonl", 30)
    for name, template in (("without", CHATML), ("with", LLAMA3)):
        tokenizer = folder(tmp_path, template)
        for add_bos in (False, True):
            out = tmp_path / f"{name}-{add_bos}"
            options = SampleOptions(add_bos=add_bos)
            manifest = prepare_samples({"d": SampleSource((str(path),))}, out, tokenizer, options, quiet=True)
            dataset = TokenDataset(out, "d", "train")
            bos = load_tokenizer(tokenizer).bos_id
            count = sum(int((dataset.read(i, 0, int(n)) == bos).sum()) for i, n in enumerate(dataset.lengths))
            begins = name == "with" or add_bos
            assert (count == len(dataset)) == begins and manifest["tokenizer"]["add_bos"] == begins
            assert not begins or not np.any([dataset.trained(i, 1)[0] for i in range(len(dataset))])
