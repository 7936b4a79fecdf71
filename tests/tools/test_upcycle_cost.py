"""What an upcycling takes: one layer of a model in memory where that is enough, and stages that say how far it is."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_engine.checkpoint.hf.folder import HfFolder
from moe_engine.upcycle.decoder import load, streamed
from tests.checkpoint.hf.small import theirs
from tests.tools.upcycling import make_home, run

ROOT = Path(__file__).parents[2]
MEASURED = """
import resource, sys
from tools.upcycle import main
code = main(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
sys.exit(code)
"""
STAGES = [
    ("copy", [], ["making", "comparing"]),
    ("clustering", ["--receipt-tokens", 0], ["making"]),
    ("gradient", [], ["reading", "importance", "making", "comparing"]),
    (
        "residual",
        ["--router-init", "clusters", "--format", "checkpoint"],
        ["routers", "reading", "importance", "making", "comparing"],
    ),
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_home(tmp_path_factory.mktemp("home"))


@pytest.mark.parametrize("tied", [False, True])
def test_case_21_a_streamed_model_is_the_model_with_one_layer_in_memory(tied: bool, tmp_path: Path) -> None:
    model = theirs("llama", tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "m")
    folder, there = HfFolder(tmp_path / "m"), []
    beats: list[int] = []
    decoder, whole = streamed(folder, folder.model, beats.append), load(folder, folder.model)

    def note(*_: Any) -> None:
        there.append([i for i, layer in enumerate(decoder.layers) if not next(layer.parameters()).is_meta])

    for layer in decoder.layers:
        layer.register_forward_pre_hook(note)
    tokens_BS = torch.randint(folder.model.vocab_size, (3, 7), generator=torch.Generator().manual_seed(0))
    positions_BS = torch.arange(7).expand(3, 7)
    for _ in range(2):
        assert torch.equal(decoder.logits(tokens_BS, positions_BS), whole.logits(tokens_BS, positions_BS))
    layers = range(len(decoder.layers))
    assert there == [[i] for i in layers] * 2 and beats == [1] * 2 * len(layers)
    assert not any(p.requires_grad for model in (decoder, whole) for p in model.parameters())


@pytest.mark.parametrize(("method", "more", "stages"), STAGES)
def test_case_21_stages_are_said(
    method: str, more: list[Any], stages: list[str], home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(home, method, tmp_path / "out", *more) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning")]
    assert [line.split()[0] for line in said] == stages
    assert all(line.endswith(" s") for line in said)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("method", ["sharing_inter", "sharing_inner", "residual", "gradient", "clustering"])
def test_case_21_a_llama_of_135m_takes_below_4_gb(method: str, tmp_path: Path) -> None:
    sizes = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}
    theirs("llama", **sizes, **heads).to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    experts = 7 if method in ("sharing_inter", "residual") else 8
    given = ["--hf", tmp_path / "dense", "--method", method, "--experts", experts, "--tokenizer", "bytes", "--format"]
    words = [sys.executable, "-c", MEASURED, *map(str, [*given, "checkpoint", "--out", tmp_path / "out"])]
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr
    kilobytes = int(done.stdout.split()[-1])
    assert kilobytes < 4e6, f"{kilobytes / 1e6:.2f} GB"
