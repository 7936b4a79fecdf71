"""Hugging Face -> engine -> Hugging Face keeps every bit, and the function, on every layout."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_engine.checkpoint.hf.export import ExportOptions, export_checkpoint
from moe_engine.checkpoint.hf.folder import HfFolder
from moe_engine.checkpoint.hf.to_checkpoint import import_folder
from moe_engine.checkpoint.open import Checkpoint
from moe_engine.parallel.local_ranks import run_on_ranks
from moe_engine.parallel.mesh import Mesh, build_mesh
from tests.checkpoint.hf.small import LLAMA3, SIDE, ours, same_tensors, save, tensors_of, theirs, transformers

CASES: dict[str, tuple[str, dict[str, Any], bool]] = {
    "llama": ("llama", {}, False),
    "llama-tied-llama3-heads": (
        "llama",
        {"tie_word_embeddings": True, "rope_parameters": LLAMA3, "head_dim": 12, "num_key_value_heads": 2},
        False,
    ),
    "mixtral": ("mixtral", {}, False),
    "mixtral-fused-tied-llama3-heads": (
        "mixtral",
        {"tie_word_embeddings": True, "rope_parameters": LLAMA3, "head_dim": 12},
        True,
    ),
    "qwen3_moe": ("qwen3_moe", {"norm_topk_prob": True}, False),
    "qwen3_moe-fused": ("qwen3_moe", {}, True),
    "olmoe": ("olmoe", {}, False),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_there_and_back(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    family, changes, fused = CASES[case]
    hf = save(theirs(family, **changes).to(dtype), tmp_path / "hf", fused=fused)
    folder = HfFolder(hf)
    assert len(set(folder.files.values())) > 1, "several shards"
    read = import_folder(folder, tmp_path / "checkpoint")
    target, written = export_checkpoint(tmp_path / "checkpoint", tmp_path / "out", ExportOptions())
    same_tensors(tmp_path / "out", hf)
    assert written.tensors == read.tensors and written.bytes == read.bytes
    assert target.layout == ("dense" if family == "llama" else "fused" if fused else "per-expert")
    for name in [*SIDE, "config.json"]:
        assert (tmp_path / "out" / name).read_bytes() == (hf / name).read_bytes(), name


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe"])
def test_other_layout_and_shards_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    model = theirs(family)
    one, fused = save(model, tmp_path / "one"), save(model, tmp_path / "fused", fused=True)
    for name, source, goal, layout in (("a", one, fused, "fused"), ("b", fused, one, "per-expert")):
        import_folder(HfFolder(source), tmp_path / f"{name}-checkpoint")
        options = ExportOptions(layout=layout, shard_gb=2e-5)
        export_checkpoint(tmp_path / f"{name}-checkpoint", tmp_path / name, options)
        same_tensors(tmp_path / name, goal)
        index = json.loads((tmp_path / name / "model.safetensors.index.json").read_text())
        tensors = tensors_of(tmp_path / name)
        assert index["weight_map"].keys() == tensors.keys()
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
        loaded, info = type(model).from_pretrained(tmp_path / name, output_loading_info=True)  # pyright: ignore
        assert not info["missing_keys"] and not info["unexpected_keys"]
        tokens = torch.arange(24).view(2, 12) % 96
        far = float((loaded(tokens).logits - model(tokens).logits).detach().abs().max())
        assert far < 2e-6  # the same weights, elsewhere in memory


def test_total_size_of_the_golden_mixtral(tmp_path: Path) -> None:
    model = theirs(
        "mixtral", vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_key_value_heads=2
    ).to(torch.bfloat16)  # fmt: skip
    import_folder(HfFolder(save(model, tmp_path / "hf")), tmp_path / "checkpoint")
    _, written = export_checkpoint(tmp_path / "checkpoint", tmp_path / "out", ExportOptions(shard_gb=4e-5))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == written.bytes == 99_136


def logits_of_rank(rank: int, layout: tuple[int, int, int], paths: dict[str, str]) -> dict[str, float]:
    """How far this rank's logits are from those of transformers, for each model."""
    mesh = build_mesh(*layout)
    out = {}
    for case, path in paths.items():
        folder = Path(path)
        source = HfFolder(folder / "hf") if rank % 2 else Checkpoint(folder / "checkpoint")
        model = HfFolder(folder / "hf").model
        wanted = torch.load(folder / "logits.pt")
        tokens = torch.load(folder / "tokens.pt")
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        with torch.no_grad():
            logits = ours(source, model, mesh).logits(tokens, positions)
        mine = wanted.flatten(0, 1)[:, mesh.tp.cut(model.vocab_size)]
        out[case] = float((logits - mine).abs().max() / wanted.abs().max())
    return out


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Every case as a folder, a checkpoint, and transformers' logits."""
    out = {}
    for case, (family, changes, fused) in CASES.items():
        folder = tmp_path_factory.mktemp(case)
        changes = changes | ({"num_key_value_heads": 4} if family == "llama" else {})
        model = theirs(family, **changes)
        if hasattr(model, "set_experts_implementation"):
            model.set_experts_implementation("eager")  # pyright: ignore
        import_folder(HfFolder(save(model, folder / "hf", fused=fused)), folder / "checkpoint")
        tokens = torch.randint(96, (2, 48), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            torch.save(model(tokens).logits, folder / "logits.pt")
        torch.save(tokens, folder / "tokens.pt")
        out[case] = str(folder)
    return out


@pytest.mark.parametrize("layout", [(4, 1, 1), (2, 2, 1), (1, 4, 1), (2, 1, 2), (1, 2, 2), (1, 1, 4)])
def test_logits_on_every_layout_of_four_ranks(layout: tuple[int, int, int], saved: dict[str, str]) -> None:
    for found in run_on_ranks(logits_of_rank, 4, layout, saved):
        assert found.keys() == CASES.keys() and max(found.values()) < 1e-5, (layout, found)


def test_a_rope_that_is_dropped_would_be_seen(saved: dict[str, str]) -> None:
    """The scaling of the frequencies is no side matter: without it the logits are others."""
    folder = Path(saved["llama-tied-llama3-heads"])
    source = HfFolder(folder / "hf")
    tokens = torch.load(folder / "tokens.pt")
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    without = source.model.model_copy(update={"rope_scaling": None})
    with torch.no_grad():
        a = ours(source, source.model, Mesh()).logits(tokens, positions)
        b = ours(source, without, Mesh()).logits(tokens, positions)
    assert float((a - b).abs().max() / a.std()) > 0.05


@pytest.mark.parametrize("version", [4, 5])
def test_config_in_both_spellings(version: int, tmp_path: Path) -> None:
    model = theirs("mixtral", rope_parameters=LLAMA3)
    import_folder(HfFolder(save(model, tmp_path / "hf")), tmp_path / "checkpoint")
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "out", ExportOptions(version=version))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    old, new = {"torch_dtype", "rope_theta", "rope_scaling"}, {"dtype", "rope_parameters"}
    assert (old if version == 4 else new) <= config.keys()
    assert not (new if version == 4 else old) & config.keys()
    assert config["sliding_window"] is None and config["eos_token_id"] == 2
    assert HfFolder(tmp_path / "out").model == HfFolder(tmp_path / "hf").model
    tokens = torch.arange(24).view(2, 12)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(again(tokens).logits, model(tokens).logits)


class Interrupted(Exception):
    """Raised in the middle of a conversion."""


@pytest.mark.parametrize("direction", ["import", "export"])
def test_an_interrupted_conversion_goes_on(direction: str, tmp_path: Path) -> None:
    hf = save(theirs("mixtral"), tmp_path / "hf")
    if direction == "export":
        import_folder(HfFolder(hf), tmp_path / "checkpoint")
    out = tmp_path / "out"

    def convert(progress: Any) -> None:
        if direction == "import":
            import_folder(HfFolder(hf), out, progress)
        else:
            export_checkpoint(tmp_path / "checkpoint", out, ExportOptions(shard_gb=3e-5), progress)

    seen = 0

    def stop(count: int) -> None:
        nonlocal seen
        seen += count
        if seen > 100_000:
            raise Interrupted

    with pytest.raises(Interrupted):
        convert(stop)
    assert not out.exists()
    partial = tmp_path / "out.partial"
    finished = json.loads((partial / "progress.json").read_text())["files"]
    assert finished
    before = {name: os.stat(partial / name).st_mtime_ns for name in finished}
    damaged = next(iter(finished)) if direction == "import" else None
    if damaged:  # a file that is not what was written is written again, all of them are
        with (partial / damaged).open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\xff")
    convert(lambda count: None)
    assert not partial.exists()
    if damaged is None:
        assert {name: os.stat(out / name).st_mtime_ns for name in finished} == before
        same_tensors(out, hf)
    else:
        export_checkpoint(out, tmp_path / "again", ExportOptions())
        same_tensors(tmp_path / "again", hf)
