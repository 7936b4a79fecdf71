"""Llama 3's tokenizer.model: the ranks of tiktoken, and what the file does not say: how text is split, 256 more tokens.

Other families write the same lines ("<base64> <rank>") and split text otherwise, so only Llama 3's own ranks are taken
for what they are; others have to be named, llama3:PATH.
"""

import base64
import hashlib
import re
from collections.abc import Iterable

from moe_engine.errors import ConfigError
from moe_engine.prepare.tokenizer.convert import ANY_CLASS, tokenizer_json
from moe_engine.prepare.tokenizer.identity import BYTES, fingerprint
from moe_engine.prepare.tokenizer.special import Settings, special_of
from moe_engine.prepare.tokenizer.tokenizer import JSON, LLAMA3, MODEL, Files, Tokenizer, kept_of

RANKS = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")
LLAMA3_RANKS = "c699dec8e1ed508854d8198027352ad3f30dbe71f9b19e69bdce9f0816a3a11d"
LLAMA3_SPLIT = "|".join(
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    )
)
# tiktoken's regular expression recurses on very long runs; Llama 3's own loader cuts text at the same two lengths.
TIKTOKEN_CHARACTERS = 400_000
TIKTOKEN_RUN = re.compile(r"\s{1,25000}|\S{1,25000}")


def tiktoken(spec: str, files: Files, settings: Settings) -> Tokenizer:
    """The tokenizer of Llama 3's ranks, or of those that are said to be split like them."""
    try:
        from tiktoken import Encoding
    except ImportError:
        raise ConfigError(f"tokenizer {spec}: needs tiktoken; pip install tiktoken") from None
    ranks = _ranks(spec, files[MODEL])
    tokens = sorted(ranks, key=lambda token: ranks[token])
    if not spec.startswith(LLAMA3) and digest_of(tokens) != LLAMA3_RANKS:
        raise ConfigError(
            f"tokenizer {spec}: {len(ranks):,} tiktoken ranks that are not Llama 3's; the file does not say how text "
            f"is split before them. Give the family's tokenizer.json, or {LLAMA3}{spec} if it splits as Llama 3 does"
        )
    names = ["begin_of_text", "end_of_text", *(f"reserved_special_token_{i}" for i in range(4)), "start_header_id"]
    names += ["end_header_id", "reserved_special_token_4", "eot_id"]
    names += [f"reserved_special_token_{i}" for i in range(5, 251)]
    added = {f"<|{name}|>": len(ranks) + i for i, name in enumerate(names)}
    encoding = Encoding(name="llama3", pat_str=LLAMA3_SPLIT, mergeable_ranks=ranks, special_tokens=added)

    def encode(text: str) -> list[int]:
        """Long text is cut where Llama 3's own tokenizer cuts it."""
        if len(text) <= 25_000:
            return encoding.encode_ordinary(text)
        ids = []
        for part in _parts(text):
            ids += encoding.encode_ordinary(part)
        return ids

    texts = {i: text for text, i in added.items()}
    size, usual = len(ranks) + len(added), {"eos_token": "<|end_of_text|>", "bos_token": "<|begin_of_text|>"}
    special = special_of(spec, settings, added.get, lambda i: texts.get(i, str(i)), size, usual)
    pieces = {"".join(BYTES[byte] for byte in token): rank for token, rank in ranks.items()}
    name = fingerprint(pieces, encode, special.eos_id)

    def kept() -> dict[str, bytes]:
        """The files, with a tokenizer.json in place of the ranks."""
        content = tokenizer_json(files[MODEL], added, encode)
        assert content is not None  # transformers splits ranks as Llama 3 does
        whole = {name: content for name, content in files.items() if name != MODEL} | {JSON: content}
        return kept_of(whole, settings, special, texts, tokenizer_class=ANY_CLASS)

    return Tokenizer("tiktoken", spec, size, special, name, encode, encoding.decode, kept)


def digest_of(tokens: Iterable[bytes]) -> str:
    """SHA-256 of tokens in the order of their ranks."""
    digest = hashlib.sha256()
    for token in tokens:
        digest.update(base64.b64encode(token) + b"\n")
    return digest.hexdigest()


def _ranks(spec: str, content: bytes) -> dict[bytes, int]:
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
    return ranks


def _parts(text: str) -> Iterable[str]:
    """Cuts as Llama 3's tokenizer does: every 400,000 characters, and inside a run of 25,000 (non-)blanks."""
    for start in range(0, len(text), TIKTOKEN_CHARACTERS):
        chunk, begin = text[start : start + TIKTOKEN_CHARACTERS], 0
        for run in TIKTOKEN_RUN.finditer(chunk):
            long_run = run.end() - run.start() == 25_000 and run.end() < len(chunk)
            if long_run and chunk[run.end()].isspace() == chunk[run.start()].isspace():
                yield chunk[begin : run.end()]
                begin = run.end()
        yield chunk[begin:]
