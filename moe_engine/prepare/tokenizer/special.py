"""Which ids end and begin a text, from what the files beside a tokenizer say; a file that speaks is never guessed over.

    tokenizer_config.json, special_tokens_map.json    eos_token, bos_token, pad_token: text, or {"content": text}
    config.json, generation_config.json               eos_token_id, bos_token_id: an id, or a list of ids

transformers takes the tokens of the tokenizer's own files first, and so do we. The ids of the model's files have to
hold that token among them: an instruct model may end with any of a list, a model that ends with none of what its
tokenizer says was put together from two.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from moe_engine.config.messages import shown
from moe_engine.errors import ConfigError

OF_TOKENIZER = ("tokenizer_config.json", "special_tokens_map.json")
OF_MODEL = ("config.json", "generation_config.json")
SETTINGS = (*OF_TOKENIZER, "added_tokens.json", *OF_MODEL)
EOS_NAMES = ("<|end_of_text|>", "<|endoftext|>", "</s>", "<eos>", "<|im_end|>")
BOS_NAMES = ("<|begin_of_text|>", "<s>", "<bos>")
POINTER = b"version https://git-lfs.github.com/spec/"  # what git leaves in place of a file that git-lfs holds

IdOf = Callable[[str], int | None]
Settings = Mapping[str, Mapping[str, Any]]


class Special(NamedTuple):
    """Ids that are not of text. eos_token: as the vocabulary spells it."""

    eos_id: int
    eos_token: str
    bos_id: int | None
    pad_id: int | None


def refuse_pointer(spec: str, name: str, content: bytes) -> None:
    """ConfigError for a file that git-lfs has not fetched."""
    if content.startswith(POINTER):
        raise ConfigError(f"tokenizer {spec}: {name} is a git-lfs pointer and not the file itself; run git lfs pull")


def settings_of(spec: str, files: Mapping[str, bytes]) -> dict[str, dict[str, Any]]:
    """The SETTINGS among `files`, parsed; an absent one is empty. ConfigError for what is not of the types above."""
    found: dict[str, dict[str, Any]] = {}
    for name in SETTINGS:
        content = files.get(name, b"{}")
        refuse_pointer(spec, name, content)
        try:
            value = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"tokenizer {spec}: {name} is no JSON ({error}); is the download complete?") from None
        if not isinstance(value, dict):
            raise ConfigError(f"tokenizer {spec}: {name}: found {shown(value)}, expected an object")
        found[name] = value
    added_tokens(spec, found)
    for key in ("eos_token", "bos_token", "pad_token"):
        _named(spec, found, key, {})
        _ids(spec, found, f"{key}_id")
    return found


def added_tokens(spec: str, settings: Settings) -> dict[str, int]:
    """Tokens beyond the vocabulary's own: of added_tokens_decoder, {id: {"content": text}}, and added_tokens.json."""
    listed: dict[str, int] = {}
    decoder = settings["tokenizer_config.json"].get("added_tokens_decoder")
    where = f"tokenizer {spec}: tokenizer_config.json: added_tokens_decoder"
    if decoder is not None and not isinstance(decoder, dict):
        raise ConfigError(f'{where}: found {shown(decoder)}, expected {{"id": {{"content": "token"}}}}')
    for key, token in (decoder or {}).items():
        text = token.get("content") if isinstance(token, dict) else None
        if not (key.isascii() and key.isdigit()):
            raise ConfigError(f"{where}: found the key {shown(key)}, expected a token id")
        if not isinstance(text, str):
            raise ConfigError(f'{where}.{key}: found {shown(token)}, expected {{"content": "token"}}')
        listed[text] = int(key)
    for text, token_id in settings["added_tokens.json"].items():
        if type(token_id) is not int or token_id < 0:
            raise ConfigError(
                f"tokenizer {spec}: added_tokens.json: {shown(text)}: found {shown(token_id)}, expected a token id"
            )
        if listed.setdefault(text, token_id) != token_id:
            raise ConfigError(
                f"tokenizer {spec}: {text} has id {token_id} in added_tokens.json and {listed[text]} in "
                "tokenizer_config.json; take both files from the same release"
            )
    return listed


def special_of(
    spec: str,
    settings: Settings,
    id_of: IdOf,
    text_of: Callable[[int], str],
    size: int,
    usual: Mapping[str, str | None],
) -> Special:
    """The special ids of a tokenizer with ids below `size`.

    id_of: the id of a token's text, None outside the vocabulary. usual: tokens by key ("eos_token", ...) that hold
    where the files name none. ConfigError when there is no end of text, or none that all files agree on.
    """
    named = _named(spec, settings, "eos_token", usual)
    ids = _ids(spec, settings, "eos_token_id")
    eos_id = id_of(named[0]) if named else next((found[0] for found in ids.values() if found), None)
    if named and eos_id is None:
        raise ConfigError(
            f"tokenizer {spec}: eos_token {shown(named[0])} of {named[1]} is not in the vocabulary; name one that is"
        )
    if eos_id is None:
        eos_id = _only_one(spec, id_of, EOS_NAMES)
    if eos_id is None:
        raise ConfigError(f"tokenizer {spec}: no end-of-text token; name one as eos_token in tokenizer_config.json")
    if not 0 <= eos_id < size:
        file = next(file for file, found in ids.items() if found)
        raise ConfigError(f"tokenizer {spec}: eos_token_id {eos_id} of {file} is outside the vocabulary of {size} ids")
    said = {file: found for file, found in ids.items() if found}
    agree = (any if named else all)(eos_id in found for found in said.values())
    if said and not agree:
        words = [f"eos_token is {shown(named[0])} = {eos_id} in {named[1]}"] if named else []
        words += [f"eos_token_id is {found if len(found) > 1 else found[0]} in {file}" for file, found in said.items()]
        raise ConfigError(
            f"tokenizer {spec}: {' and '.join(words)}: documents would end with a token that the model does not end "
            "with; correct the file that is wrong"
        )
    bos, pad = (_named(spec, settings, key, usual) for key in ("bos_token", "pad_token"))
    bos_id = id_of(bos[0]) if bos else None
    if bos is None and not any("bos_token" in settings[file] for file in OF_TOKENIZER):
        bos_id = next((found[0] for found in _ids(spec, settings, "bos_token_id").values() if found), None)
        bos_id = _only_one(spec, id_of, BOS_NAMES, strict=False) if bos_id is None else bos_id
    if bos_id is not None and not 0 <= bos_id < size:
        bos_id = None
    return Special(eos_id, text_of(eos_id), bos_id, id_of(pad[0]) if pad else None)


def _named(spec: str, settings: Settings, key: str, usual: Mapping[str, str | None]) -> tuple[str, str] | None:
    """The token of a key and the file that names it. ConfigError where two files name two."""
    found: dict[str, str] = {}
    for file in OF_TOKENIZER:
        token = settings[file].get(key)
        text = token.get("content") if isinstance(token, dict) else token
        if token is not None and not isinstance(text, str):
            raise ConfigError(f'tokenizer {spec}: {file}: {key}: found {shown(token)}, expected "token" or null')
        if isinstance(text, str):
            found[file] = text
    if len(set(found.values())) > 1:
        said = " and ".join(f"{shown(text)} in {file}" for file, text in found.items())
        raise ConfigError(f"tokenizer {spec}: {key} is {said}; correct the file that is wrong")
    for file, text in found.items():
        return text, file
    text = None if any(key in settings[file] for file in OF_TOKENIZER) else usual.get(key)
    return (text, "the tokenizer itself") if text is not None else None


def _ids(spec: str, settings: Settings, key: str) -> dict[str, list[int]]:
    """The ids that config.json and generation_config.json give for a key, by file."""
    out: dict[str, list[int]] = {}
    for file in OF_MODEL:
        value = settings[file].get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if any(type(i) is not int for i in ids):
            raise ConfigError(f"tokenizer {spec}: {file}: {key}: found {shown(value)}, expected an id or a list of ids")
        out[file] = ids
    return out


def _only_one(spec: str, id_of: IdOf, names: tuple[str, ...], strict: bool = True) -> int | None:
    """The id of the one well-known name in the vocabulary, where no file says anything."""
    there = [name for name in names if id_of(name) is not None]
    if strict and len(there) > 1:
        raise ConfigError(
            f"tokenizer {spec}: no file names the end of text, and the vocabulary holds {', '.join(there)}; name one "
            "as eos_token in tokenizer_config.json"
        )
    return id_of(there[0]) if len(there) == 1 else None
