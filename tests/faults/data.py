"""Faults on the way from a file to a step: bad input (rows.py), batches that teach nothing, runs that stop.

F3   no labels          the step is skipped by name; the loss is never 0, and nothing of it stays behind
F4   nothing to train   one clear line at once: no tokenizer, no text, too little text, ids out of range
F5   stop and resume    any layout and batch: one order of samples, each of them once an epoch
"""

import base64
import itertools
import json
import math
import random
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moe_engine.config.command_line import load_run
from moe_engine.data.loader import Batch, Loader, OpenDomain, open_domains, plain_batch
from moe_engine.errors import ConfigError, DataError
from moe_engine.parallel.local_ranks import run_on_ranks
from moe_engine.parallel.mesh import build_mesh
from moe_engine.plan.tokenizers import check_tokenizers
from moe_engine.prepare.tokenizer.load import load_tokenizer
from tests.faults.arena import Arena, Fault, Injections
from tests.faults.rows import bad_rows, in_folder, long_lines, make, odd_files, refusal, tried

SECONDS = 2.0  # within which a run that cannot begin says so
LENGTH = 64
SAMPLES = 720  # more than two epochs of the larger domain of a corpus
BATCHES = ((1, 1, 1), (1, 1, 8), (2, 1, 4), (4, 2, 1), (2, 2, 3), (8, 1, 1), (3, 1, 5), (1, 6, 2))  # ranks, acc., micro
NO_LABELS = "no token of the global batch has a label"


def no_labels(arena: Arena, count: int) -> Injections:
    """F3: every micro-batch of the step, or one of two of one rank, or those of one of two ranks."""
    kinds = ((1, 2, "all"), (2, 1, "all"), (1, 2, "one micro-batch"), (2, 1, "one rank"))
    for i in range(count):
        ranks, accumulation, which = kinds[i % len(kinds)]
        zero = i % 3
        label = f"{which} without labels, {ranks} ranks, ZeRO {zero}"
        yield tried(label, blanked, arena, ranks, accumulation, which == "all", zero)


def blanked(arena: Arena, ranks: int, accumulation: int, all_blank: bool, zero: int) -> str | None:
    import moe_engine.train.deepspeed_engine  # noqa: F401 (imported before the ranks are forked)
    from moe_engine.train.evaluation import evaluate
    from moe_engine.train.session import make_engine
    from moe_engine.train.terms import pretraining_terms
    from tests.faults.ranks import run_of, train_step

    micro_batch = 4 // accumulation
    train = {"accumulation": accumulation, "micro_batch": micro_batch, "global_batch": micro_batch * 2}
    run = run_of(arena.corpus(), arena.root, (1, ranks, 1), zero=zero, jitter=False, **train)

    def on_rank(rank: int) -> str | None:
        mesh = build_mesh(1, ranks, 1)
        good = random_batches(ranks * accumulation, micro_batch, run.model.vocab_size)
        blank = [batch._replace(labels_BS=torch.full_like(batch.labels_BS, -100)) for batch in good]
        spoiled = blank if all_blank else [blank[0], *good[1:]]
        engine, fresh = (make_engine(transformer_of(run, mesh), run, mesh) for _ in range(2))
        evaluated = evaluate(engine, mesh, spoiled[rank::ranks])
        assert evaluated is not None
        wanted = evaluated["loss"]
        terms = pretraining_terms(run.model)
        report = train_step(engine, terms, mesh, spoiled[rank::ranks], 1e-2)
        loss = float(report.measures["lm_loss"])
        found = f"skipped: {report.skipped}; loss {loss}, by evaluation {wanted}"
        if not all_blank:
            fine = report.skipped is None and math.isclose(loss, wanted, rel_tol=1e-5)
            return None if fine else found
        if report.skipped != NO_LABELS or not math.isnan(loss) or not math.isnan(wanted):
            return found
        for each in (engine, fresh):
            train_step(each, terms, mesh, good[rank::ranks], 1e-2)
        same = all(torch.equal(a, b) for a, b in zip(engine.names, fresh.names))
        return None if same else "the step after it is not what it would have been"

    return next((problem for problem in run_on_ranks(on_rank, ranks) if problem), None)


def transformer_of(run: Any, mesh: Any) -> torch.nn.Module:
    from moe_engine.model.transformer import Transformer
    from moe_engine.parallel.weight import initialise

    model = Transformer(run.model, mesh, run.train.recompute)
    initialise(model, 0)
    return model


def random_batches(count: int, size: int, vocab_size: int, length: int = 16) -> list[Batch]:
    """The same on every rank."""
    draw = torch.Generator().manual_seed(1)
    positions = torch.arange(length).expand(size, length)
    batches = []
    for _ in range(count):
        tokens = torch.randint(vocab_size, (size, length + 1), generator=draw)
        inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        batches.append(plain_batch(inputs, labels, positions))
    return batches


def nothing_to_train(arena: Arena, count: int) -> Injections:
    """F4: each of the cases below."""
    cases = [*tokenizer_cases(), *data_cases(arena.corpus())]
    for what, action, words in itertools.islice(itertools.cycle(cases), count):
        yield in_folder(arena, what, said_at_once, action, words)


def said_at_once(folder: Path, action: Callable[[Path], object], words: str) -> str | None:
    began = time.monotonic()
    error = refusal(action, folder)
    seconds = time.monotonic() - began
    if not isinstance(error, ConfigError | DataError) or words not in str(error) or "\n" in str(error):
        return f"expected one line with {words!r}, found {error}"
    return f"said after {seconds:.1f} s" if seconds > SECONDS else None


Case = tuple[str, Callable[[Path], object], str]


def tokenizer_cases() -> Iterator[Case]:
    def of(content: bytes) -> Callable[[Path], object]:
        def load(folder: Path) -> object:
            (folder / "t").write_bytes(content)
            return load_tokenizer(str(folder / "t"))

        return load

    yield "no such tokenizer", lambda folder: load_tokenizer(str(folder / "missing")), "no such file or folder"
    yield "a folder without a tokenizer", lambda folder: load_tokenizer(str(folder)), "the folder holds nothing"
    yield "an empty tokenizer", of(b""), "is empty"
    yield "noise as a tokenizer", of(random.Random(0).randbytes(1000)), "neither SentencePiece"
    yield "half a tokenizer.json", of(b'{"model": {"type": "BPE", "vo'), "not a Hugging Face tokenizer"
    yield "half a list of ranks", of(b"YQ== 0\nYg== 1\nYw="), "is the file complete?"


def data_cases(corpus: Path) -> Iterator[Case]:
    def opened(path: Path = corpus, **options: Any) -> list[OpenDomain]:
        return open_domains([("prose", str(path), 1.0)], **options)

    def loader(path: Path = corpus, length: int = LENGTH, micro_batch: int = 1) -> Loader:
        return Loader(opened(path), seed=0, seq_length=length, micro_batch=micro_batch)

    def blank(folder: Path) -> object:
        (folder / "a.txt").write_text(" \n\n\t")
        return make(folder / "a.txt", folder / "out")

    def damaged(folder: Path) -> object:
        shutil.copytree(corpus, folder / "copy")
        for file in (folder / "copy").glob("*.bin"):
            file.write_bytes(b"\xff" * file.stat().st_size)
        return loader(folder / "copy").next_step()

    yield "no prepared data", lambda folder: opened(folder / "missing"), "no such folder of prepared data"
    yield "a folder without a manifest", opened, "holds no manifest.json"
    yield "nothing to prepare", lambda folder: make(folder, folder / "out"), "no file to read"
    yield "blank text", blank, "no text in 1 files"
    yield "less text than a window", lambda _: loader(length=10**6), "do not fill one window"
    yield "less text than a global batch", lambda _: loader(micro_batch=10**4), "and a step of 10000 sequences takes"
    yield "a model of too few ids", lambda _: opened(vocab_size=256), "set model.vocab_size >= 257"
    yield "ids that no tokenizer has", damaged, "is outside the vocabulary of 257"

    def other_tokens(folder: Path) -> object:
        ranks = (f"{base64.b64encode(bytes([byte])).decode()} {byte}" for byte in range(256))
        (folder / "t.model").write_text("\n".join(ranks))
        tokenizer = ("--tokenizer", f"llama3:{folder / 't.model'}")
        return check_tokenizers(load_run(["--data", f"prose={corpus}", *tokenizer], None), None)

    yield "another tokenizer", other_tokens, "was prepared with bytes"


def stops(arena: Arena, count: int) -> Injections:
    """F5: the loaders end at random steps, and others of a random layout and batch go on from their state."""
    domains = open_domains([("prose", str(arena.corpus()), 3.0), ("code", str(arena.corpus()), 1.0)])
    for seed in range(count):
        yield tried(f"seed {seed}", in_one_order, domains, seed, arena.draw)


def in_one_order(domains: list[OpenDomain], seed: int, draw: random.Random) -> str | None:
    found: list[tuple[int, bytes, bytes]] = []
    state: dict[str, Any] | None = None
    while len(found) < SAMPLES:
        batch = draw.choice(BATCHES)
        ranks = loaders(domains, seed, batch)
        for rank in ranks if state else []:
            rank.load_state(json.loads(json.dumps(state)))
        for _ in range(draw.randrange(1, 12)):
            found += global_batch(ranks, batch)
        states = [rank.state() for rank in ranks]
        state = states[0]
        if any(other != state for other in states):
            return f"ranks of {batch} disagree on the state: {states}"
        if draw.randrange(2):
            global_batch(ranks, batch)  # a step that no checkpoint holds
    alone = loaders(domains, seed, (1, 1, 1))
    if any(sample != global_batch(alone, (1, 1, 1))[0] for sample in found):
        return "the order is not that of a run that never stopped"
    return next(filter(None, (once_an_epoch(domain, d, found) for d, domain in enumerate(domains))), None)


def loaders(domains: list[OpenDomain], seed: int, batch: tuple[int, int, int]) -> list[Loader]:
    ranks, accumulation, micro_batch = batch
    options: dict[str, Any] = {
        "seed": seed,
        "seq_length": LENGTH,
        "micro_batch": micro_batch,
        "accumulation": accumulation,
    }
    return [Loader(domains, **options, data_rank=rank, data_size=ranks) for rank in range(ranks)]


def global_batch(ranks: list[Loader], batch: tuple[int, int, int]) -> list[tuple[int, bytes, bytes]]:
    """(domain, tokens, labels) of a step, in the order of its samples."""
    steps = [rank.next_step() for rank in ranks]
    micro_batches = [step[a] for a in range(batch[1]) for step in steps]
    return [
        (int(domain), tokens.numpy().tobytes(), labels.numpy().tobytes())
        for one in micro_batches
        for domain, tokens, labels in zip(one.domain_B, one.tokens_BS, one.labels_BS)
    ]


def once_an_epoch(domain: OpenDomain, number: int, found: list[tuple[int, bytes, bytes]]) -> str | None:
    """In every whole epoch of a domain of one document, each window of it comes once."""
    text = domain.dataset.read(0, 0, domain.dataset.tokens).astype(np.int64)
    windows = sorted(text[i : i + LENGTH].tobytes() for i in range(0, len(text) - LENGTH, LENGTH))
    read = [tokens for of, tokens, _ in found if of == number]
    for start in range(0, len(read) - len(windows) + 1, len(windows)):
        if sorted(read[start : start + len(windows)]) != windows:
            return f"epoch {start // len(windows)} of {domain.name} leaves out or repeats a window"
    return None


DATA: dict[str, Fault] = {
    "F1": Fault("one bad row of a file", bad_rows, 60, 120),
    "F2": Fault("odd text, cut files, noise", odd_files, 200, 1000),
    "F2-long": Fault("a line of 100 MB", long_lines, 0, 3),
    "F3": Fault("no labels in a step, a micro-batch, a rank", no_labels, 4, 4),
    "F4": Fault("no tokenizer, no data, too little, ids out of range", nothing_to_train, 15, 15),
    "F5": Fault("stop and resume on another layout and batch", stops, 20, 40),
}
