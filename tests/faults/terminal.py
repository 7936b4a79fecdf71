"""Faults of what is printed: names and rows that would move the cursor, forge a line or turn the text around.

G6   every place where text from outside is shown: escapes are printed as escapes, on the line they belong to
"""

import contextlib
import io
import itertools
import json
import runpy
import signal
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path

from moe_engine.log.logger import Logger
from tests.faults.arena import Arena, Injections
from tests.faults.rows import in_folder
from tests.faults.targets import resealed, small_checkpoint

FORGED = "FORGED: all is well"
EVIL = f"\x1b[2J\x1b]0;x\x07\r\n{FORGED}\u202e\u2028\x9b"
ACTS = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # categories of characters that do something to a terminal
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

LAUNCH = Path(__file__).parents[2] / "launch" / "pretrain_moe.py"
Speaker = Callable[[Path], object]


def evil_text(arena: Arena, count: int) -> Injections:
    """G6: each of the places below."""
    places = [*prepared(), *configured(), *checkpoints(), *logged()]
    for what, speak in itertools.islice(itertools.cycle(places), count):
        yield in_folder(arena, what, shown_as_it_is, speak)


def shown_as_it_is(folder: Path, speak: Speaker) -> str | None:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), handlers_kept():
        speak(folder)
    lines = said.getvalue().split("\n")
    if any(line.startswith("FORGED") for line in lines):
        return "a line is forged"
    if found := sorted({c for line in lines for c in line if unicodedata.category(c) in ACTS}):
        return f"{found} reach the terminal"
    return None if any("FORGED" in line for line in lines) else "what came from outside is not shown at all"


@contextlib.contextmanager
def handlers_kept() -> Iterator[None]:
    """The script for runs listens to signals; this process goes on with its own handlers."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def prepared() -> Iterator[tuple[str, Speaker]]:
    """tools/prepare_data.py."""

    def said(*arguments: str, row: bytes = b'{"text": "a b c d e f"}', name: str = "a") -> Speaker:
        def speak(folder: Path) -> None:
            from tools.prepare_data import main

            (folder / f"{name}.jsonl").write_bytes(b'{"text": "0 1 2 3 4 5"}\n' + row)
            (code,) = {main(["--out", str(folder / "out"), "--input", str(folder / f"{name}.jsonl"), *arguments])}
            assert code in (0, 65, 78), code

        return speak

    row = json.dumps({EVIL: 1}).encode()
    yield "a row that stops", said(row=row)
    yield "a row that is left out", said("--on-bad-row", "skip", row=row)
    yield "text that is not JSON", said(row=EVIL.replace("\n", " ").encode())
    yield "the name of a file", said(row=b"{", name=EVIL)
    yield "a file that is not there", said("--input", EVIL)
    yield "the name of a domain", said("--domain", f"{EVIL}=x")
    yield "a tokenizer", said("--tokenizer", EVIL)
    yield "where the shards go", lambda folder: said("--out", str(folder / EVIL))(folder)


def configured() -> Iterator[tuple[str, Speaker]]:
    """launch/pretrain_moe.py, up to where ranks would start."""

    def said(*arguments: str) -> Speaker:
        def speak(folder: Path) -> None:
            main = runpy.run_path(str(LAUNCH), run_name="pretrain_moe")["main"]  # the script, as a user has it
            code = main([argument.replace("FOLDER", str(folder)) for argument in arguments])
            assert code in (0, 65, 78), code

        return speak

    def file(name: str, content: object, *arguments: str) -> Speaker:
        def speak(folder: Path) -> None:
            (folder / name).write_text(json.dumps(content))  # JSON is YAML
            said(*arguments)(folder)

        return speak

    here = f"FOLDER/{EVIL}"
    yield "a section of a configuration", file("a.yaml", {EVIL: {EVIL: 1}}, "--config", "FOLDER/a.yaml")
    yield "a key of a configuration", file("a.yaml", {"train": {EVIL: 1}}, "--config", "FOLDER/a.yaml")
    yield "a value of a configuration", file("a.yaml", {"train": {"steps": EVIL}}, "--config", "FOLDER/a.yaml")
    yield "a configuration's name", file(f"{EVIL}.yaml", {"train": {"x": 1}, "y": 2}, "--config", f"{here}.yaml")
    yield "a configuration that is a list", file(f"{EVIL}.yaml", [1], "--config", f"{here}.yaml")
    yield "a model's name", file(f"{EVIL}.yaml", {"x": 1}, "--model", f"{here}.yaml")
    yield "a model that is not there", said("--model", EVIL)
    yield "a model's keys", file("c.json", {"model_type": "llama", "hidden_act": EVIL}, "--model", "FOLDER/c.json")
    yield "a config.json's name", file(f"{EVIL}.json", {"model_type": 1}, "--model", f"{here}.json")
    yield "a DeepSpeed file's keys", file("d.json", {EVIL: {EVIL: EVIL}}, "--deepspeed", "FOLDER/d.json")
    yield "a DeepSpeed schedule", file("d.json", {"scheduler": {EVIL: 1}}, "--deepspeed", "FOLDER/d.json")
    yield "a DeepSpeed file's name", file(f"{EVIL}.json", {"x": 1}, "--deepspeed", f"{here}.json")
    yield "a setting", said("--set", f"train.steps={EVIL}", "--set", f"train.{EVIL}=1", "--set", EVIL)
    yield "a flag", said(f"--{EVIL}", EVIL)
    yield "a domain", said("--data", f"{EVIL}={EVIL}:1")
    yield "data that is not there", said("--data", f"a={here}", "--dry-run")
    yield "a tokenizer of a run", said("--tokenizer", EVIL, "--data", "a=FOLDER", "--dry-run")
    yield "where a run goes", said("--out", f"/dev/null/{EVIL}")
    yield "the whole configuration", said("--out", EVIL, "--print-config")


def checkpoints() -> Iterator[tuple[str, Speaker]]:
    """tools/inspect_checkpoint.py."""

    def stray(folder: Path) -> None:
        from tools.inspect_checkpoint import main

        (small_checkpoint(folder) / EVIL).write_text("")
        main([str(folder), "--verify"])

    def differs(folder: Path) -> None:
        from tools.inspect_checkpoint import main

        one, other = (small_checkpoint(folder / name) for name in "ab")
        resealed(other, versions={EVIL: EVIL}, weights={EVIL: [1]}, run={EVIL: {EVIL: EVIL}})
        main([str(one), str(other)])

    yield "a file among a checkpoint's", stray
    yield "what two manifests say", differs


def logged() -> Iterator[tuple[str, Speaker]]:
    """A run's console, and the bar of a preparation."""

    def console(_: Path) -> None:
        with Logger(None, True, 10) as log:
            log.info(EVIL)
            log.warn(EVIL)
            log.eval({"step": 1, EVIL: 1.0, "domains": {EVIL: 2.0}})

    def bar(_: Path) -> None:
        from rich.console import Console
        from rich.progress import Progress as Bar

        from moe_engine.prepare.progress import Progress

        with Progress(1, quiet=True) as progress:
            text = io.StringIO()
            progress.bar = Bar(console=Console(file=text, force_terminal=True, color_system="truecolor", width=200))
            markup = f"[red]{FORGED}[/b][link=http://x]"
            progress.bad_row(f"{markup}{EVIL}")
            print("shown" if markup in text.getvalue() else text.getvalue(), text.getvalue())

    yield "a run's console", console
    yield "a bar that reads markup", bar
