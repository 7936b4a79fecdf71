"""The README is true: its commands run, and the files, flags, keys, targets and codes that it names exist.

Commands come from the ```sh blocks, in order, and run in an empty folder that holds links to the clone: launches in
this process with --dry-run for as many ranks as their torchrun would start (the first of one process really trains,
two steps), prepare_data really, on text made here, `make` with -n. The last tests put mistakes into the text and
expect complaints.
"""

import contextlib
import importlib
import io
import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

from launch.finetune_moe import ALIASES, SETTINGS, SWITCHES
from moe_engine.config.command_line import build_parser
from moe_engine.config.messages import KEYS
from moe_engine.errors import EngineError
from moe_engine.log.console import progress_line
from moe_engine.prepare.tokenizer import byte_files
from tests.checkpoint.hf.small import save, theirs

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
LINKED = ("configs", "launch", "tools")
# of argparse, pip, TensorBoard and Slurm
FOREIGN_FLAGS = {"--help", "--no-build-isolation", "--no-deps", "--host", "--logdir", "--nodes"}
SUFFIXES = (".py", ".md", ".cpp", ".yaml", ".sbatch")


def blocks(text: str, kind: str) -> Iterator[str]:
    """The fenced blocks of one kind."""
    yield from re.findall(rf"^```{kind}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[list[str]]:
    """Every command of the sh blocks as words, without comments."""
    lines = (line for block in blocks(text, "sh") for line in block.replace("\\\n", " ").splitlines())
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@cache
def help_of(script: str, *words: str) -> str:
    """What `python SCRIPT WORDS --help` prints."""
    page, arguments = io.StringIO(), sys.argv
    sys.argv = [script, *words, "--help"]
    try:
        with contextlib.redirect_stdout(page), pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / script), run_name="__main__")
    finally:
        sys.argv = arguments
    assert stop.value.code == 0
    return page.getvalue()


@cache
def torchrun_flags() -> set[str]:
    from torch.distributed.run import get_args_parser

    return {option for action in get_args_parser()._actions for option in action.option_strings}


@cache
def known_flags() -> set[str]:
    """The flags of the launcher, of every tool, of the fault battery and of torchrun."""
    programs = ["tests/faults/__main__.py", *(f"tools/{path.name}" for path in (ROOT / "tools").glob("*.py"))]
    pages = [build_parser().format_help(), *map(help_of, programs), help_of("tools/prepare_data.py", "samples")]
    return (
        FOREIGN_FLAGS
        | {*ALIASES, *SETTINGS, *SWITCHES}
        | torchrun_flags()
        | {flag for page in pages for flag in re.findall(r"--[a-z][\w-]*", page)}
    )


def exists(path: str) -> bool:
    return any((root / path.rstrip("/")).exists() for root in (ROOT, ROOT / "moe_engine"))


def tree_paths(block: str) -> Iterator[str]:
    """The paths of an annotated tree: two columns, two spaces of indentation a level."""
    stack: list[str] = []
    for line in block.splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        stack[depth:] = [name]
        yield "".join(stack)


def named_paths(text: str) -> Iterator[str]:
    """What the text names as a file or folder of the clone."""
    yield from re.findall(r"\]\((?!http|#)([^)#]+)", text)
    tops = {path.name for path in ROOT.iterdir()} - {"data", "runs"}
    for word in re.findall(r"(?<![\w./])[\w.-]+(?:/[\w.*-]*)*(?![\w/])", text):
        word = word.rstrip(".")
        if word[:1] in ".-" or "*" in word:
            continue
        if word.endswith(SUFFIXES) or ("/" in word and word.partition("/")[0] in tops):
            yield word


def mistakes(text: str) -> list[str]:
    """What the text names and the repository does not have."""
    found = [f"flag {f}" for f in re.findall(r"(?<![\w-])--[a-z][\w-]*", text) if f not in known_flags()]
    tree = next((b for b in blocks(text, "text") if b.startswith("moe_engine/")), "")
    rest = text.replace(tree, "") if tree else text
    names = {path.name for folder in LINKED for path in (ROOT / folder).rglob("*")}
    names |= {path.name for path in (*ROOT.glob("*"), *(ROOT / "tests").glob("*"), *(ROOT / "moe_engine").glob("*"))}
    paths = [*named_paths(rest), *tree_paths(tree)]
    found += [f"path {path}" for path in paths if not exists(path) and ("/" in path or path not in names)]
    found += [f"path {path}" for path in re.findall(r"\b\w+\.py\b", tree) if path not in names]
    for section, key in re.findall(rf"(?<![\w./])({'|'.join(KEYS)})\.(\w+)", text):
        if key not in KEYS[section] and key != "py":
            found.append(f"key {section}.{key}")
    targets = re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE)
    found += [f"target {t}" for t in re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE) if t not in targets]
    return list(dict.fromkeys(found))


class Checker:
    """Runs the commands of a text in `folder`, one after the other; each answers with an exit code or an assertion."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.patch, self.launches, self.trained = monkeypatch, 0, False
        self.folder = folder
        for name in LINKED:
            (folder / name).symlink_to(ROOT / name)
        mixtral = theirs(
            "mixtral", vocab_size=512, num_local_experts=8, eos_token_id=256, bos_token_id=None
        )  # what the reader has, small
        save(mixtral, folder / "Mixtral-8x7B-v0.1", shard="1GB", side=False)
        for name, content in byte_files.files().items():
            (folder / "Mixtral-8x7B-v0.1" / name).write_bytes(content)
        monkeypatch.chdir(folder)
        monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")  # the launcher sets it: put back after the test

    def run(self, words: list[str]) -> int:
        while "=" in words[0]:  # environment
            words = words[1:]
        program, *rest = words
        match program:
            case "make":
                done = subprocess.run(["make", "-n", *rest], cwd=ROOT, capture_output=True, text=True, timeout=60)
                return done.returncode
            case "torchrun":
                return self.torchrun(rest)
            case "python" | "python3" if rest[0] == "-m":
                return self.module(rest[1], rest[2:])
            case "python" if rest[0] == "launch/pretrain_moe.py":
                return self.launch(rest[1:], ranks=None)
            case "python":
                return self.tool(rest[0], rest[1:])
            case "pip":
                return self.pip(rest)
            case ".":
                return 0 if rest == [".venv/bin/activate"] else 1
        raise AssertionError(f"a command that this test cannot judge: {shlex.join(words)}")

    def torchrun(self, words: list[str]) -> int:
        at = words.index("launch/pretrain_moe.py")
        given = dict(zip(words[:at:2], words[1:at:2], strict=True))
        assert given.keys() <= torchrun_flags(), given
        return self.launch(words[at + 1 :], int(given.get("--nnodes", 1)) * int(given["--nproc_per_node"]))

    def launch(self, words: list[str], ranks: int | None) -> int:
        self.launches += 1
        if ranks is None and not self.trained:
            self.trained = True
            command = [
                sys.executable,
                "launch/pretrain_moe.py",
                *words,
                "--steps",
                "2",
                "--set",
                "train.eval_batches=1",
            ]
            done = subprocess.run(command, capture_output=True, text=True, timeout=240)
            assert "Step 2/2 | Loss: " in done.stdout, done.stdout + done.stderr
            return done.returncode
        world = {} if ranks is None else {"RANK": "0", "WORLD_SIZE": str(ranks)}
        with self.patch.context() as patch:
            for name, value in world.items():
                patch.setenv(name, value)
            return importlib.import_module("launch.pretrain_moe").main([*words, "--dry-run"])

    def tool(self, script: str, words: list[str]) -> int:
        assert (ROOT / script).is_file(), script
        if script == "tools/prepare_data.py":
            return self.prepare(importlib.import_module("tools.prepare_data"), words)
        text = help_of(script) + (build_parser().format_help() if script == "tools/verify_layout.py" else "")
        missing = [word for word in words if word.startswith("--") and not re.search(rf"{word}\b", text)]
        missing += [word for word in words if word.startswith("configs/") and not (ROOT / word).is_file()]
        return 2 if missing else 0

    def prepare(self, module: ModuleType, words: list[str]) -> int:
        """Really, on text of our own under the names that the command reads."""
        reads = [word.partition("=")[2] if "=" in word else word for word in words[: words.index("--out")]]
        for name in (name for name in reads if not name.startswith("--")):
            path = self.folder / name / "a.txt" if name.endswith("/") else self.folder / name
            path.parent.mkdir(exist_ok=True)
            path.write_text("".join(f"{name} says: {i} times {i} is {i * i}\n" for i in range(2000)))
        return module.main([*words, "--quiet"])

    def module(self, name: str, words: list[str]) -> int:
        if name == "venv":
            return 0 if words == [".venv"] else 1
        line = re.search(rf"-m {name} (.+)", MAKEFILE)
        assert line, name
        return 0 if shlex.join(words) == shlex.join(shlex.split(line[1])) or name != "pytest" else 1

    def pip(self, words: list[str]) -> int:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
        if words[-2:-1] == ["-e"]:
            extra = re.fullmatch(r"\.\[(\w+)\]", words[-1])
            return 0 if extra and extra[1] in project["project"]["optional-dependencies"] else 1
        wanted = {*project["project"]["dependencies"], *project["build-system"]["requires"], "wheel", "ninja"}
        return 0 if words[0] == "install" and set(words[1:]) <= wanted else 1


def test_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    checker = Checker(tmp_path, monkeypatch)
    found = commands(README)
    assert {words[0] for words in found} >= {"make", "torchrun", "python", "pip"}
    for words in found:
        assert checker.run(words) == 0, f"{shlex.join(words)}\n{''.join(capfd.readouterr())}"
    assert checker.launches >= 8 and (tmp_path / "runs" / "first" / "checkpoints" / "latest").is_file()


def test_everything_named_exists() -> None:
    assert mistakes(README) == []


def test_tree_leaves_out_no_package() -> None:
    tree = next(block for block in blocks(README, "text") if block.startswith("moe_engine/"))
    packages = {f"moe_engine/{path.parent.name}/" for path in (ROOT / "moe_engine").glob("*/__init__.py")}
    folders = {f"{name}/" for name in (*LINKED, "csrc", "docs", "tests")}
    assert set(tree_paths(tree)) >= packages | folders
    assert {path.name for path in (ROOT / "tools").glob("*.py")} <= set(re.findall(r"\w+\.py", tree))


def test_exit_codes_are_those_of_the_errors() -> None:
    table = re.search(r"^\| code \| meaning \|\n(.+?)\n\n", README, re.MULTILINE | re.DOTALL)
    assert table
    codes = {int(code) for code in re.findall(r"^\| (\d+) ", table[1], re.MULTILINE)}
    assert codes == {0, EngineError.exit_code, *(error.exit_code for error in EngineError.__subclasses__())}


def test_sample_line_has_the_form_of_the_progress_line() -> None:
    row = {"step": 120, "loss": 2.3748, "lr": 9.327e-4, "lm_loss": 2.3636, "grad_norm": 0.490}
    assert f"{progress_line(row, 180)} | ..." in README


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("use `--bogus-flag 3`", "flag --bogus-flag"),
        ("see [this](docs/missing.md)", "path docs/missing.md"),
        ("see tools/convert_nothing.py", "path tools/convert_nothing.py"),
        ("```text\nmoe_engine/   the engine\n  nowhere/     nothing\n```", "path moe_engine/nowhere/"),
        ("set `train.stepz`", "key train.stepz"),
        ("```sh\nmake tea\n```", "target tea"),
    ],
)
def test_mistakes_are_found(text: str, expected: str) -> None:
    assert mistakes(text) == [expected]


@pytest.mark.parametrize(
    "line",
    [
        "make tea",
        "python tools/bench_step.py --pear transformers",
        "python tools/verify_layout.py --config configs/runs/missing.yaml",
        "python tools/prepare_data.py --domain nothing --out runs/x",
        "torchrun --nproc_per_node 8 launch/pretrain_moe.py --ep 3",
        "torchrun --nproc_per_node 8 launch/pretrain_moe.py --data runs/nowhere",
        "torchrun --nproc_per_node 8 launch/pretrain_moe.py --stepz 3",
        'pip install "torch<2"',
        'pip install -e ".[all]"',
        "python -m pytest -q -m gpu",
    ],
)
def test_wrong_commands_fail(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checker = Checker(tmp_path, monkeypatch)
    checker.trained = True  # dry runs only
    assert checker.run(shlex.split(line)) != 0


def test_unknown_programs_are_not_waved_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError, match="cannot judge"):
        Checker(tmp_path, monkeypatch).run(["curl", "somewhere"])
    assert "WORLD_SIZE" not in os.environ
