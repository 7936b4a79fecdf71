"""G2: names in manifests, and files, that lead out of their folder, to a device, or nowhere. All are refused with an
error of the engine; none is followed or waited for."""

import itertools
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from moe_engine.checkpoint.find import find_checkpoint, verify
from moe_engine.checkpoint.manifest import NAME
from moe_engine.checkpoint.open import Checkpoint
from moe_engine.config.command_line import load
from moe_engine.data.shards import MANIFEST
from moe_engine.errors import ConfigError, DataError
from moe_engine.prepare.tokenizer.load import load_tokenizer
from tests.faults.arena import Arena, Injections
from tests.faults.rows import in_folder, make, refusal
from tests.faults.targets import (
    ALONE,
    SHARD,
    entry_of,
    read_data,
    resealed,
    rewritten,
    small_checkpoint,
    small_data,
    within,
)

SECONDS = 2.0
LONGEST = 1000  # characters of a message, which shows no name of 70,000
Wrong = Callable[[Path, Path], str]


def paths(arena: Arena, count: int) -> Injections:
    """G2: each kind of wrong name, in a checkpoint and in prepared data; then files that no manifest names."""
    named = [(f"{kind} in {where}", attack, WRONG[kind]) for kind in WRONG for where, attack in ATTACKS.items()]
    unnamed = [(f"{kind} as {file}", partial(no_file, file), NO_FILES[kind]) for file in UNNAMED for kind in NO_FILES]
    for what, attack, wrong in itertools.islice(itertools.cycle([*named, *unnamed]), count):
        yield in_folder(arena, what, attack, wrong)


def elsewhere(folder: Path, file: Path) -> Path:
    """The file, moved out of the folder: whatever reads it now has followed the name."""
    return Path(shutil.move(file, folder.parent / f"outside{file.suffix}"))


def linked(folder: Path, file: Path) -> str:
    file.symlink_to(elsewhere(folder, file))
    return file.name


def linked_to_a_device(_: Path, file: Path) -> str:
    file.unlink(missing_ok=True)
    file.symlink_to("/dev/zero")
    return file.name


def piped(_: Path, file: Path) -> str:
    file.unlink(missing_ok=True)
    os.mkfifo(file)
    return file.name


def a_folder(_: Path, file: Path) -> str:
    file.unlink()
    file.mkdir()
    return file.name


def below(folder: Path, file: Path) -> str:
    (folder / ".sub").mkdir()
    shutil.move(file, folder / ".sub" / file.name)
    return f".sub/{file.name}"


# what is done to a folder and the one file that its manifest names -> the name that the manifest gives instead
WRONG: dict[str, Wrong] = {
    "a parent": lambda folder, file: f"../{elsewhere(folder, file).name}",
    "an absolute path": lambda folder, file: str(elsewhere(folder, file).absolute()),
    "a path below": below,
    "a link": linked,
    "a link to a device": linked_to_a_device,
    "a device": lambda folder, file: (elsewhere(folder, file), "/dev/zero")[1],
    "a pipe": piped,
    "a folder": a_folder,
    "backslashes": lambda folder, file: f"..\\{elsewhere(folder, file).name}",
    "percent signs": lambda folder, file: f"%2e%2e%2f{elsewhere(folder, file).name}",
    "NUL": lambda folder, file: f"../{elsewhere(folder, file).name}\0{file.name}",
    "a huge name": lambda folder, file: (elsewhere(folder, file), "a" * 70_000)[1],
}


def wrong_checkpoint(place: Path, wrong: Wrong) -> str | None:
    folder = small_checkpoint(place)
    count, *digests = entry_of((folder / SHARD).read_bytes())
    name = wrong(folder, folder / SHARD)
    endless = name == "/dev/zero" or (folder / SHARD).is_fifo() or (folder / SHARD).is_char_device()
    resealed(folder, files={name: [0 if endless else count, *digests]})  # the size that the system gives
    problems = within(SECONDS, verify, folder, ALONE)
    if not problems or any(len(problem) > LONGEST for problem in problems):
        return f"verification says {problems}"
    actions: tuple[Callable[[], object], ...] = (
        lambda: find_checkpoint(str(folder), place, ALONE, [].append),
        lambda: Checkpoint(folder),
    )
    found = [within(SECONDS, refusal, action) for action in actions]
    return None if all(isinstance(error, DataError) for error in found) else f"it is read: {found}"


def wrong_data(place: Path, wrong: Wrong) -> str | None:
    folder = small_data(place)
    tokens, index = (folder / f"d-train-00000.{suffix}" for suffix in ("bin", "idx"))
    name = wrong(folder, tokens)
    for beside in (folder.parent / "outside.idx", folder / ".sub" / index.name):
        if beside.parent.is_dir():
            shutil.copy(index, beside)
    rewritten(folder, shard={"file": name})
    error = within(SECONDS, refusal, read_data, folder)
    return None if isinstance(error, DataError) and len(str(error)) < LONGEST else f"the tokens are read: {error}"


ATTACKS = {"a checkpoint": wrong_checkpoint, "prepared data": wrong_data}
NO_FILES: dict[str, Wrong] = {"a pipe": piped, "a link to a device": linked_to_a_device}
# what is read without a manifest that names it: where it lies, and what reads it
UNNAMED: dict[str, tuple[str, Callable[[Path, Path], object]]] = {
    "a checkpoint's manifest": (
        f"step-00000003/{NAME}",
        lambda place, _: find_checkpoint("auto", place, ALONE, [].append),
    ),
    "a manifest of tokens": (f"tokens/{MANIFEST}", lambda _, file: read_data(file.parent)),
    "an index": ("tokens/d-train-00000.idx", lambda _, file: read_data(file.parent)),
    "text of a folder": ("text/a.txt", lambda place, file: make(file.parent, place / "out")),
    "a tokenizer": ("text/t.model", lambda _, file: load_tokenizer(str(file))),
    "a tokenizer of a folder": ("text/t.model", lambda _, file: load_tokenizer(str(file.parent))),
    "a configuration": ("text/c.yaml", lambda _, file: load(["--config", str(file)], 1)),
    "a model's configuration": ("text/config.json", lambda _, file: load(["--model", str(file.parent)], 1)),
}


def no_file(which: str, place: Path, spoil: Wrong) -> str | None:
    small_checkpoint(place)
    small_data(place)
    (place / "text").mkdir()
    name, action = UNNAMED[which]
    spoil(place, place / name)
    error = within(SECONDS, refusal, action, place, place / name)
    return None if isinstance(error, ConfigError | DataError) else f"not refused: {error}"
