"""What every fault is injected into: a folder of its own, a small corpus, and a seeded source of chance.

A fault is a generator: for each injection it yields None, or one line that says what was lost.

    def bits_flip(arena: Arena, count: int) -> Iterator[str | None]: ...
"""

import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from moe_engine.prepare.pipeline import PrepareOptions, prepare

Injections = Iterator[str | None]


def make_corpus(folder: Path) -> Path:
    """A prepared folder of two domains, prose and code, random words as bytes: no window of 9 occurs twice."""
    draw = random.Random(0)
    for name, words in (
        ("prose", "the of and to in is was that for on"),
        ("code", "def return if else import x y z = ( )"),
    ):
        text = " ".join(f"{draw.choice(words.split())}{draw.randrange(10**6)}" for _ in range(1500))
        (folder / f"{name}.txt").write_text(text)
    files = {name: [folder / f"{name}.txt"] for name in ("prose", "code")}
    prepare(files, folder / "tokens", None, PrepareOptions(eval_fraction=0.1), quiet=True)
    return folder / "tokens"


class Fault(NamedTuple):
    """One row of the battery: how often it is injected in the short and in the long tier (0: left out)."""

    title: str
    inject: "Callable[[Arena, int], Injections]"
    ci: int
    nightly: int


class Arena:
    """A temporary folder, and what the faults of one battery share in it."""

    def __init__(self, root: Path, seed: int = 0) -> None:
        self.root, self.seed = root, seed
        self.draw = random.Random(seed)
        self.shared: dict[str, Any] = {}  # what several faults need, made by the first
        self.made = 0
        self._corpus: Path | None = None

    def begin(self, name: str) -> None:
        """Chance starts anew for each fault, so that it does not depend on which others ran before."""
        self.draw = random.Random(f"{self.seed}/{name}")

    def folder(self, name: str) -> Path:
        """A new, empty folder; the caller may remove it when its injection survived."""
        self.made += 1
        folder = self.root / f"{self.made:05d}-{name}"
        folder.mkdir()
        return folder

    def corpus(self) -> Path:
        """The corpus of `make_corpus`, made once."""
        if self._corpus is None:
            self._corpus = make_corpus(self.folder("corpus"))
        return self._corpus

    def close(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)
