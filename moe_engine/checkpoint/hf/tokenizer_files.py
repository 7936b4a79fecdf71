"""The tokenizer that goes along with a run's weights, and how an export says what the training did.

    OUT/data/tokenizer/  ->  OUT/hf/  ->  the exported folder        where the first weights came without a tokenizer

A reader has to begin and end a text as the training text did: `add_bos_token` and `add_eos_token` in
tokenizer_config.json, the template in tokenizer.json, the ids in config.json. What says so already stays byte for byte.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from moe_engine.checkpoint.hf.contents import CONFIG
from moe_engine.host.files import size_in

JSON = "tokenizer.json"
VOCABULARIES = (JSON, "tokenizer.model", "vocab.json")
GENERATION = "generation_config.json"
SETTINGS = "tokenizer_config.json"
NAMES = (
    *(*VOCABULARIES, "merges.txt", SETTINGS, "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json"),
)


def with_tokenizer(side: Mapping[str, bytes], folder: Path, instead: bool) -> Mapping[str, bytes]:
    """The side files of weights with the tokenizer files in `folder`, where they have none, or `instead` of theirs."""
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    theirs = {path.name: path.read_bytes() for path in paths if size_in(folder, path) is not None}
    if not theirs or (not instead and any(name in side for name in VOCABULARIES)):
        return side
    return {name: content for name, content in side.items() if name not in NAMES} | theirs


def as_trained(side: Mapping[str, bytes], tokenizer: Mapping[str, Any] | None, vocab_size: int) -> Mapping[str, bytes]:
    """The side files of an export. tokenizer: what the manifest of a run's checkpoint says of it; None: not trained."""
    if not tokenizer or "add_bos" not in tokenizer:
        return side
    ends = {"add_bos_token": tokenizer["add_bos"], "add_eos_token": False}
    ids = {f"{kind}_token_id": tokenizer[f"{kind}_id"] for kind in ("bos", "eos", "pad")}
    ids = {key: i for key, i in ids.items() if i is not None and i < vocab_size}  # a pad may lie past the vocabulary
    files = dict(side)
    if any(name in side for name in VOCABULARIES):
        files[SETTINGS] = _with(side.get(SETTINGS, b"{}"), lambda old: old | ends)
    if JSON in side:  # whose own template many readers follow
        bos_id = tokenizer["bos_id"] if tokenizer["add_bos"] else None
        files[JSON] = _with(side[JSON], lambda old: _beginning(old, bos_id))
    for name in (CONFIG, *(name for name in [GENERATION] if name in side)):
        files[name] = _with(side.get(name, b"{}"), lambda old: _ids(old, ids))
    return files


def _ids(config: dict[str, Any], ids: dict[str, int]) -> dict[str, Any]:
    """A config.json that names the data's end of text, among others, is right; another gets the ids of the data."""
    eos = config.get("eos_token_id")
    return config if ids["eos_token_id"] in (eos if isinstance(eos, list) else [eos]) else config | ids


def _beginning(tokenizer: dict[str, Any], bos_id: int | None) -> dict[str, Any]:
    """A tokenizer.json whose template puts this token before a text, or none, and nothing behind it."""
    post = tokenizer.get("post_processor")
    parts = post["processors"] if post and post["type"] == "Sequence" else [post] if post else []
    templates = [part for part in parts if part["type"] != "ByteLevel"]  # which changes no ids
    bos = None if bos_id is None else _piece(tokenizer, bos_id)
    if bos_id is not None and bos is None:
        return tokenizer  # tokenizer_config.json adds the token, and says when it is placed
    a, b = ([{"Sequence": {"id": name, "type_id": i}}] for i, name in enumerate("AB"))
    begin = [] if bos is None else [{"SpecialToken": {"id": bos, "type_id": 0}}]
    if [part.get("single") for part in templates] == [begin + a] or (not templates and not begin):
        return tokenizer
    token = {} if bos is None else {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}}
    template = {"type": "TemplateProcessing", "single": begin + a, "pair": begin + a + b, "special_tokens": token}
    kept = [part for part in parts if part["type"] == "ByteLevel"] + [template]
    return tokenizer | {"post_processor": {"type": "Sequence", "processors": kept} if len(kept) > 1 else template}


def _piece(tokenizer: dict[str, Any], token_id: int) -> str | None:
    """The text of a token in a tokenizer.json."""
    added = {token["id"]: token["content"] for token in tokenizer.get("added_tokens") or ()}
    vocab = tokenizer["model"]["vocab"]
    pieces = vocab.items() if isinstance(vocab, dict) else ((piece, i) for i, (piece, _) in enumerate(vocab))
    return added.get(token_id) or next((piece for piece, i in pieces if i == token_id), None)


def _with(content: bytes, change: Callable[[dict[str, Any]], dict[str, Any]]) -> bytes:
    """A JSON object, changed; the same bytes where nothing changes, and where the file is no JSON object."""
    try:
        old = json.loads(content)
    except (ValueError, RecursionError):
        return content
    new = change(old) if isinstance(old, dict) else old
    return content if new == old else (json.dumps(new, indent=2, ensure_ascii=False) + "\n").encode()
