"""A loaded tokenizer, as one value, and the names of the files that it is read from and kept in."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_engine.prepare.tokenizer.identity import Encode
from moe_engine.prepare.tokenizer.special import Settings, Special

KINDS = "bytes | SentencePiece .model | folder with tokenizer.json | Llama 3 tiktoken .model"
LLAMA3 = "llama3:"
JSON, MODEL, VOCAB, MERGES = "tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt"
VOCABULARIES = (JSON, MODEL, VOCAB, MERGES)
CONFIG = "tokenizer_config.json"
OF_TOKENIZER = (*VOCABULARIES, CONFIG, "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")

Files = Mapping[str, bytes]


@dataclass(frozen=True)
class Tokenizer:
    """A loaded tokenizer. `vocab_size` is the highest id + 1; `fingerprint` see identity.py.

    kept: the files by which readers of Hugging Face folders load the same tokenizer. notes: what the user should know
    of it.
    """

    kind: str
    spec: str
    vocab_size: int
    special: Special
    fingerprint: str
    encode_text: Encode
    decode_ids: Callable[[list[int]], str]
    kept: Callable[[], dict[str, bytes]]
    notes: tuple[str, ...] = ()

    @property
    def eos_id(self) -> int:
        """The id that ends a document."""
        return self.special.eos_id

    @property
    def bos_id(self) -> int | None:
        """The id that may begin a document."""
        return self.special.bos_id

    def described(self) -> dict[str, Any]:
        """What data and checkpoints record of it."""
        said = {"spec": self.spec, "kind": self.kind, "fingerprint": self.fingerprint, "vocab_size": self.vocab_size}
        return said | self.special._asdict()

    def encode(self, texts: Iterable[str]) -> list[np.ndarray]:
        """One int32 array of token ids per text, without bos or eos."""
        return [np.asarray(self.encode_text(text), dtype=np.int32) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; bytes that are not UTF-8 come out as U+FFFD."""
        return self.decode_ids([int(i) for i in ids])


def kept_of(
    files: Files, settings: Settings, special: Special, texts: Mapping[int, str], **changes: str | None
) -> dict[str, bytes]:
    """The tokenizer's own files; tokenizer_config.json names the ends of a text where it did not, with `changes`."""
    kept = {name: files[name] for name in OF_TOKENIZER if name in files}
    before = settings[CONFIG]
    ends = {"eos_token": special.eos_token, "bos_token": texts.get(-1 if special.bos_id is None else special.bos_id)}
    config = {**before, **{key: text for key, text in ends.items() if text and before.get(key) is None}, **changes}
    config = {key: value for key, value in config.items() if key in before or value is not None}
    if config != before:
        kept[CONFIG] = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
    return kept
