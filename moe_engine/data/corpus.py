"""The text of a run: its domains, opened for training and for evaluation."""

from moe_engine.config import Run
from moe_engine.data.loader import OpenDomain, open_domains
from moe_engine.data.tokenizer import load_tokenizer
from moe_engine.errors import DataError


def open_corpus(run: Run) -> tuple[list[OpenDomain], list[OpenDomain]]:
    """Training and held-out domains of a run; its tokenizer, when given, must be the one that made the data."""
    fingerprint = load_tokenizer(run.data.tokenizer).fingerprint if run.data.tokenizer else None
    named = [(domain.name, domain.path, domain.weight) for domain in run.data.domains]
    train = open_domains(named, "train", fingerprint, run.model.vocab_size)
    try:
        held_out = open_domains(named, "eval", fingerprint, run.model.vocab_size)
    except DataError:
        held_out = []
    return train, [domain for domain in held_out if domain.dataset.tokens > 1]
