"""Text to token ids and back, behind one small value: `load_tokenizer(spec)`.

`spec` is "bytes" or a path; what lies at the path is told by its content, not by its name:

    bytes           no file: ids 0-255 are the UTF-8 bytes, 256 ends a document (vocabulary 257)
    sentencepiece   a SentencePiece .model (Llama 2, Mistral, Mixtral)
    hf              a tokenizer.json, or a folder that holds one (or GPT-2's vocab.json and merges.txt)
    tiktoken        Llama 3's tokenizer.model: lines "<base64> <rank>"; the 256 special tokens follow the ranks

Documents are data: text that spells a special token is encoded as ordinary text, and no token is added at
either end (`eos_id` and `bos_id` are for the caller to place).
"""

import base64
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moe_engine.errors import ConfigError

KINDS = "bytes | SentencePiece .model | folder with tokenizer.json | Llama 3 tiktoken .model"
END_OF_DOCUMENT = 256  # of the bytes tokenizer
EOS_NAMES = ("<|end_of_text|>", "<|endoftext|>", "</s>", "<eos>", "<|im_end|>")
BOS_NAMES = ("<|begin_of_text|>", "<s>", "<bos>")
HF_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "config.json")
LLAMA3_SPLIT = "|".join(
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    )
)
# tiktoken's regular expression recurses on very long runs; Llama 3's own loader cuts text at the same two lengths.
TIKTOKEN_CHARACTERS = 400_000
TIKTOKEN_RUN = re.compile(r"\s{1,25000}|\S{1,25000}")


@dataclass(frozen=True)
class Tokenizer:
    """A loaded tokenizer. `vocab_size` is the highest id + 1; `fingerprint` a SHA-256 of all that decides the ids."""

    kind: str
    spec: str
    vocab_size: int
    eos_id: int
    bos_id: int | None
    fingerprint: str
    encode_text: Callable[[str], Sequence[int] | np.ndarray]
    decode_ids: Callable[[list[int]], str]

    def encode(self, texts: Iterable[str]) -> list[np.ndarray]:
        """One int32 array of token ids per text, without bos or eos."""
        return [np.asarray(self.encode_text(text), dtype=np.int32) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; bytes that are not UTF-8 come out as U+FFFD."""
        return self.decode_ids([int(i) for i in ids])


def load_tokenizer(spec: str | None) -> Tokenizer:
    """The tokenizer that `spec` names (None means "bytes"); a ConfigError says what is missing and what to give."""
    if spec in (None, "bytes"):
        return _bytes_tokenizer()
    path = Path(spec)
    if path.is_dir():
        return _from_folder(spec, path)
    if not path.is_file():
        raise ConfigError(f"tokenizer {spec}: no such file or folder, and nothing is downloaded; expected {KINDS}")
    return _from_file(spec, path, _read(spec, path))


def _from_folder(spec: str, folder: Path) -> Tokenizer:
    if (folder / "tokenizer.json").is_file():
        return _hugging_face(spec, folder, (folder / "tokenizer.json").read_bytes())
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return _hugging_face(spec, folder, None)
    if (folder / "tokenizer.model").is_file():
        return _from_file(spec, folder / "tokenizer.model", _read(spec, folder / "tokenizer.model"))
    models = sorted(folder.glob("*.model"))
    if len(models) == 1:
        return _from_file(spec, models[0], _read(spec, models[0]))
    found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
    raise ConfigError(
        f"tokenizer {spec}: the folder holds {found}; expected tokenizer.json, a .model, or vocab.json and merges.txt"
    )


def _from_file(spec: str, path: Path, content: bytes) -> Tokenizer:
    if re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n", content):
        return _tiktoken(spec, content)
    if content.lstrip()[:1] == b"{":
        return _hugging_face(spec, path.parent, content)
    return _sentencepiece(spec, content)


def _read(spec: str, path: Path) -> bytes:
    try:
        content = path.read_bytes() if path.is_file() else b""
    except OSError as error:
        raise ConfigError(f"tokenizer {spec}: {path} cannot be read ({error.strerror}); expected {KINDS}") from None
    if not content:
        raise ConfigError(f"tokenizer {spec}: {path} is empty, or no regular file; expected {KINDS}")
    return content


def _fingerprint(kind: str, eos_id: int, bos_id: int | None, *contents: bytes) -> str:
    digest = hashlib.sha256(f"{kind} {eos_id} {bos_id}".encode())
    for content in contents:
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()


def _bytes_tokenizer() -> Tokenizer:
    def encode(text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), dtype=np.uint8)

    def decode(ids: list[int]) -> str:
        return bytes(i for i in ids if i < END_OF_DOCUMENT).decode(errors="replace")

    vocab_size = END_OF_DOCUMENT + 1
    name = _fingerprint("bytes", END_OF_DOCUMENT, None)
    return Tokenizer("bytes", "bytes", vocab_size, END_OF_DOCUMENT, None, name, encode, decode)


def _sentencepiece(spec: str, content: bytes) -> Tokenizer:
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError:
        raise ConfigError(f"tokenizer {spec}: needs sentencepiece; pip install sentencepiece") from None
    try:
        model = SentencePieceProcessor(model_proto=content)
    except (RuntimeError, OSError):
        raise ConfigError(
            f"tokenizer {spec}: neither SentencePiece, tokenizer.json nor tiktoken ranks; expected {KINDS}"
        ) from None
    eos_id, bos_id = model.eos_id(), model.bos_id()
    if eos_id < 0:
        raise ConfigError(
            f"tokenizer {spec}: the SentencePiece model has no end-of-text piece; train it with --eos_id >= 0"
        )
    bos = bos_id if bos_id >= 0 else None
    name = _fingerprint("sentencepiece", eos_id, bos, content)
    return Tokenizer("sentencepiece", spec, model.vocab_size(), eos_id, bos, name, model.encode, model.decode)


def _tiktoken(spec: str, content: bytes) -> Tokenizer:
    try:
        from tiktoken import Encoding
    except ImportError:
        raise ConfigError(f"tokenizer {spec}: needs tiktoken; pip install tiktoken") from None
    ranks = {}
    for number, line in enumerate(content.splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise ConfigError(
                f"tokenizer {spec}:{number}: {line[:40]!r} is not '<base64> <rank>'; is the file complete?"
            ) from None
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ConfigError(
            f"tokenizer {spec}: the {len(ranks)} ranks are not 0 to {len(ranks) - 1}; is the file complete?"
        )
    names = ["begin_of_text", "end_of_text", *(f"reserved_special_token_{i}" for i in range(4)), "start_header_id"]
    names += ["end_header_id", "reserved_special_token_4", "eot_id"]
    names += [f"reserved_special_token_{i}" for i in range(5, 251)]
    special = {f"<|{name}|>": len(ranks) + i for i, name in enumerate(names)}
    encoding = Encoding(name="llama3", pat_str=LLAMA3_SPLIT, mergeable_ranks=ranks, special_tokens=special)

    def encode(text: str) -> list[int]:
        if len(text) <= 25_000:
            return encoding.encode_ordinary(text)
        ids = []
        for part in _tiktoken_parts(text):
            ids += encoding.encode_ordinary(part)
        return ids

    bos_id, eos_id = len(ranks), len(ranks) + 1
    name = _fingerprint("tiktoken", eos_id, bos_id, content)
    return Tokenizer("tiktoken", spec, len(ranks) + len(special), eos_id, bos_id, name, encode, encoding.decode)


def _tiktoken_parts(text: str) -> Iterable[str]:
    """Cuts as Llama 3's tokenizer does: every 400,000 characters, and inside a run of 25,000 (non-)blanks."""
    for start in range(0, len(text), TIKTOKEN_CHARACTERS):
        chunk, begin = text[start : start + TIKTOKEN_CHARACTERS], 0
        for run in TIKTOKEN_RUN.finditer(chunk):
            long_run = run.end() - run.start() == 25_000 and run.end() < len(chunk)
            if long_run and chunk[run.end()].isspace() == chunk[run.start()].isspace():
                yield chunk[begin : run.end()]
                begin = run.end()
        yield chunk[begin:]


def _hugging_face(spec: str, folder: Path, content: bytes | None) -> Tokenizer:
    try:
        import tokenizers
    except ImportError:
        raise ConfigError(f"tokenizer {spec}: needs tokenizers; pip install tokenizers") from None
    try:
        if content is not None:
            model = tokenizers.Tokenizer.from_buffer(content)
        else:
            files = str(folder / "vocab.json"), str(folder / "merges.txt")
            bpe = tokenizers.ByteLevelBPETokenizer.from_file(*files)
            model = tokenizers.Tokenizer.from_str(bpe.to_str())
    except Exception as error:  # the Rust library raises plain Exception
        raise ConfigError(f"tokenizer {spec}: not a Hugging Face tokenizer ({error}); expected {KINDS}") from None
    model.no_truncation()
    model.no_padding()
    settings = {name: _json_object(folder / name) for name in HF_SETTINGS}
    _add_missing_tokens(spec, model, settings["tokenizer_config.json"])
    model.encode_special_tokens = True
    eos_id = _special_id(model, settings, "eos_token", EOS_NAMES)
    bos_id = _special_id(model, settings, "bos_token", BOS_NAMES)
    if eos_id is None:
        raise ConfigError(
            f"tokenizer {spec}: no end-of-text token; name one as eos_token in {folder / 'tokenizer_config.json'}"
        )
    files = (
        [content] if content is not None else [(folder / name).read_bytes() for name in ("vocab.json", "merges.txt")]
    )
    vocab_size = max(model.get_vocab(with_added_tokens=True).values()) + 1
    name = _fingerprint("hf", eos_id, bos_id, *files)

    def encode(text: str) -> list[int]:
        return model.encode(text, add_special_tokens=False).ids

    def decode(ids: list[int]) -> str:
        return model.decode(ids, skip_special_tokens=False)

    return Tokenizer("hf", spec, vocab_size, eos_id, bos_id, name, encode, decode)


def _json_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes()) if path.is_file() else None
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _add_missing_tokens(spec: str, model: Any, config: dict[str, Any]) -> None:
    """Tokens that only tokenizer_config.json lists: added in the order of their ids, which must come out as listed."""
    from tokenizers import AddedToken

    listed = {int(i): token["content"] for i, token in config.get("added_tokens_decoder", {}).items()}
    for token_id, text in sorted(listed.items()):
        if model.token_to_id(text) is None:
            model.add_special_tokens([AddedToken(text, special=True, normalized=False)])
        if model.token_to_id(text) != token_id:
            found = model.token_to_id(text)
            raise ConfigError(
                f"tokenizer {spec}: {text} has id {found} in the vocabulary and {token_id} in tokenizer_config.json; "
                "take both files from the same release"
            )


def _special_id(model: Any, settings: dict[str, dict[str, Any]], key: str, names: tuple[str, ...]) -> int | None:
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        token = settings[file].get(key)
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str) and model.token_to_id(text) is not None:
            return model.token_to_id(text)
    token_id = settings["config.json"].get(f"{key}_id")
    if isinstance(token_id, list) and token_id:
        token_id = token_id[0]
    if isinstance(token_id, int):
        return token_id
    return next((model.token_to_id(name) for name in names if model.token_to_id(name) is not None), None)
