"""Folders whose files say several things of one tokenizer: what transformers makes of it, or a refusal that names both.

The oracle is transformers' own encode; the tokenizers are made here.
"""

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_engine.data.shards import MANIFEST, TokenDataset
from moe_engine.errors import ConfigError
from moe_engine.prepare.pipeline import PrepareOptions, prepare
from moe_engine.prepare.tokenizer.identity import BYTES, PROBE
from moe_engine.prepare.tokenizer.load import load_tokenizer
from moe_engine.prepare.tokenizer.tiktoken import LLAMA3_RANKS, digest_of

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")
TEXT = [*PROBE, "def f(x):\n    return x\n", "in 1984 and 12345, it's so"] * 3
SHARED = Path(__file__).parents[2].parent / "shared" / "data" / "tokenizers"


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """vocab.json and merges.txt of a byte-level BPE that learned runs of blanks and digits; "<end>" is 256."""
    folder = tmp_path_factory.mktemp("bpe")
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<end>", "<|im_end|>", "<|endoftext|>"],
        initial_alphabet=[*BYTES],
        show_progress=False,
    )
    model.train_from_iterator(["12 12 123 123   a   b    return    if x\n"] * 9 + TEXT, trainer)
    model.model.save(str(folder))
    return folder


@pytest.fixture(scope="module")
def spm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece tokenizer.model as Llama 2's was trained."""
    from sentencepiece import SentencePieceTrainer

    folder = tmp_path_factory.mktemp("spm")
    options = {"model_type": "bpe", "vocab_size": 480, "byte_fallback": True, "remove_extra_whitespaces": False}
    options |= {"normalization_rule_name": "identity", "split_digits": True, "minloglevel": 2}
    lines: Iterator[str] = iter(line for text in TEXT * 4 for line in text.split("\n") if line.strip())
    SentencePieceTrainer.train(
        sentence_iterator=lines, model_prefix=str(folder / "tokenizer"), hard_vocab_limit=False, **options
    )
    (folder / "tokenizer.vocab").unlink()
    return folder


def copy(source: Path, out: Path, **files: Any) -> Path:
    """The files of a folder, and JSON files beside them: name_json={...}; bytes as they are."""
    out.mkdir(exist_ok=True)
    for path in source.iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    for name, content in files.items():
        text = content if isinstance(content, bytes) else json.dumps(content).encode()
        (out / name.replace("_json", ".json")).write_bytes(text)
    return out


def same_as_transformers(folder: Path) -> None:
    """Every probe has transformers' ids; text that spells a special token stays text."""
    ours, theirs = load_tokenizer(str(folder)), transformers.AutoTokenizer.from_pretrained(folder)
    for text in TEXT:
        wanted = theirs.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert ours.encode([text])[0].tolist() == wanted, text
    assert ours.eos_id == theirs.eos_token_id


@pytest.mark.parametrize(
    "config",
    [
        {"tokenizer_class": "Qwen2Tokenizer"},
        {"tokenizer_class": "GPT2Tokenizer"},
        {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True},
        {"tokenizer_class": "Qwen2TokenizerFast", "add_prefix_space": True},
    ],
    ids=lambda config: " ".join(map(str, config.values())),
)
def test_case_04b_vocab_and_merges_are_split_as_their_class_splits(bpe: Path, tmp_path: Path, config: dict) -> None:
    folder = copy(bpe, tmp_path / "t", tokenizer_config_json=config | {"eos_token": "<|endoftext|>"})
    same_as_transformers(folder)


def test_case_04b_classes_differ_and_the_model_type_decides_where_no_class_is_named(bpe: Path, tmp_path: Path) -> None:
    end = {"eos_token": "<|endoftext|>"}
    kinds = {kind: end | {"tokenizer_class": kind} for kind in ("GPT2Tokenizer", "Qwen2Tokenizer")}
    folders = {kind: copy(bpe, tmp_path / kind, tokenizer_config_json=config) for kind, config in kinds.items()}
    prints = {kind: load_tokenizer(str(folder)).fingerprint for kind, folder in folders.items()}
    assert len(set(prints.values())) == 2
    silent = copy(bpe, tmp_path / "silent", config_json={"model_type": "qwen2"}, special_tokens_map_json=end)
    assert load_tokenizer(str(silent)).fingerprint == prints["Qwen2Tokenizer"]


def test_case_04b_what_transformers_does_not_load_is_refused(bpe: Path, tmp_path: Path) -> None:
    remote = {"auto_map": {"AutoTokenizer": ["code.Mine", None]}, "eos_token": "<end>"}
    folder = copy(bpe, tmp_path / "remote", tokenizer_config_json=remote)
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ConfigError, match="transformers does not load it"):
        load_tokenizer(str(folder))
    assert not (tmp_path / "ran").exists()
    with pytest.raises(ConfigError, match="transformers does not load it"):  # whose split is not known
        load_tokenizer(str(copy(bpe, tmp_path / "llama", config_json={"model_type": "llama"})))


def test_case_04c_two_tokenizers_in_a_folder_are_compared(spm: Path, tmp_path: Path) -> None:
    folder = copy(spm, tmp_path / "both", tokenizer_config_json={"tokenizer_class": "LlamaTokenizer"})
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    assert (folder / "tokenizer.json").is_file()
    same_as_transformers(folder)
    ours, model = load_tokenizer(str(folder)), load_tokenizer(str(folder / "tokenizer.model"))
    blanks = "  two   runs"
    assert ours.encode([blanks])[0].tolist() != model.encode([blanks])[0].tolist()
    (note,) = [note for note in ours.notes if "tokenizer.model" in note]
    assert (
        "splits text differently" in note and "tokenizer.json is taken, as transformers does; llama.cpp takes" in note
    )
    assert ours.fingerprint != model.fingerprint
    (folder / "tokenizer.json").unlink()  # and a model alone is taken as it is
    alone = load_tokenizer(str(folder))
    assert alone.fingerprint == model.fingerprint
    (note,) = alone.notes
    assert (
        "tokenizer.model is taken as it is, as llama.cpp does; transformers reads it as LlamaTokenizer, which" in note
    )


def test_case_04c_equal_tokenizers_are_not_warned_about_and_have_one_fingerprint(spm: Path, tmp_path: Path) -> None:
    folder = copy(spm, tmp_path / "both")
    made = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    made.save_pretrained(folder)
    ours = load_tokenizer(str(folder))
    assert ours.kind == "hf" and not ours.notes
    assert ours.fingerprint == load_tokenizer(str(folder / "tokenizer.model")).fingerprint
    (folder / "tokenizer.model").write_bytes(b"\x0a\x05garbage")
    (note,) = load_tokenizer(str(folder)).notes
    assert "was not compared" in note


def test_case_04c_a_class_that_overrules_tokenizer_json_is_named(bpe: Path, tmp_path: Path) -> None:
    """Another pair of readers: those of the folder and those of tokenizer.json alone."""
    config = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|endoftext|>"}
    model = tokenizers.ByteLevelBPETokenizer.from_file(str(bpe / "vocab.json"), str(bpe / "merges.txt"))
    folder = copy(bpe, tmp_path / "t", tokenizer_config_json=config, tokenizer_json=model.to_str().encode())
    same_as_transformers(folder)
    (note,) = load_tokenizer(str(folder)).notes
    assert "Qwen2Tokenizer of transformers, which is taken, and tokenizer.json by itself" in note


END_WRONG = [
    ({}, {"eos_token_id": 65541}, {}, r"eos_token_id 65541 of config\.json is outside the vocabulary of 400"),
    ({}, {"eos_token_id": -1}, {}, r"eos_token_id -1 of config\.json is outside the vocabulary"),
    ({}, {}, {"eos_token_id": 400}, r"eos_token_id 400 of generation_config\.json is outside"),
    ({}, {"eos_token_id": True}, {}, r"config\.json: eos_token_id: found True, expected an id or a list"),
    (
        {},
        {"eos_token_id": 1},
        {"eos_token_id": [2]},
        r"eos_token_id is 1 in config\.json and .* 2 in generation_config",
    ),
    ({"eos_token": "<no>"}, {"eos_token_id": 2}, {}, r"eos_token '<no>' of tokenizer_config\.json is not in the vocab"),
    ({"eos_token": "<end>"}, {"eos_token_id": [1, 2]}, {}, r"eos_token is '<end>' = 0 in .* \[1, 2\] in config\.json"),
    (
        {"eos_token": "<end>"},
        {"eos_token_id": 65541},
        {},
        r"<end>' = 0 in .* and eos_token_id is 65541 in config\.json",
    ),
    (b'{"eos_token": "<e', {}, {}, r"tokenizer_config\.json is no JSON .*is the download complete"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", {}, {}, r"git-lfs pointer .* git lfs pull"),
    (b"[]", {}, {}, r"tokenizer_config\.json: found \[\], expected an object"),
    ({}, {}, {}, r"no file names the end of text, and the vocabulary holds <\|endoftext\|>, <\|im_end\|>"),
]


@pytest.mark.parametrize(("config", "model", "generation", "words"), END_WRONG)
def test_case_05_an_end_of_text_that_is_not_sure_is_refused(
    bpe: Path, tmp_path: Path, config: Any, model: dict, generation: dict, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        load_tokenizer(str(folder_of(bpe, tmp_path, config, model, generation)))


END_RIGHT = [
    ({"eos_token": "<|im_end|>"}, {"eos_token_id": 1}, {"eos_token_id": [1, 2]}, 1),  # an instruct model
    ({"eos_token": "<|im_end|>"}, {"eos_token_id": 2}, {"eos_token_id": [2, 1]}, 1),  # its base's config.json
    ({"eos_token": "<|im_end|>"}, {"eos_token_id": [2, 1, 399]}, {}, 1),
    ({"eos_token": "<|im_end|>"}, {"eos_token_id": [65541, 1]}, {}, 1),  # more rows than tokens
    ({"eos_token": "<|im_end|>"}, {}, {}, 1),
    ({"eos_token": None}, {"eos_token_id": [2, 1]}, {}, 2),
    ({}, {}, {"eos_token_id": 0}, 0),
]


@pytest.mark.parametrize(("config", "model", "generation", "eos_id"), END_RIGHT)
def test_case_05_instruct_models_end_with_one_of_a_list(
    bpe: Path, tmp_path: Path, config: dict, model: dict, generation: dict, eos_id: int
) -> None:
    tokenizer = load_tokenizer(str(folder_of(bpe, tmp_path, config, model, generation)))
    assert tokenizer.eos_id == eos_id
    assert tokenizer.special.eos_token == ["<end>", "<|im_end|>", "<|endoftext|>"][eos_id]


def folder_of(bpe: Path, tmp_path: Path, config: Any, model: dict, generation: dict) -> Path:
    """tokenizer.json with the three files that speak of special ids."""
    (tmp_path / "vocabulary").mkdir()
    base = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(str(bpe / "vocab.json"), str(bpe / "merges.txt")))
    base.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    base.save(str(tmp_path / "vocabulary" / "tokenizer.json"))
    files = {"tokenizer_config_json": config, "config_json": model, "generation_config_json": generation}
    return copy(tmp_path / "vocabulary", tmp_path / "t", **files)


def test_case_05_two_files_of_the_tokenizer_name_two_ends(bpe: Path, tmp_path: Path) -> None:
    folder = folder_of(bpe, tmp_path, {"eos_token": "<end>"}, {}, {})
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<|im_end|>"}}))
    with pytest.raises(
        ConfigError, match=r"eos_token is '<end>' in tokenizer_config\.json and '<\|im_end\|>' in special"
    ):
        load_tokenizer(str(folder))


def test_case_05_a_sentencepiece_folder_says_how_its_texts_end(spm: Path, tmp_path: Path) -> None:
    size = load_tokenizer(str(spm)).vocab_size
    added = {str(size): {"content": "<|im_end|>"}, str(size + 1): {"content": "<|im_start|>"}}
    config = {"eos_token": "<|im_end|>", "added_tokens_decoder": added}
    tokenizer = load_tokenizer(str(copy(spm, tmp_path / "chat", tokenizer_config_json=config)))
    assert (tokenizer.kind, tokenizer.eos_id, tokenizer.vocab_size) == ("sentencepiece", size, size + 2)
    assert tokenizer.bos_id == 1 and load_tokenizer(str(spm)).eos_id == 2
    with pytest.raises(
        ConfigError, match=r"eos_token is '</s>' = 2 in the tokenizer itself and eos_token_id is 7 in con"
    ):
        load_tokenizer(str(copy(spm, tmp_path / "other", config_json={"eos_token_id": 7})))
    with pytest.raises(ConfigError, match=r"eos_token '<no>' of tokenizer_config\.json is not in the vocabulary"):
        load_tokenizer(str(copy(spm, tmp_path / "no", tokenizer_config_json={"eos_token": "<no>"})))


def test_case_05_ranks_of_another_family_have_to_be_named(tmp_path: Path) -> None:
    ranks = [bytes([byte]) for byte in range(256)] + [b"ab", b"  "]
    lines = b"".join(base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(ranks))
    (tmp_path / "tokenizer.model").write_bytes(lines)
    with pytest.raises(
        ConfigError, match=r"258 tiktoken ranks that are not Llama 3's; .* or llama3:.*tokenizer\.model if"
    ):
        load_tokenizer(str(tmp_path / "tokenizer.model"))
    named = load_tokenizer(f"llama3:{tmp_path}")
    assert (named.vocab_size, named.eos_id, named.special.eos_token) == (514, 259, "<|end_of_text|>")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|eot_id|>"}))
    assert load_tokenizer(f"llama3:{tmp_path}").eos_id == 258 + 9
    assert digest_of(ranks) != LLAMA3_RANKS


def test_case_05_the_end_of_text_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str], bpe: Path) -> None:
    from tools.prepare_data import main

    (tmp_path / "a.txt").write_text("a text " * 50)
    folder = folder_of(bpe, tmp_path, {"eos_token": "<|im_end|>"}, {}, {})
    arguments = [
        "--input",
        str(tmp_path / "a.txt"),
        "--tokenizer",
        str(folder),
        "--out",
        str(tmp_path / "o"),
        "--quiet",
    ]
    assert main(arguments) == 0
    assert "end of text: <|im_end|> = 1\n" in capsys.readouterr().out
    assert int(TokenDataset(tmp_path / "o", "data", "train").read(0, 0, 10**6)[-1]) == 1


MALFORMED = [
    ({"added_tokens_decoder": []}, r"tokenizer_config\.json: added_tokens_decoder: found \[\], expected"),
    ({"added_tokens_decoder": {"3": "<x>"}}, r"added_tokens_decoder\.3: found '<x>', expected"),
    ({"added_tokens_decoder": {"3": {"content": 5}}}, r"added_tokens_decoder\.3: found .*content.*5.*, expected"),
    ({"added_tokens_decoder": {"three": {"content": "<x>"}}}, r"found the key 'three', expected a token id"),
    ({"added_tokens_decoder": {"-1": {"content": "<x>"}}}, r"found the key '-1', expected a token id"),
    ({"eos_token": ["<end>"]}, r"tokenizer_config\.json: eos_token: found \['<end>'\], expected"),
    ({"eos_token": {"text": "<end>"}}, r"eos_token: found .*expected"),
    ({"eos_token": 2}, r"eos_token: found 2, expected"),
    ({"eos_token": "<end>", "bos_token": [1]}, r"bos_token: found \[1\], expected"),
]


@pytest.mark.parametrize("kind", ["hf", "sentencepiece"])
@pytest.mark.parametrize(("config", "words"), MALFORMED)
def test_case_15_malformed_settings_are_named(
    bpe: Path, spm: Path, tmp_path: Path, config: dict, words: str, kind: str
) -> None:
    config = {"eos_token": "</s>" if kind == "sentencepiece" else "<end>"} | config
    if kind == "hf":
        folder = folder_of(bpe, tmp_path, config, {}, {})
    else:
        config = {key: "</s>" if value == "<end>" else value for key, value in config.items()}
        folder = copy(spm, tmp_path / "t", tokenizer_config_json=config)
    with pytest.raises(ConfigError, match=words):
        load_tokenizer(str(folder))


def test_case_15_null_is_absent_and_added_tokens_json_is_judged_too(bpe: Path, tmp_path: Path) -> None:
    config = {"eos_token": "<end>", "added_tokens_decoder": None, "bos_token": None, "pad_token": None}
    folder = folder_of(bpe, tmp_path, config, {"eos_token_id": None}, {})
    assert load_tokenizer(str(folder)).eos_id == 0
    (folder / "added_tokens.json").write_text(json.dumps({"<x>": "400"}))
    with pytest.raises(ConfigError, match=r"added_tokens\.json: '<x>': found '400', expected a token id"):
        load_tokenizer(str(folder))


def test_case_11_bytes_come_with_files_that_transformers_loads(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text " * 100)
    manifest = prepare({"d": [tmp_path / "a.txt"]}, tmp_path / "out", quiet=True)
    folder = tmp_path / "out" / "tokenizer"
    assert sorted(manifest["tokenizer"]["files"]) == sorted(path.name for path in folder.iterdir())
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    every = "".join(map(chr, range(0xD800))) + "😀"
    for text in [every, *PROBE]:
        plain = text.replace("<|endoftext|>", "")
        assert theirs.encode(plain) == list(plain.encode()) and theirs.decode(list(plain.encode())) == plain
    assert (theirs.eos_token_id, theirs.bos_token_id, len(theirs)) == (256, None, 257)
    assert load_tokenizer(str(folder)).fingerprint == load_tokenizer("bytes").fingerprint


@pytest.mark.parametrize("kind", ["bpe", "qwen", "spm", "ranks"])
@pytest.mark.parametrize("model_type", ["llama", "mixtral", "qwen3_moe"])
def test_case_11_prepared_data_keeps_files_that_give_the_same_ids(
    bpe: Path, spm: Path, tmp_path: Path, kind: str, model_type: str
) -> None:
    if kind == "ranks":
        tokens = [bytes([byte]) for byte in range(256)] + [b"  ", b"re", b"12"]
        lines = b"".join(base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(tokens))
        (tmp_path / "ranks.model").write_bytes(lines)
        spec = f"llama3:{tmp_path / 'ranks.model'}"
    elif kind == "spm":
        spec = str(copy(spm, tmp_path / "t", tokenizer_config_json={"tokenizer_class": "LlamaTokenizer"}))
    else:
        config = {"tokenizer_class": "Qwen2Tokenizer" if kind == "qwen" else "GPT2Tokenizer", "eos_token": "<end>"}
        spec = str(copy(bpe, tmp_path / "t", tokenizer_config_json=config))
    ours = load_tokenizer(spec)
    folder = tmp_path / "kept"
    folder.mkdir()
    for name, content in ours.kept().items():
        (folder / name).write_bytes(content)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))  # of whatever family is trained
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for text in TEXT:
        wanted = theirs.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert ours.encode([text])[0].tolist() == wanted, text
    assert theirs.eos_token_id == ours.eos_id
    assert load_tokenizer(str(folder)).fingerprint == ours.fingerprint


def test_case_19_a_token_past_the_vocabulary_that_no_text_uses_is_no_obstacle(bpe: Path, tmp_path: Path) -> None:
    added = {"400": {"content": "<pad>", "special": True}}
    config = {"eos_token": "<end>", "pad_token": "<pad>", "added_tokens_decoder": added}
    folder = folder_of(bpe, tmp_path, config, {}, {})
    (tmp_path / "a.txt").write_text("a text with <pad> " * 50)
    manifest = prepare({"d": [tmp_path / "a.txt"]}, tmp_path / "out", str(folder), PrepareOptions(), quiet=True)
    assert manifest["vocab_size"] == 401 and manifest["tokenizer"]["pad_id"] == 400
    dataset = TokenDataset(tmp_path / "out", "d", "train", vocab_size=400)
    assert int(np.max(dataset.read(0, 0, 10**6))) < 400
    assert json.loads((tmp_path / "out" / MANIFEST).read_text())["domains"]["d"]["splits"]["train"]["max_id"] < 400


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared tokenizers are not beside the repository")
def test_case_04b_gpt2_as_qwen_splits_digits_and_blanks(tmp_path: Path) -> None:
    config = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|endoftext|>"}
    same_as_transformers(copy(SHARED / "gpt2", tmp_path / "t", tokenizer_config_json=config))
