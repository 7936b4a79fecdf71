"""What tools/upcycle.py refuses: one line that names flag, value and remedy, its exit code, and nothing written."""

from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.hf.small import save, theirs
from tests.tools.upcycling import SIZES, make_home, run


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_home(tmp_path_factory.mktemp("home"))


BAD: dict[str, tuple[str, list[Any], str]] = {
    "method": ("copied", [], "--method copied: expected copy, half, "),
    "router": ("copy", ["--router-init", "xaver"], "--router-init xaver: expected normal, "),
    "top_k": ("copy", ["--top-k", 5], "--top-k 5: valid are 1 to 4, the experts"),
    "no experts": ("copy", ["--experts", 0, "--top-k", 1], "--experts 0: expected 1 or more"),
    "partition": ("random", ["--experts", 3], "--experts 3 does not divide the 40 neurons of a layer: valid are 1, "),
    "shares": ("residual", ["--experts", 5], "--experts + --residual-experts = 6 does not divide the 40 neurons"),
    "granularity": ("virtual", ["--granularity", 4], "--granularity 4 must divide --experts 4 and --top-k 2"),
    "shards": ("virtual", ["--experts", 9, "--top-k", 3, "--granularity", 3], "--granularity 3 does not divide the 40"),
    "width": ("sharing_inter", ["--expert-width", 30], "--expert-width 30: --residual-experts + 1 of that"),
    "ends": ("copy", ["--dense-ends", 2], "--dense-ends 2 leaves none of 3 layers to turn: valid are 0 to 1"),
    "not a number": ("copy", ["--noise-std", "nan"], "--noise-std nan: expected a finite number"),
    "shard size": ("copy", ["--shard-gb", 0], "--shard-gb 0.0: expected more than 0"),
    "router std": ("copy", ["--router-std", -1], "--router-std -1.0: expected 0 or more"),
    "projection": ("clustering", ["--projection", "down"], "--projection 'down': valid are gate and up"),
    "attention": ("copy", ["--attention-experts", 3], "--attention-experts 3: expected a multiple of 2 KV"),
    "attention top_k": ("copy", ["--attention-experts", 2, "--attention-top-k", 3], "--attention-top-k 3: valid are"),
    "attention as hf": ("copy", ["--attention-experts", 2], "--format checkpoint holds every model"),
    "residual as hf": ("residual", ["--experts", 3], "--family llama_moe_v2 some"),
    "half as hf": ("half", [], "model.norm_topk_prob: no Hugging Face family of"),
    "ends as hf": ("copy", ["--dense-ends", 1], "--format checkpoint holds every model"),
    "parent": ("copy", ["--hf", "HOME/none"], "no such folder; give a folder with config.json"),
    "no prompts": ("copy", ["--router-init", "hidden"], "takes its rows from prompts: give --prompts"),
    "prompts missing": ("copy", ["--router-init", "hidden", "--prompts", "HOME/none"], "none: not a file"),
    "prompts of 3": ("copy", ["--router-init", "hidden", "--prompts", "HOME/prompts.yaml"], "found 3, expected"),
    "text": ("copy", ["--text", "HOME/none.txt"], "none.txt: no such file or folder"),
    "tokenizer": ("copy", ["--tokenizer", "HOME/dense"], "name the parent's tokenizer with --tokenizer"),
    "receipt": ("copy", ["--receipt-tokens", 1], "--receipt-tokens 1: expected 2 or more, or 0 for no receipt"),
    "length": ("copy", ["--seq-length", 0], "--seq-length 0: expected 2 or more"),
    "sample": ("gradient", ["--text-tokens", -4], "--text-tokens -4: expected 2 or more"),
    "mix of one": ("mix", [], "--method mix makes one expert of each model: give the others with --models"),
    "mix of two": ("mix", ["--models", "HOME/math", "--experts", 3], "--experts 3 of 2 models (--hf and --models)"),
    "mix of dtypes": ("mix", ["--models", "HOME/bf16"], "save both with one dtype"),
    "models": ("copy", ["--models", "HOME/math"], "--models is for --method mix, found --method copy"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_nothing_is_written(
    case: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    method, more, expected = BAD[case]
    more = [str(home) + word[4:] if isinstance(word, str) and word.startswith("HOME") else word for word in more]
    assert run(home, method, tmp_path / "out", *more) == 78
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and expected in line
    assert list(tmp_path.iterdir()) == []


def refused(code: int, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of an exit with 65 or 78."""
    assert code in (65, 78)
    (line,) = capsys.readouterr().err.splitlines()
    return f"{code} {line}"


def test_more_bad_input(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What needs files of its own."""
    out = tmp_path / "out"
    save(theirs("mixtral"), tmp_path / "moe", side=False)
    save(theirs("llama"), tmp_path / "narrow", side=False)
    damaged = save(theirs("llama", **SIZES), tmp_path / "damaged", shard="1GB", side=False)
    (damaged / "model.safetensors").write_bytes((damaged / "model.safetensors").read_bytes()[:-1])
    capsys.readouterr()  # bars of transformers
    line = refused(run(home, "copy", out, "--hf", tmp_path / "moe"), capsys)
    assert line == f"78 error: --hf {tmp_path / 'moe'} has 4 experts already: give a dense model"
    line = refused(run(home, "copy", out, "--hf", tmp_path / "narrow"), capsys)
    assert line.startswith("78 error: --tokenizer bytes: the text holds token ")
    line = refused(run(home, "mix", out, "--models", tmp_path / "narrow"), capsys)
    assert line.startswith(f"78 error: --models {tmp_path / 'narrow'} is another model than ")
    for text, problem in (
        ("experts: 3", "no list"),
        ("experts: [{}, {}]", "expert 0 has no positive_prompts"),
        ("experts: [{positive_prompts: word}, {}]", "expert 0: positive_prompts: expected a list"),
    ):
        (tmp_path / "prompts.yaml").write_text(text)
        more = ["--experts", 2, "--router-init", "hidden_avg", "--prompts", tmp_path / "prompts.yaml"]
        line = refused(run(home, "copy", out, *more), capsys)
        assert line.startswith(f"78 error: --prompts {tmp_path / 'prompts.yaml'}: ") and problem in line
    (tmp_path / "short.txt").write_text("short")
    line = refused(run(home, "copy", out, "--text", tmp_path / "short.txt"), capsys)
    assert line.startswith(f"65 error: --text {tmp_path / 'short.txt'} has 6 tokens, fewer than one sequence of 32")
    line = refused(run(home, "gradient", out, "--text-tokens", 96), capsys)
    assert line.startswith("65 error: 3 sequences of 32 tokens, fewer than --experts 4: give more")
    (tmp_path / "bad.jsonl").write_text("{")
    line = refused(run(home, "copy", out, "--text", tmp_path / "bad.jsonl"), capsys)
    assert line.startswith(f"65 error: --text {tmp_path / 'bad.jsonl'}:1:2: not JSON")
    line = refused(run(home, "copy", out, "--hf", damaged), capsys)
    assert line.startswith(f"65 error: --hf {damaged}/model.safetensors: ")
    assert not out.exists() and not (tmp_path / "out.partial").exists()
    out.mkdir()
    line = refused(run(home, "copy", out), capsys)
    assert line == f"78 error: --out {out} exists; remove it or choose another name"


def test_several_problems_are_listed_together(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(home, "copy", tmp_path / "out", "--top-k", 9, "--noise-share", 2) == 78
    assert capsys.readouterr().err.splitlines()[1:] == [
        "  - --top-k 9: valid are 1 to 4, the experts",
        "  - --noise-share 2.0: valid are 0 to 1",
    ]
