"""One row of a batch before it is filled up to the sequence length, and how rows are stacked."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from moe_engine.labels import IGNORE

NO_LABEL = -1  # of a token whose sample has no expert label


class Row(NamedTuple):
    """Each int64 [n], n <= S. labels are shifted already; positions restart where a document may not see the last."""

    tokens: np.ndarray
    labels: np.ndarray
    positions: np.ndarray
    expert_label: np.ndarray


def row_of(tokens: np.ndarray, starts: np.ndarray, document_mask: bool) -> Row:
    """A window of a text stream, n + 1 tokens, of which starts[i] begin a document.

    With document_mask the first token of a document is not predicted, and positions restart there.
    """
    count = max(len(tokens) - 1, 0)
    labels, positions = tokens[1:].astype(np.int64), np.arange(count)
    if document_mask:
        labels[starts[1:]] = IGNORE
        begins = np.where(starts[:count], positions, 0)
        positions = positions - np.maximum.accumulate(begins)
    return Row(tokens[:count], labels, positions, np.full(count, NO_LABEL))


def joined(rows: Sequence[Row]) -> Row:
    """Rows end to end."""
    return Row(*(np.concatenate(parts) for parts in zip(*rows))) if rows else EMPTY


EMPTY = Row(*(np.empty(0, np.int64) for _ in Row._fields))


def stacked(rows: Sequence[Row], seq_length: int, restart: Sequence[bool]) -> tuple[np.ndarray, ...]:
    """The fields of `rows`, each int64 [B, S]; a shorter row is filled up with token 0 that is not counted.

    restart: of each row, whether what is filled up is a document of its own.
    """
    size = len(rows), seq_length
    tokens, labels = np.zeros(size, np.int64), np.full(size, IGNORE, np.int64)
    positions, expert_label = np.tile(np.arange(seq_length), (len(rows), 1)), np.full(size, NO_LABEL, np.int64)
    for i, row in enumerate(rows):
        n = len(row.tokens)
        tokens[i, :n], labels[i, :n], positions[i, :n], expert_label[i, :n] = row
        if restart[i]:
            positions[i, n:] -= n
    return tokens, labels, positions, expert_label
