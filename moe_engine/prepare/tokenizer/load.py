"""`load_tokenizer(spec)`: what lies at a path is told by its content, not by its name.

    bytes           no file: ids 0-255 are the UTF-8 bytes, 256 ends a document (vocabulary 257)
    sentencepiece   a SentencePiece .model (Llama 2, Mistral, Mixtral)
    hf              a tokenizer.json, or a folder that holds one (or vocab.json and merges.txt)
    tiktoken        Llama 3's tokenizer.model: lines "<base64> <rank>"; llama3:PATH for other ranks split as its are

The files beside a tokenizer say which token ends a text. Documents are data: text that spells a special token is
encoded as ordinary text, and no token is added at either end (`eos_id` and `bos_id` are for the caller to place).
"""

from dataclasses import replace
from pathlib import Path

import numpy as np

from moe_engine.errors import ConfigError
from moe_engine.prepare.tokenizer import byte_files
from moe_engine.prepare.tokenizer.hugging_face import as_transformers, encoder_of, hugging_face
from moe_engine.prepare.tokenizer.identity import BYTES, difference, fingerprint
from moe_engine.prepare.tokenizer.sentence_piece import sentence_piece
from moe_engine.prepare.tokenizer.special import SETTINGS, Settings, Special, refuse_pointer, settings_of
from moe_engine.prepare.tokenizer.tiktoken import RANKS, tiktoken
from moe_engine.prepare.tokenizer.tokenizer import (
    CONFIG,
    JSON,
    KINDS,
    LLAMA3,
    MERGES,
    MODEL,
    OF_TOKENIZER,
    VOCAB,
    Files,
    Tokenizer,
)


def load_tokenizer(spec: str | None) -> Tokenizer:
    """The tokenizer that `spec` names (None means "bytes"); a ConfigError says what is missing and what to give."""
    if spec in (None, "bytes"):
        return _bytes_tokenizer()
    path = Path(spec.removeprefix(LLAMA3))
    if path.is_dir():
        return _from_files(spec, _files_of(spec, path))
    if not path.is_file():
        raise ConfigError(f"tokenizer {spec}: no such file or folder, and nothing is downloaded; expected {KINDS}")
    content = _read(spec, path)
    beside = {name: _read(spec, path.with_name(name)) for name in SETTINGS if path.with_name(name).is_file()}
    return _from_files(spec, beside | {JSON if content.lstrip()[:1] == b"{" else MODEL: content})


def holds_tokenizer(folder: Path) -> bool:
    """Whether a folder holds the vocabulary of a tokenizer."""
    return any((folder / name).is_file() for name in (JSON, MODEL, VOCAB))


def _files_of(spec: str, folder: Path) -> dict[str, bytes]:
    names = [name for name in (*OF_TOKENIZER, *SETTINGS) if (folder / name).is_file()]
    files = {name: _read(spec, folder / name) for name in names}
    models = sorted(folder.glob("*.model"))
    if JSON in files or MODEL in files or {VOCAB, MERGES} <= files.keys():
        return files
    if len(models) == 1:
        return files | {MODEL: _read(spec, models[0])}
    found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
    raise ConfigError(
        f"tokenizer {spec}: the folder holds {found}; expected tokenizer.json, a .model, or vocab.json and merges.txt"
    )


def _read(spec: str, path: Path) -> bytes:
    try:
        content = path.read_bytes() if path.is_file() else b""
    except OSError as error:
        raise ConfigError(f"tokenizer {spec}: {path} cannot be read ({error.strerror}); expected {KINDS}") from None
    if not content:
        raise ConfigError(f"tokenizer {spec}: {path} is empty, or no regular file; expected {KINDS}")
    refuse_pointer(spec, path.name, content)
    return content


def _from_files(spec: str, files: Files) -> Tokenizer:
    """tokenizer.json first, as transformers does; what another reader of the same files would do is compared."""
    settings = settings_of(spec, files)
    if JSON in files or {VOCAB, MERGES} <= files.keys():
        made = hugging_face(spec, files, settings)
        return replace(made, notes=(*made.notes, *_model_beside(spec, files, settings, made)))
    made = _of_model(spec, files, settings)
    return replace(made, notes=_class_beside(spec, files, settings, made))


def _of_model(spec: str, files: Files, settings: Settings) -> Tokenizer:
    return (tiktoken if RANKS.match(files[MODEL]) else sentence_piece)(spec, files, settings)


def _model_beside(spec: str, files: Files, settings: Settings, made: Tokenizer) -> tuple[str, ...]:
    """How the tokenizer.model that lies beside a tokenizer.json, if one does, splits text differently."""
    if MODEL not in files:
        return ()
    chosen = f"{JSON if JSON in files else VOCAB} is taken, as transformers does; llama.cpp takes {MODEL}"
    try:
        found = difference(made.encode_text, _of_model(spec, files, settings).encode_text)
    except ConfigError as error:
        return (f"{MODEL} beside it was not compared with it ({error}); {chosen}",)
    return (f"{MODEL} beside it splits text differently ({found}); {chosen}",) if found else ()


def _class_beside(spec: str, files: Files, settings: Settings, made: Tokenizer) -> tuple[str, ...]:
    """How the class that tokenizer_config.json names for a SentencePiece model splits text differently."""
    name = settings[CONFIG].get("tokenizer_class")
    if name is None or made.kind != "sentencepiece":
        return ()
    chosen = f"{MODEL} is taken as it is, as llama.cpp does; transformers reads it as {name}"
    try:
        found = difference(made.encode_text, encoder_of(as_transformers(spec, files, settings)))
    except ConfigError as error:
        return (f"{chosen}, which was not compared with it ({error})",)
    return (f"{chosen}, which splits text differently ({found})",) if found else ()


def _bytes_tokenizer() -> Tokenizer:
    def encode(text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), dtype=np.uint8)

    def decode(ids: list[int]) -> str:
        return bytes(i for i in ids if i < byte_files.END).decode(errors="replace")

    special = Special(byte_files.END, byte_files.END_TEXT, None, None)
    name = fingerprint({character: i for i, character in enumerate(BYTES)}, encode, byte_files.END)
    return Tokenizer("bytes", "bytes", byte_files.END + 1, special, name, encode, decode, byte_files.files)
