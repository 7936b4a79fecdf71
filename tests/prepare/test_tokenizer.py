"""Tokenizers: lossless where the format is, special tokens in text stay text, one clear line where nothing loads."""

import base64
import json
import os
import time
from pathlib import Path

import numpy as np
import pytest

from moe_engine.errors import ConfigError
from moe_engine.prepare.tokenizer.load import Tokenizer, load_tokenizer

TOKENIZERS = Path(__file__).parents[2].parent / "shared" / "data" / "tokenizers"
needs_shared = pytest.mark.skipif(not TOKENIZERS.is_dir(), reason="the shared tokenizers are not beside the repository")
TEXTS = [
    "",
    "Hello, world! The 1,234,567 cats' tails\n\n\tdon't  stop.",
    "def f(x):\r\n    return {'a': [x] * 2}  # über\n",
    "日本語 дом 😀👩‍👩‍👧 \u2028\u200b\ufeff e\u0301",
    "<s></s><|endoftext|><|end_of_text|><|begin_of_text|>[PAD]<unk>",
    " leading and trailing \n ",
    "a" * 3000 + " " * 3000 + "\n" * 3000,
]
# name -> (kind, vocabulary, eos, bos, lossless)
SHARED = {
    "mistral_v1/tokenizer.model": ("sentencepiece", 32000, 2, 1, True),
    "llama2": ("sentencepiece", 32000, 2, 1, True),
    "llama3/tokenizer.model": ("tiktoken", 128256, 128001, 128000, True),
    "gpt2": ("hf", 50257, 50256, 50256, True),
    "tiny_hf": ("hf", 2020, 2003, 2002, False),
    "tiny_hf/tokenizer.json": ("hf", 2020, 2003, 2002, False),
    "tiny_sentencepiece/m.model": ("sentencepiece", 2000, 2, 1, False),
    "llama3:tiny_tiktoken": ("tiktoken", 2256, 2001, 2000, True),
}


def shared(name: str) -> str:
    """The spec of a tokenizer in SHARED."""
    family, colon, path = name.rpartition(":")
    return f"{family}{colon}{TOKENIZERS / path}"


def check(tokenizer: Tokenizer, lossless: bool = True) -> None:
    ids = tokenizer.encode(TEXTS)
    for text, array in zip(TEXTS, ids):
        assert array.dtype == np.int32 and array.ndim == 1
        assert array.size == 0 or (array.min() >= 0 and array.max() < tokenizer.vocab_size)
        assert tokenizer.eos_id not in array and tokenizer.bos_id not in array
        if lossless:
            assert tokenizer.decode(array) == text
    assert tokenizer.decode(tokenizer.encode(["plain words"])[0]).replace(" ", "") == "plainwords"
    assert 0 <= tokenizer.eos_id < tokenizer.vocab_size


def test_bytes() -> None:
    tokenizer = load_tokenizer(None)
    check(tokenizer)
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.bos_id) == (257, 256, None)
    assert tokenizer.encode(["é\n"])[0].tolist() == [0xC3, 0xA9, 0x0A]
    assert tokenizer.decode([0xC3, 256, 0x41]) == "\ufffdA"
    assert load_tokenizer("bytes").fingerprint == tokenizer.fingerprint


@needs_shared
@pytest.mark.parametrize("name", SHARED)
def test_shared_tokenizers(name: str) -> None:
    tokenizer = load_tokenizer(shared(name))
    kind, vocab_size, eos_id, bos_id, lossless = SHARED[name]
    assert (tokenizer.kind, tokenizer.vocab_size) == (kind, vocab_size)
    assert tokenizer.eos_id == eos_id and tokenizer.bos_id == bos_id
    check(tokenizer, lossless)


@needs_shared
def test_fingerprint_follows_the_content_not_the_path(tmp_path: Path) -> None:
    content = (TOKENIZERS / "tiny_tiktoken/tiktoken_small.model").read_bytes()
    (tmp_path / "any.name").write_bytes(content)
    here = load_tokenizer(shared("llama3:tiny_tiktoken"))
    assert load_tokenizer(f"llama3:{tmp_path / 'any.name'}").fingerprint == here.fingerprint
    prints = [load_tokenizer(shared(name)).fingerprint for name in SHARED]
    assert len(set(prints)) == len(SHARED) - 1  # tiny_hf is there twice


@needs_shared
@pytest.mark.parametrize("name", ["gpt2", "tiny_hf"])
def test_hugging_face_ids_equal_transformers(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    folder = str(TOKENIZERS / name)
    ours = load_tokenizer(folder)
    kind = transformers.GPT2Tokenizer if name == "gpt2" else transformers.PreTrainedTokenizerFast
    theirs = kind.from_pretrained(folder)
    for text in TEXTS[1:4]:
        assert ours.encode([text])[0].tolist() == theirs(text, add_special_tokens=False)["input_ids"]


@needs_shared
def test_llama3_long_runs_are_cut_and_stay_lossless() -> None:
    tokenizer = load_tokenizer(str(TOKENIZERS / "llama3"))
    for text in ("x" * 60_000, " " * 60_000, "ab " * 150_000, "x" * 25_000 + " y"):
        ids = tokenizer.encode([text])[0]
        assert tokenizer.decode(ids) == text
    whole, cut = "x" * 25_000, "x" * 50_000
    assert tokenizer.encode([cut])[0].tolist() == 2 * tokenizer.encode([whole])[0].tolist()


@needs_shared
def test_llama3_ids_of_the_published_examples() -> None:
    tokenizer = load_tokenizer(str(TOKENIZERS / "llama3"))
    assert tokenizer.encode(["This is a test sentence."])[0].tolist() == [2028, 374, 264, 1296, 11914, 13]


def test_tokens_listed_in_the_config_alone_are_added(tmp_path: Path) -> None:
    make_hf(tmp_path, {"a": 0, "b": 1}, {"eos_token": "<end>", "added_tokens_decoder": {"2": {"content": "<end>"}}})
    tokenizer = load_tokenizer(str(tmp_path))
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (3, 2)
    make_hf(tmp_path, {"a": 0, "b": 1}, {"eos_token": "<end>", "added_tokens_decoder": {"7": {"content": "<end>"}}})
    with pytest.raises(ConfigError, match="id 2 in the vocabulary and 7"):
        load_tokenizer(str(tmp_path))


def test_end_of_text_is_found_or_asked_for(tmp_path: Path) -> None:
    vocabulary = {"a": 0, "</s>": 1, "<x>": 2}
    make_hf(tmp_path, vocabulary, {})
    assert load_tokenizer(str(tmp_path)).eos_id == 1
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": [2, 1]}))
    assert load_tokenizer(str(tmp_path)).eos_id == 2
    make_hf(tmp_path, vocabulary, {"eos_token": {"content": "<x>"}})
    assert load_tokenizer(str(tmp_path)).eos_id == 2
    (tmp_path / "config.json").unlink()
    assert load_tokenizer(str(tmp_path)).eos_id == 2
    make_hf(tmp_path, {"a": 0, "b": 1}, {})
    with pytest.raises(ConfigError, match="no end-of-text token"):
        load_tokenizer(str(tmp_path))


def make_hf(folder: Path, vocabulary: dict[str, int], config: dict) -> None:
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "a"}
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


BROKEN = {
    "empty.model": b"",
    "garbage.model": b"\x0a\x05garbage, not a protocol buffer",
    "text.model": b"these are words\n",
    "other.json": b'{"some": "json"}',
    "cut.json": b'{"model": {',
    "gap.model": b"".join(base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(200) if i != 7),
    "cut.model": b"".join(base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(200)) + b"QU",
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_file_is_one_clear_error(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(BROKEN[name])
    begun = time.monotonic()
    with pytest.raises(ConfigError, match=name):
        load_tokenizer(str(tmp_path / name))
    assert time.monotonic() - begun < 2


def test_a_pipe_in_a_folder_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "t.model")
    with pytest.raises(ConfigError, match=r"t\.model is empty, or no regular file"):
        load_tokenizer(str(tmp_path))
    make_hf(tmp_path, {"a": 0, "<end>": 1}, {"eos_token": "<end>"})
    (tmp_path / "special_tokens_map.json").unlink(missing_ok=True)
    os.mkfifo(tmp_path / "special_tokens_map.json")
    assert load_tokenizer(str(tmp_path)).eos_id == 1


def test_missing_tokenizer_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError,
        match=r"missing: no such file or folder, and nothing is downloaded; expected bytes \| SentencePiece",
    ):
        load_tokenizer(str(tmp_path / "missing"))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"holds tokenizer_config.json; expected tokenizer.json"):
        load_tokenizer(str(tmp_path))
