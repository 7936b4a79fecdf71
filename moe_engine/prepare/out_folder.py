"""What every preparation keeps in its output folder: the tokenizer, the bad rows; and when the folder may be reused."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_engine.data.shards import MANIFEST, read_data_manifest
from moe_engine.errors import ConfigError, DataError
from moe_engine.prepare.formats import BadRow
from moe_engine.prepare.progress import Progress
from moe_engine.prepare.tokenizer.tokenizer import Tokenizer

BAD_ROWS = "bad_rows.jsonl"


def existing(out: Path, key: str, overwrite: bool) -> dict[str, Any] | None:
    """The manifest of a complete `out` made from the same; ConfigError for another, unless it is to be replaced."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not out.is_dir() or not (out / MANIFEST).is_file():
        raise ConfigError(f"{out}: exists and is not prepared data; choose another output folder")
    manifest = read_data_manifest(out)
    if manifest["key"] == key:
        return manifest
    if overwrite:
        return None
    raise ConfigError(
        f"{out}: holds data made of other files, or with another tokenizer or other options; choose another folder, or "
        "replace it with --overwrite"
    )


def keep_tokenizer(folder: Path, model: Tokenizer) -> dict[str, str]:
    """Writes the tokenizer's files into the prepared folder; the SHA-256 of each."""
    folder.mkdir()
    digests = {}
    for name, content in model.kept().items():
        with open(folder / name, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        digests[name] = hashlib.sha256(content).hexdigest()
    return digests


def report_bad(folder: Path, domain: str, bad: Sequence[BadRow], on_bad_row: str, progress: Progress) -> None:
    """Show and list bad rows; DataError for the first if `on_bad_row` is "stop"."""
    if not bad:
        return
    if on_bad_row == "stop":
        raise DataError(f"{bad[0]}. Mend it, or leave such rows out with --on-bad-row skip")
    with open(folder / BAD_ROWS, "a", encoding="utf-8", errors="backslashreplace") as file:
        for row in bad:
            progress.bad_row(str(row))
            file.write(json.dumps({"domain": domain, **row._asdict()}) + "\n")
