"""The text that an upcycling looks at: for importances and routers, and for the receipt.

Files are read with the parent's own tokenizer and cut into sequences. Without files it is the running Python's standard
library, which every machine has.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from moe_engine.data.loader import IGNORED, Batch
from moe_engine.data.tokenizer import Tokenizer, load_tokenizer
from moe_engine.errors import ConfigError, DataError
from moe_engine.prepare.formats import BadRow, documents, list_files, read_pieces
from moe_engine.prepare.pipeline import stdlib_sources


def tokenizer_of(folder: Path, given: str | None, vocab_size: int) -> Tokenizer:
    """The tokenizer of a Hugging Face folder, or the one that was given; its ids must fit the model."""
    try:
        tokenizer = load_tokenizer(given or str(folder))
    except ConfigError as error:
        raise ConfigError(f"{error}; name a tokenizer with --tokenizer (bytes is one)") from None
    if tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            f"--tokenizer {tokenizer.spec} has {tokenizer.vocab_size} ids, more than the model's {vocab_size}"
        )
    return tokenizer


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
        raise DataError(f"the text has {len(ids)} tokens, fewer than one sequence of {length}: give more --text")
    return torch.tensor(ids[: count * length]).view(count, length)


def texts(files: Sequence[str]) -> Iterator[str]:
    """The documents of text, JSON lines or Parquet files, as prepare_data.py reads them."""
    for path in list_files(files or stdlib_sources()):
        for piece in read_pieces(path):
            if isinstance(piece, BadRow):
                raise DataError(str(piece))
            for document in documents(piece):
                if isinstance(document, BadRow):
                    raise DataError(str(document))
                yield document.text


def batches(tokens_BS: Tensor, group_B: Tensor, size: int = 8) -> Iterator[Batch]:
    """Sequences as batches whose domain is their group; the last token of each has no label."""
    for tokens, group in zip(tokens_BS.split(size), group_B.split(size), strict=True):
        labels = torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], IGNORED)], dim=1)
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        yield Batch(tokens, labels, positions, group)
