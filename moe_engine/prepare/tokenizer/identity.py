"""When two tokenizers are the same: equal vocabularies, equal ids for a text that is hard to split, equal end of text.

Nothing of the files themselves goes in. A tokenizer.json that was saved again, or the tokenizer.model that it was made
of, has the same fingerprint as long as it gives the same ids.
"""

# ruff: noqa: RUF001 (letters that look like others are what is probed)
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence

import numpy as np

PROBE = (
    "The quick brown fox jumps over the lazy dog, doesn't it? I've said: \"No!\" (WE'LL see...)",
    "  two blanks,   three,    four\tone tab\t\ttwo, and blanks at the end   ",
    "\n\nempty lines\n\n\n   \n\t\nand then\r\nmore \n",
    "def f(x):\n    if x > 1:\n        return {'a': [x] * 2}  # über\n    return x\n",
    "for (int i=0;i<10;++i){\n\t\tsum+=a[i]; /* ok */\n\t}\n",
    "0 1 12 123 1234 12345 3.14159 1,234,567 0x7f 2024-01-31 10:59",
    "café Ærø naïve e\u0301 n\u0303 \ufb01n Ａ \u00bd İstanbul ǅ",
    "Привет, мир! Γειά σου. שלום. مرحبا. नमस्ते. สวัสดี 안녕하세요 你好，世界。こんにちは",
    "😀 👩‍👩‍👧 🇫🇷 \u200b\u00a0\u2028\ufeff ▁ \u2581\u2581x",
    "<s> </s> <unk> <pad> <|endoftext|> <|im_start|>user<|im_end|> <|begin_of_text|> <|eot_id|> [INST] <0x0A>",
    "https://example.org/a_b?c=d&e=f#g snake_case camelCase kebab-case C++ a@b.org $5.00 50% ~/.x \\n",
    "x" * 40 + " " * 40 + "=" * 40 + "\n" * 20 + "z",
)

Encode = Callable[[str], Sequence[int] | np.ndarray]


def fingerprint(pieces: Mapping[str, int], encode: Encode, eos_id: int) -> str:
    """SHA-256 of a tokenizer. pieces: the vocabulary without added tokens, bytes in the spelling of `BYTES`."""
    digest = hashlib.sha256()
    for piece, i in sorted(pieces.items(), key=lambda item: item[1]):
        digest.update(f"{i} {piece}\n".encode(errors="surrogatepass"))
    digest.update(json.dumps([eos_id, [ids_of(encode, text) for text in PROBE]]).encode())
    return digest.hexdigest()


def difference(one: Encode, other: Encode) -> str | None:
    """How two tokenizers split the first text of PROBE differently; None where they never do."""
    for text in PROBE:
        ours, theirs = ids_of(one, text), ids_of(other, text)
        if ours != theirs:
            return f"{text[:40]!r} is {len(ours)} tokens in the one and {len(theirs)} in the other"
    return None


def ids_of(encode: Encode, text: str) -> list[int]:
    """Token ids as a list."""
    return [int(i) for i in encode(text)]


def _byte_characters() -> tuple[str, ...]:
    """One printable character for each byte, as GPT-2 writes them: itself where it can be seen, else from U+0100 on."""
    seen = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in seen]
    return tuple(chr(byte) if byte in seen else chr(256 + hidden.index(byte)) for byte in range(256))


BYTES = _byte_characters()
