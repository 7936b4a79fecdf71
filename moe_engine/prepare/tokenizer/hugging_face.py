"""A Hugging Face folder's tokenizer as transformers makes it, which is not always what its tokenizer.json says.

The class that tokenizer_config.json or the model names decides too: Qwen2Tokenizer splits digits one by one, a
LlamaTokenizer puts its own rules for blanks in place of the file's. So transformers loads a copy of the files that were
read here, and of nothing else: no code of the folder is run, and nothing is downloaded.
"""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_engine.errors import ConfigError
from moe_engine.prepare.tokenizer.convert import ANY_CLASS
from moe_engine.prepare.tokenizer.identity import Encode, difference, fingerprint
from moe_engine.prepare.tokenizer.special import Settings, added_tokens, special_of
from moe_engine.prepare.tokenizer.tokenizer import CONFIG, JSON, KINDS, MERGES, MODEL, VOCAB, Files, Tokenizer, kept_of


def hugging_face(spec: str, files: Files, settings: Settings) -> Tokenizer:
    """The tokenizer of a folder's files."""
    raw = _raw(spec, files)
    made = as_transformers(spec, files, settings)
    model, encode = made.backend_tokenizer, encoder_of(made)
    added = added_tokens(spec, settings)
    for text, token_id in added.items():
        if (found := model.token_to_id(text)) != token_id:
            raise ConfigError(
                f"tokenizer {spec}: {text} has id {found} in the vocabulary and {token_id} in {CONFIG}; take both "
                "files from the same release"
            )
    # transformers adds tokens that the folder names and does not have; they are no part of its vocabulary
    known = raw.get_vocab(with_added_tokens=True) | added
    texts = {i: text for text, i in known.items()}
    size = max(known.values()) + 1
    usual = {key: getattr(made, key) for key in ("eos_token", "bos_token", "pad_token")}
    usual = {key: text if text in known else None for key, text in usual.items()}
    special = special_of(spec, settings, known.get, lambda i: texts.get(i, str(i)), size, usual)

    def decode(ids: list[int]) -> str:
        return model.decode(ids, skip_special_tokens=False)

    def plain(text: str) -> list[int]:
        """Ids by the vocabulary file alone, without the class that transformers puts around it."""
        return raw.encode(text, add_special_tokens=False).ids

    other = difference(encode, plain) if JSON in files else None
    notes: tuple[str, ...] = ()
    if other:
        notes = (
            f"{type(made).__name__} of transformers, which is taken, and {JSON} by itself, as other readers take it, "
            f"split text differently ({other})",
        )

    def kept() -> dict[str, bytes]:
        """The folder's files as they are, if tokenizer.json alone splits text as transformers does; else a
        tokenizer.json made of what transformers loaded takes the place of the vocabulary files."""
        if JSON in files and not other:
            known_class = settings[CONFIG].get("tokenizer_class") or ANY_CLASS
            return kept_of(files, settings, special, texts, tokenizer_class=known_class)
        whole = {name: content for name, content in files.items() if name not in (VOCAB, MERGES, MODEL)}
        whole[JSON] = model.to_str().encode()
        return kept_of(whole, settings, special, texts, tokenizer_class=ANY_CLASS)

    name = fingerprint(model.get_vocab(with_added_tokens=False), encode, special.eos_id)
    return Tokenizer("hf", spec, size, special, name, encode, decode, kept, notes)


def _raw(spec: str, files: Files) -> Any:
    """The vocabulary by itself, as the tokenizers library reads it."""
    try:
        import tokenizers
    except ImportError:
        raise ConfigError(f"tokenizer {spec}: needs tokenizers; pip install tokenizers") from None
    try:
        if JSON in files:
            model = tokenizers.Tokenizer.from_buffer(files[JSON])
        else:
            with tempfile.TemporaryDirectory() as folder:
                paths = [Path(folder, name) for name in (VOCAB, MERGES)]
                for path in paths:
                    path.write_bytes(files[path.name])
                model = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(*map(str, paths)))
    except Exception as error:  # the Rust library raises plain Exception
        raise ConfigError(f"tokenizer {spec}: not a Hugging Face tokenizer ({error}); expected {KINDS}") from None
    model.no_truncation()
    model.no_padding()
    model.encode_special_tokens = True
    return model


def as_transformers(spec: str, files: Files, settings: Settings) -> Any:
    """What transformers makes of the files. vocab.json and merges.txt of which nothing is said are GPT-2's."""
    try:
        from transformers import AutoTokenizer, GPT2Tokenizer
    except ImportError:
        raise ConfigError(f"tokenizer {spec}: needs transformers; pip install transformers") from None
    said = JSON in files or CONFIG in files or "config.json" in files
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            if name != MODEL or (JSON not in files and VOCAB not in files):
                Path(folder, name).write_bytes(content)
        if (cleaned := _as_it_is_read(settings[CONFIG])) != settings[CONFIG]:
            Path(folder, CONFIG).write_text(json.dumps(cleaned))
        try:
            kind = AutoTokenizer if said else GPT2Tokenizer
            made = kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            made.backend_tokenizer  # noqa: B018 (a tokenizer in Python has none)
        except Exception as error:  # of any kind: transformers checks little of what it reads
            why = " ".join(str(error).replace(folder, spec).split())[:300]
            raise ConfigError(
                f"tokenizer {spec}: transformers does not load it ({type(error).__name__}: {why}); give a folder with "
                f"{JSON} that it loads without code of the folder's own"
            ) from None
    return made


def encoder_of(made: Any) -> Encode:
    """Text to ids by a tokenizer of transformers; a special token that text spells stays text."""
    model = made.backend_tokenizer
    model.no_truncation()
    model.no_padding()
    model.encode_special_tokens = True
    return lambda text: model.encode(text, add_special_tokens=False).ids


def _as_it_is_read(config: Mapping[str, Any]) -> dict[str, Any]:
    """A tokenizer_config.json without what special.py takes and transformers does not: a null list, a bare object."""
    texts = {
        key: token["content"]
        for key, token in config.items()
        if key.endswith("_token") and isinstance(token, dict) and "content" in token and "__type" not in token
    }
    return {key: value for key, value in config.items() if key != "added_tokens_decoder" or value is not None} | texts
