"""The corpus of a run that names none: real text on every machine, nothing to download."""

from pathlib import Path

from moe_engine.config import Run
from moe_engine.prepare.pipeline import PrepareOptions, prepare, stdlib_sources

NAME = "stdlib"  # of its one domain


def prepare_default_corpus(folder: Path, run: Run) -> None:
    """The running Python's standard library as tokens under `folder`."""
    options = PrepareOptions(eval_fraction=run.data.eval_fraction, on_bad_row="skip")
    prepare({NAME: stdlib_sources()}, folder, run.data.tokenizer, options, overwrite=True, quiet=True)
