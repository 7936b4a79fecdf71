"""Data and weights of one run have one tokenizer, or the run is refused before it starts."""

import json
from pathlib import Path
from typing import Any

import pytest

from moe_engine.checkpoint.manifest import write_manifest
from moe_engine.config import Run
from moe_engine.config.command_line import load_run
from moe_engine.errors import ConfigError
from moe_engine.plan.tokenizers import check_tokenizers, of_weights
from moe_engine.prepare.pipeline import PrepareOptions, prepare
from moe_engine.prepare.tokenizer import byte_files
from moe_engine.prepare.tokenizer.load import load_tokenizer


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data/bytes and data/words, prepared, and words/ and bytes/, folders with the tokenizer of some weights."""
    home = tmp_path_factory.mktemp("home")
    (home / "a.txt").write_text("a b b a " * 50)
    for name in ("words", "bytes"):
        (home / name).mkdir()
    words = {"type": "WordLevel", "vocab": {"a": 0, "b": 1, "<s>": 2, "</s>": 3}, "unk_token": "a"}
    split = {"type": "Whitespace"}
    tokenizer = {"version": "1.0", "added_tokens": [], "pre_tokenizer": split, "model": words}
    (home / "words" / "tokenizer.json").write_text(json.dumps(tokenizer))
    (home / "words" / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "bos_token": "<s>"}))
    for name, content in byte_files.files().items():
        (home / "bytes" / name).write_bytes(content)
    make(home, "bytes", None)
    make(home, "words", home / "words")
    make(home, "words-bos", home / "words", add_bos=True)
    return home


def make(home: Path, name: str, tokenizer: Path | None, **options: Any) -> None:
    spec = str(tokenizer) if tokenizer else None
    prepare({"a": [home / "a.txt"]}, home / "data" / name, spec, PrepareOptions(**options), quiet=True)


def run_on(*arguments: str | Path, init_from: Path | None = None) -> Run:
    run = load_run([*map(str, arguments)], None)
    start = str(init_from) if init_from else None
    return run.model_copy(update={"train": run.train.model_copy(update={"init_from": start})})


def test_case_04a_data_of_another_tokenizer_than_the_weights_is_refused(home: Path) -> None:
    bytes_, words = home / "data" / "bytes", home / "data" / "words"
    check_tokenizers(run_on("--data", words, init_from=home / "words"), None)
    check_tokenizers(run_on("--data", bytes_, init_from=home / "bytes"), None)
    check_tokenizers(run_on("--data", words, init_from=home), None)  # no tokenizer lies there
    named = rf"--data {bytes_} is text as bytes \(fingerprint .*end of text <\|endoftext\|> = 256\), the weights of "
    named += rf"{home / 'words'} know the tokens of {home / 'words'} \(.*--tokenizer {home / 'words'}, or insist with"
    run = run_on("--data", bytes_, init_from=home / "words")
    with pytest.raises(ConfigError, match=named):
        check_tokenizers(run, None)
    insisted = run.model_copy(update={"data": run.data.model_copy(update={"allow_other_tokenizer": True})})
    check_tokenizers(insisted, None)


def test_case_04a_the_default_corpus_is_bytes_unless_a_tokenizer_is_named(home: Path) -> None:
    check_tokenizers(run_on(init_from=home / "bytes"), None)
    check_tokenizers(run_on("--tokenizer", home / "words", init_from=home / "words"), None)
    with pytest.raises(ConfigError, match="the default corpus, Python's own sources, is text as bytes"):
        check_tokenizers(run_on(init_from=home / "words"), None)


def test_case_04a_a_checkpoint_knows_what_it_was_trained_on(home: Path, tmp_path: Path) -> None:
    trained = load_tokenizer(str(home / "words")).described() | {"add_bos": False}
    step = tmp_path / "run" / "checkpoints" / "step-00000002"
    step.mkdir(parents=True)
    write_manifest(step, {"step": 2, "tokenizer": trained, "files": {}})
    check_tokenizers(run_on("--data", home / "data" / "words"), (step, {"tokenizer": trained}))
    check_tokenizers(run_on("--data", home / "data" / "words", init_from=step), None)
    for run, checkpoint in (
        (run_on("--data", home / "data" / "bytes"), (step, {"tokenizer": trained})),
        (run_on("--data", home / "data" / "bytes", init_from=step), None),
    ):
        with pytest.raises(ConfigError, match=rf"the weights of {step} know the tokens of {home / 'words'}"):
            check_tokenizers(run, checkpoint)
    (step / "manifest.json").unlink()
    write_manifest(step, {"step": 2, "files": {}})  # of an earlier version: what its run keeps says it
    assert of_weights(step) is None
    (tmp_path / "run" / "hf").mkdir()
    for path in (home / "words").iterdir():
        (tmp_path / "run" / "hf" / path.name).write_bytes(path.read_bytes())
    assert (of_weights(step) or {})["fingerprint"] == trained["fingerprint"]


def test_case_04a_domains_of_one_run_have_one_tokenizer(home: Path) -> None:
    bytes_, words, begun = (home / "data" / name for name in ("bytes", "words", "words-bos"))
    check_tokenizers(run_on("--data", f"x={words}", "--data", f"y={words}", "--tokenizer", home / "words"), None)
    with pytest.raises(ConfigError, match=rf"--data {words} was prepared with .* and --data {bytes_} with bytes"):
        check_tokenizers(run_on("--data", bytes_, "--data", words), None)
    with pytest.raises(ConfigError, match=rf"--data {words} was prepared with .* and --tokenizer with bytes"):
        check_tokenizers(run_on("--data", words, "--tokenizer", "bytes"), None)
    with pytest.raises(ConfigError, match="one was prepared with --add-bos and one without"):
        check_tokenizers(run_on("--data", words, "--data", begun), None)


def test_case_04a_the_end_of_text_is_part_of_what_a_tokenizer_is(home: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "tokenizer.json").write_bytes((home / "words" / "tokenizer.json").read_bytes())
    (other / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<s>"}))
    with pytest.raises(ConfigError, match=r"end of text </s> = 3\), the weights .* end of text <s> = 2\)"):
        check_tokenizers(run_on("--data", home / "data" / "words", init_from=other), None)
