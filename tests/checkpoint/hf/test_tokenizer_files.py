"""What an export says of its tokenizer: the ends of a text as training placed them, and nothing else changed."""

import json
from pathlib import Path

import pytest

from moe_engine.checkpoint.hf.contents import contents_of
from moe_engine.checkpoint.hf.side_files import keep_for_run
from moe_engine.checkpoint.hf.tokenizer_files import as_trained, with_tokenizer
from moe_engine.prepare.tokenizer import byte_files

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
SAID = {"fingerprint": "", "spec": "x", "eos_id": 256, "eos_token": "<|endoftext|>", "pad_id": None}


def with_bos() -> dict[str, bytes]:
    """A bytes tokenizer whose tokenizer.json puts a begin of text before each text."""
    model = tokenizers.Tokenizer.from_str(byte_files.files()["tokenizer.json"].decode())
    model.add_special_tokens(["<s>"])
    model.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 257)])
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "bos_token": "<s>"}
    return {"tokenizer.json": model.to_str().encode(), "tokenizer_config.json": json.dumps(config).encode()}


@pytest.mark.parametrize("add_bos", [False, True])
@pytest.mark.parametrize("said", [None, False, True])
def test_case_06_a_reader_begins_a_text_as_training_did(tmp_path: Path, add_bos: bool, said: bool | None) -> None:
    side = with_bos()
    if said is not None:
        config = json.loads(side["tokenizer_config.json"]) | {"add_bos_token": said, "add_eos_token": True}
        side["tokenizer_config.json"] = json.dumps(config).encode()
    for name, content in as_trained(side, SAID | {"bos_id": 257, "add_bos": add_bos}, 300).items():
        (tmp_path / name).write_bytes(content)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs("text")["input_ids"] == [257] * add_bos + list(b"text")
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert (settings["add_bos_token"], settings["add_eos_token"]) == (add_bos, False)


def test_case_06_what_was_only_imported_stays_byte_for_byte() -> None:
    side = with_bos() | {"config.json": b'{"eos_token_id":  2}'}
    assert as_trained(side, None, 300) == side


def test_case_06_what_says_so_already_stays_byte_for_byte() -> None:
    trained = SAID | {"bos_id": 257, "add_bos": True}
    side = with_bos() | {
        "tokenizer_config.json": b'{"add_eos_token":false,  "add_bos_token":true}',
        "config.json": b'{"eos_token_id":  [3, 256]}',
        "generation_config.json": b'{"eos_token_id":  256, "top_p": 0.9}',
    }
    assert as_trained(side, trained, 300) == side
    wrong = side | {"generation_config.json": b'{"eos_token_id":  2, "top_p": 0.9}'}
    ids = {"eos_token_id": 256, "bos_token_id": 257, "top_p": 0.9}
    assert json.loads(as_trained(wrong, trained, 300)["generation_config.json"]) == ids


def test_case_06_a_side_file_that_is_no_json_stays_as_it_is() -> None:
    side = with_bos() | {"generation_config.json": b"{cut", "config.json": b"[]"}
    out = as_trained(side, SAID | {"bos_id": 257, "add_bos": False}, 300)
    assert (out["generation_config.json"], out["config.json"]) == (b"{cut", b"[]")


def test_case_11_ids_that_the_model_has_are_written() -> None:
    said = SAID | {"bos_id": 257, "pad_id": 258, "add_bos": False}
    ids = {"eos_token_id": 256, "bos_token_id": 257, "pad_token_id": 258}
    assert json.loads(as_trained({}, said, 300)["config.json"]) == ids
    ids.pop("pad_token_id")
    assert json.loads(as_trained({}, said, 258)["config.json"]) == ids  # it lies past the vocabulary
    assert "tokenizer_config.json" not in as_trained({}, said, 300)  # without a tokenizer


def test_case_11_the_tokenizer_of_the_data_goes_along_where_the_weights_have_none(tmp_path: Path) -> None:
    folder = tmp_path / "data" / "tokenizer"
    folder.mkdir(parents=True)
    for name, content in byte_files.files().items():
        (folder / name).write_bytes(content)
    keep_for_run(None, tmp_path / "run", folder)
    assert contents_of(tmp_path / "run" / "hf").side == byte_files.files()
    assert with_tokenizer({"config.json": b"{}"}, folder, instead=False).keys() == {
        *("config.json", "tokenizer.json", "tokenizer_config.json")
    }
    theirs = {"tokenizer.model": b"m", "special_tokens_map.json": b"{}", "LICENSE": b"l"}
    assert with_tokenizer(theirs, folder, instead=False) == theirs
    assert with_tokenizer(theirs, folder, instead=True) == {"LICENSE": b"l"} | byte_files.files()
    assert with_tokenizer(theirs, tmp_path / "none", instead=True) == theirs
