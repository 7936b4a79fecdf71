"""The text that an upcycling looks at: for importances and routers, and for the receipt.

Files are read with the parent's own tokenizer and cut into sequences. Without files it is the running Python's standard
library, which every machine has. Everything is read before anything is computed, so that what is wrong with it comes
first.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_engine.config.files import read_mapping
from moe_engine.data.loader import Batch, plain_batch
from moe_engine.errors import ConfigError, DataError
from moe_engine.labels import IGNORE
from moe_engine.prepare.files import list_files
from moe_engine.prepare.formats import BadRow, documents, read_chunks
from moe_engine.prepare.pipeline import stdlib_sources
from moe_engine.prepare.tokenizer.load import Tokenizer, load_tokenizer
from moe_engine.upcycle.methods import SCORED
from moe_engine.upcycle.options import OF_FEATURES, OF_PROMPTS
from moe_engine.upcycle.prompts import ExpertPrompts


class Text(NamedTuple):
    """sample_BS: tokens for importance and routers; prompts, behind bos_id; receipt_BS: tokens to compare on."""

    sample_BS: Tensor | None = None
    prompts: list[ExpertPrompts] | None = None
    bos_id: int = 0
    receipt_BS: Tensor | None = None


def read_text(given: argparse.Namespace, rows: int, vocab_size: int) -> Text:
    """What the method, the router (of `rows` different rows) and the receipt will read."""
    sampled = given.method in SCORED or given.router_init in OF_FEATURES
    prompted = given.router_init in OF_PROMPTS
    if not (sampled or prompted or given.receipt_tokens):
        return Text()
    tokenizer = tokenizer_of(given.hf, given.tokenizer)
    prompts = read_prompts(given.prompts, rows, tokenizer) if prompted else None

    def read(tokens: int) -> Tensor | None:
        return sequences(given.text, tokenizer, tokens, min(given.seq_length, tokens)) if tokens else None

    bos = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
    text = Text(read(given.text_tokens if sampled else 0), prompts, bos, read(given.receipt_tokens))
    return check_ids(text, tokenizer, vocab_size)


def tokenizer_of(folder: Path, given: str | None) -> Tokenizer:
    """The tokenizer of a Hugging Face folder, or the one that was given."""
    try:
        return load_tokenizer(given or str(folder))
    except ConfigError as error:
        raise ConfigError(f"{error}; name the parent's tokenizer with --tokenizer (bytes is one)") from None


def check_ids(text: Text, tokenizer: Tokenizer, vocab_size: int) -> Text:
    """The same text; ConfigError when it holds a token that the model has no row for."""
    largest = [int(t.max()) for t in (text.sample_BS, text.receipt_BS) if t is not None] + [text.bos_id]
    largest += [max(ids, default=0) for expert in text.prompts or () for each in expert for ids in each]
    if max(largest) >= vocab_size:
        raise ConfigError(
            f"--tokenizer {tokenizer.spec}: the text holds token {max(largest)}, the model has {vocab_size}: give the "
            "tokenizer that the model was trained with"
        )
    return text


def read_prompts(path: Path, rows: int, tokenizer: Tokenizer) -> list[ExpertPrompts]:
    """The prompts of a YAML file as token ids; ConfigError for what is no list of `rows` experts with texts."""
    experts = read_mapping(path).get("experts")
    if not isinstance(experts, list) or len(experts) != rows or not all(isinstance(e, dict) for e in experts):
        found = f"{len(experts)}" if isinstance(experts, list) else "no list"
        raise ConfigError(f"--prompts {path}: experts: found {found}, expected a list of {rows} mappings, one a row")

    def ids(number: int, expert: dict[str, Any], key: str) -> list[list[int]]:
        texts = expert.get(key) or []
        if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
            raise ConfigError(f"--prompts {path}: expert {number}: {key}: expected a list of texts")
        return [each.tolist() for each in tokenizer.encode(texts)]

    out = []
    for number, expert in enumerate(experts):
        out.append(ExpertPrompts(*(ids(number, expert, key) for key in ("positive_prompts", "negative_prompts"))))
        if not out[-1].positive:
            raise ConfigError(f"--prompts {path}: expert {number} has no positive_prompts: give at least one")
    return out


def sequences(files: Sequence[str], tokenizer: Tokenizer, tokens: int, length: int) -> Tensor:
    """tokens_BS int64 of `tokens` / `length` sequences of text; DataError if there is less text than one sequence."""
    ids: list[int] = []
    for text in texts(files):
        start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        ids += [*start, *tokenizer.encode([text])[0].tolist(), tokenizer.eos_id]
        if len(ids) >= tokens:
            break
    count = min(len(ids), tokens) // length
    if not count:
        raise DataError(
            f"--text {' '.join(files)} has {len(ids)} tokens, fewer than one sequence of {length}: give more, or a "
            "smaller --seq-length"
        )
    return torch.tensor(ids[: count * length]).view(count, length)


def texts(files: Sequence[str]) -> Iterator[str]:
    """The documents of text, JSON lines or Parquet files, as prepare_data.py reads them."""
    try:
        paths = list_files(files or stdlib_sources()).files
    except (ConfigError, DataError) as error:
        raise type(error)(f"--text {error}") from None
    for path in paths:
        for piece in read_chunks(path):
            if isinstance(piece, BadRow):
                raise DataError(f"--text {piece}")
            for document in documents(piece):
                if isinstance(document, BadRow):
                    raise DataError(f"--text {document}")
                yield document.text


def batches(tokens_BS: Tensor, size: int) -> Iterator[Batch]:
    """`size` sequences at a time, all of domain 0; the last token of each has no label."""
    for tokens in tokens_BS.split(size):
        labels = torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], IGNORE)], dim=1)
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        yield plain_batch(tokens, labels, positions)
