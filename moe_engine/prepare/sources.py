"""What prepared data was made of: each input file as a manifest lists it, and the key that changes with them."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SAMPLE = 1 << 16  # bytes of a file's head, middle and tail that tell whether it is still the same


def source_of(file: Path) -> dict[str, Any]:
    """An input file as a manifest lists it: path, size, time, and a digest of samples."""
    status = file.stat()
    return {
        "path": str(file),
        "bytes": status.st_size,
        "modified_ns": status.st_mtime_ns,
        "sample": _sample(file, status.st_size),
    }


def _sample(file: Path, size: int) -> str:
    """A digest of the file's head, middle and tail; "" for a file that cannot be read, which is a bad row later."""
    digest = hashlib.blake2b(digest_size=16)
    try:
        with open(file, "rb") as stream:
            for start in (0, (size - SAMPLE) // 2, size - SAMPLE):
                stream.seek(max(0, start))
                digest.update(stream.read(SAMPLE))
    except OSError:
        return ""
    return digest.hexdigest()


def key_of(sources: Mapping[str, Sequence[Mapping[str, Any]]], *settings: Any) -> str:
    """Changes when the output would: with a file's path, size, time or sample, or with the settings, which are JSON.

    The path counts because the rest cannot tell every two files apart: copies of one size and time, say, that differ
    between the samples. So a moved input is another input. That is found before anything is replaced and costs at most
    a second preparation; text taken for another's would be trained on without a word. It is the real path, so that
    links and the working folder do not matter, and beside it the name, whose ending tells the format.
    """
    known = {
        name: [
            [os.path.realpath(source["path"]), Path(source["path"]).name, *list(source.values())[1:]]
            for source in found
        ]
        for name, found in sources.items()
    }
    return hashlib.sha256(json.dumps([known, *settings]).encode()).hexdigest()
