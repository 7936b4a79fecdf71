"""manifest.json: what a checkpoint is, and what each of its files has to be. It vouches for itself.

    {"format": 2, "step", "layout", "tokens", "adam_steps", "run", "run_sha256", "data", "versions",
     "weights": {name: shape}, "files": {name: [bytes, xxh3, sha256]},
     "manifest_sha256": of all bytes before this line}

It is read as bytes first and as JSON only when they are the ones that were written.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moe_engine.checkpoint import folders
from moe_engine.checkpoint.shard import digest_of
from moe_engine.errors import ConfigError, DataError
from moe_engine.host import disk
from moe_engine.host.files import size_below

FORMAT = 2
NAME = "manifest.json"
SEAL = b',\n "manifest_sha256": "'


def write_manifest(folder: Path, content: dict[str, Any]) -> None:
    """Write and sync the manifest of a folder whose other files are complete."""
    body = json.dumps({"format": FORMAT} | content, indent=1).removesuffix("\n}").encode()
    disk.write_file(folder / NAME, [body, SEAL, hashlib.sha256(body).hexdigest().encode(), b'"\n}\n'])


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder. DataError when it is missing or damaged, ConfigError when it is of another format, and
    OSError when it could not be read."""
    path = file_in(folder, NAME)
    text = path.read_bytes()
    body, seal, rest = text.rpartition(SEAL)
    if not seal or rest != hashlib.sha256(body).hexdigest().encode() + b'"\n}\n':
        raise DataError(f"{path}: cut short or changed since it was written")
    try:
        manifest = json.loads(text)
        found = manifest["format"]
    except (ValueError, TypeError, KeyError):
        raise DataError(f"{path}: says nothing of a format; this is no manifest") from None
    if found != FORMAT:
        raise ConfigError(
            f"{folder}: format {found}, this version reads format {FORMAT}; resume with the version that wrote it"
        )
    return manifest


def file_in(folder: Path, name: str) -> Path:
    """Where a file lies that a checkpoint should hold. DataError unless it is a regular file of the folder, or
    of a folder in it."""
    if size_below(folder, name) is None:
        raise DataError(f"{folder}: {name[:80]!r} is missing or no regular file; this is no complete checkpoint")
    return folder / name


def problems_of(
    folder: Path, manifest: dict[str, Any], part: int = 0, parts: int = 1, heartbeat: Callable[[], None] = lambda: None
) -> list[str]:
    """What is wrong with a folder's files, one line each; of `parts` readers, `part` hashes every parts-th file.

    heartbeat: called as it goes on. OSError when a file cannot be read: that says nothing about what it holds.
    """
    problems = []
    expected = manifest["files"]
    if part == 0:
        held = [Path(name) for name in expected if size_below(folder, name) is not None]
        below = {above for name in held for above in name.parents} | {Path()}
        there = {path for sub in below for path in (folder / sub).iterdir()}
        names = {path.relative_to(folder).as_posix() for path in there if not path.name.startswith(".")}
        strays = names - {NAME, *expected, *map(str, below)}
        problems += [f"{folder / name}: not a file of this checkpoint" for name in sorted(strays)]
    named = folders.NAME.fullmatch(folder.name)
    if named and int(named[1]) != manifest["step"]:
        problems.append(f"{folder}: holds step {manifest['step']}; the folder was renamed or copied")
    for name in sorted(expected)[part::parts]:
        count, fast, _ = expected[name]
        try:
            path = file_in(folder, name)
            size = path.stat().st_size
            if size != count:
                problems.append(f"{path}: {size} bytes, written with {count}")
            elif digest_of(path, heartbeat) != (count, fast):
                problems.append(f"{path}: changed since it was written (its xxh3 differs)")
        except DataError as error:
            problems.append(str(error))
    return problems
