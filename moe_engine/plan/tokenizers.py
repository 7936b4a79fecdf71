"""Whether the text of a run and its weights speak of the same tokens: an id that means another one trains a ruin.

The tokenizer of the data is written in its manifest. That of the weights lies beside them: in a Hugging Face folder, an
imported checkpoint, OUT/hf of the run that a checkpoint is of, or in the manifest of that checkpoint.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moe_engine.checkpoint.hf.side_files import OF_A_RUN
from moe_engine.checkpoint.manifest import NAME, read_manifest
from moe_engine.config import Run
from moe_engine.data.shards import read_data_manifest
from moe_engine.errors import ConfigError
from moe_engine.prepare.tokenizer.load import holds_tokenizer, load_tokenizer

INSIST = "or insist with --allow-other-tokenizer"


def check_tokenizers(run: Run, checkpoint: tuple[Path, dict[str, Any]] | None) -> None:
    """ConfigError, with both named, when two of a run's tokenizers differ: of its data, its weights, --tokenizer.

    checkpoint: the one that the run goes on from, and its manifest.
    """
    if run.data.allow_other_tokenizer:
        return
    where, first = None, {}
    for place, found in of_data(run):
        if where and found["fingerprint"] != first["fingerprint"]:
            raise ConfigError(
                f"{place} was prepared with {shown(found)} and {where} with {shown(first)}: prepare all data of a "
                f"run with one tokenizer, {INSIST}"
            )
        if where and found.get("add_bos") != first.get("add_bos"):
            raise ConfigError(
                f"of {place} and {where} one was prepared with --add-bos and one without; prepare all of a run's data "
                f"alike, {INSIST}"
            )
        where, first = place, found
    weights = checkpoint[0] if checkpoint else Path(run.train.init_from) if run.train.init_from else None
    theirs = of_weights(weights, checkpoint[1] if checkpoint else None) if weights else None
    if theirs and theirs["fingerprint"] != first["fingerprint"]:
        raise ConfigError(
            f"{where} is text as {shown(first)}, the weights of {weights} know the tokens of {shown(theirs)}: the same "
            f"id is another token there. Give --data that was prepared with --tokenizer {theirs['spec']}, {INSIST}"
        )


def tokenizer_of(run: Run) -> str:
    """The tokenizer that a run's samples are prepared with: --tokenizer, or the one beside its weights. ConfigError
    when there is none."""
    if run.data.tokenizer:
        return run.data.tokenizer
    first = Path(run.train.init_from or "")
    for folder in (first, first.resolve().parent.parent / OF_A_RUN, Path(run.train.out) / OF_A_RUN):
        if (folder is not first or run.train.init_from) and holds_tokenizer(folder):
            return str(folder)
    raise ConfigError(
        "samples need a tokenizer, and none lies beside the weights: give --tokenizer, or --init-from a folder with one"
    )


def of_data(run: Run) -> Iterator[tuple[str, dict[str, Any]]]:
    """The tokenizers that the data was made with, and where that is said."""
    if run.samples.given and not run.data.domains:
        yield "the samples", load_tokenizer(tokenizer_of(run)).described() | {"add_bos": False}
        return
    given = load_tokenizer(run.data.tokenizer) if run.data.tokenizer or not run.data.domains else None
    if given and run.data.tokenizer:
        add_bos = (
            read_data_manifest(Path(run.data.domains[0].path))["tokenizer"].get("add_bos")
            if run.data.domains
            else False
        )
        yield "--tokenizer", given.described() | {"add_bos": add_bos}
    elif given:
        yield "the default corpus, Python's own sources,", given.described() | {"add_bos": False}
    for domain in run.data.domains:
        yield f"--data {domain.path}", read_data_manifest(Path(domain.path))["tokenizer"]


def of_weights(path: Path, manifest: dict[str, Any] | None = None) -> dict[str, Any] | None:
    """The tokenizer of the weights at `path`, a folder or a checkpoint; None where nothing is said of it."""
    if manifest is None and (path / NAME).is_file():
        manifest = read_manifest(path)
    if manifest and manifest.get("tokenizer"):
        return manifest["tokenizer"]
    folder = next((f for f in (path, path.resolve().parent.parent / OF_A_RUN) if holds_tokenizer(f)), None)
    if folder is None:
        return None
    try:
        return load_tokenizer(str(folder)).described()
    except ConfigError as error:
        raise ConfigError(f"the tokenizer beside the weights of {path} cannot be used: {error}; {INSIST}") from None


def shown(tokenizer: dict[str, Any]) -> str:
    """A tokenizer in a message."""
    end = f", end of text {tokenizer['eos_token']} = {tokenizer['eos_id']}" if "eos_token" in tokenizer else ""
    return f"{tokenizer['spec']} (fingerprint {tokenizer['fingerprint'][:12]}{end})"
