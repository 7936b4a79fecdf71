"""A run that starts with weights: every rank holds the folder's elements, the first loss is that of transformers."""

import json
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_engine.checkpoint.hf.export import ExportOptions, export_checkpoint
from moe_engine.checkpoint.hf.folder import HfFolder
from moe_engine.checkpoint.hf.to_checkpoint import import_folder
from moe_engine.checkpoint.open import Checkpoint
from moe_engine.config import Run
from moe_engine.errors import EngineError
from moe_engine.log.rows import read_rows
from moe_engine.parallel.local_ranks import run_on_ranks
from moe_engine.parallel.mesh import Mesh, build_mesh
from moe_engine.parallel.weight import note_of
from moe_engine.plan.out_folder import check_out_folder
from moe_engine.plan.start import weight_warnings
from moe_engine.train.loop import fit
from tests.checkpoint.hf.small import save, tensors_of, theirs, transformers
from tests.faults.arena import make_corpus
from tests.train.small import begin_of, loop_run, part_of, session_of

Layout = tuple[int, int, int]
LAYER, MOE = "model.layers.{}.", "model.layers.{}.block_sparse_moe."


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(theirs("mixtral", vocab_size=264), tmp_path_factory.mktemp("hf") / "hf")


def whole_weights(hf: Path) -> dict[str, Tensor]:
    """Every weight of the engine, put together by hand from the tensors of a Mixtral of 3 layers and 4 experts."""
    t = tensors_of(hf)
    out = {"embedding.weight": t["model.embed_tokens.weight"], "norm.weight": t["model.norm.weight"]}
    out["head.weight"] = t["lm_head.weight"]
    for i in range(3):
        layer, moe = LAYER.format(i), MOE.format(i)
        out[f"layers.{i}.attention_norm.weight"] = t[layer + "input_layernorm.weight"]
        out[f"layers.{i}.ffn_norm.weight"] = t[layer + "post_attention_layernorm.weight"]
        out |= {f"layers.{i}.attention.{x}.weight": t[f"{layer}self_attn.{x}_proj.weight"] for x in "qkvo"}
        out[f"layers.{i}.ffn.router.weight"] = t[moe + "gate.weight"]
        w1, w2, w3 = ([t[f"{moe}experts.{e}.w{n}.weight"] for e in range(4)] for n in (1, 2, 3))
        out[f"layers.{i}.ffn.experts.w_gate_up"] = torch.stack([torch.stack(pair) for pair in zip(w1, w3, strict=True)])
        out[f"layers.{i}.ffn.experts.w_down"] = torch.stack(w2)
    return out


def run_from(source: Path, corpus: Path, out: Path, layout: Layout, **settings: Any) -> Run:
    """One step with the model of `source`; attention does not stop at documents, as in transformers."""
    model = HfFolder(source).model.model_copy(update=settings.pop("model", {}))
    train = {"init_from": str(source), "steps": 1} | settings.pop("train", {})
    run = loop_run(corpus, out, layout, settings=settings, **train)
    return run.model_copy(update={"model": model, "data": run.data.model_copy(update={"document_mask": False})})


def start(run: Run, mesh: Mesh, hf: Path) -> tuple[int, int, np.ndarray, np.ndarray]:
    """Start one run and check every element that this rank holds; then one step.

    Returns the elements of masters that are first copies, those of the whole model, and tokens and labels of the step.
    """
    session, wanted = session_of(run, mesh), whole_weights(hf)
    assert begin_of(session) == (0, 0)
    engine, firsts = session.engine, 0
    by_name = {name: p for p, name in engine.names.items()}
    assert by_name.keys() == wanted.keys()
    for owned in engine.owned():
        local = wanted[owned.name][note_of(by_name[owned.name]).local_slices()].flatten()
        assert torch.equal(owned.master.float(), local[owned.start : owned.start + owned.master.numel()]), owned.name
        firsts += owned.master.numel() if owned.first_copy else 0
    for name, parameter in by_name.items() if run.parallel.zero < 3 else ():
        assert torch.equal(parameter, part_of(wanted[name], parameter).to(parameter.dtype)), name
    place = session.loader.state()
    batches = session.loader.next_step()
    session.loader.load_state(place)
    fit(session)
    session.log.close()
    tokens, labels = (torch.cat([batch[field] for batch in batches]).numpy() for field in (0, 1))
    return firsts, sum(w.numel() for w in wanted.values()), tokens, labels


FP32 = [{"zero": zero} for zero in (0, 1, 2)]
KINDS = [*FP32, *({"zero": zero, "precision": "bf16"} for zero in (1, 2))]
STAGE_3 = [{"zero": 3}, {"zero": 3, "precision": "bf16"}]


@pytest.mark.parametrize(
    ("layout", "kinds"),
    [
        ((1, 1, 1), KINDS + STAGE_3),
        ((2, 2, 1), KINDS[1:3]),
        ((1, 2, 2), KINDS[3:]),
        ((2, 1, 2), STAGE_3[1:]),
        pytest.param((2, 2, 1), KINDS, marks=pytest.mark.slow),
        pytest.param((1, 2, 2), KINDS, marks=pytest.mark.slow),
        pytest.param((2, 1, 2), STAGE_3, marks=pytest.mark.slow),
    ],
)
def test_every_rank_holds_the_folders_weights_and_the_first_loss_is_transformers(
    layout: Layout, kinds: list[dict[str, Any]], hf: Path, corpus: Path, tmp_path: Path
) -> None:
    def on_rank(rank: int) -> list[tuple[int, int, np.ndarray, np.ndarray]]:
        mesh = build_mesh(*layout)
        return [
            start(run_from(hf, corpus, tmp_path / str(i), layout, **kind), mesh, hf) for i, kind in enumerate(kinds)
        ]

    dp, ep, tp = layout
    ranks = run_on_ranks(on_rank, dp * ep * tp)
    model = transformers.AutoModelForCausalLM.from_pretrained(hf)
    for i, kind in enumerate(kinds):
        assert sum(rank[i][0] for rank in ranks) == ranks[0][i][1], kind
        tokens, labels = (
            torch.from_numpy(np.concatenate([rank[i][field] for rank in ranks[::tp]])) for field in (2, 3)
        )
        with torch.no_grad():
            loss = F.cross_entropy(model(tokens).logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        (row,) = read_rows(tmp_path / str(i) / "metrics.jsonl")
        close = 2**-8 if "precision" in kind else 1e-5
        assert row["lm_loss"] == pytest.approx(float(loss), rel=close), kind


@pytest.mark.parametrize("layout", [(1, 1, 1), (1, 4, 1), (2, 1, 2)])
def test_a_run_starts_from_a_run_of_another_layout_with_its_biases(
    layout: Layout, hf: Path, corpus: Path, tmp_path: Path
) -> None:
    biased = {"expert_bias_update_rate": 0.05}

    def write(rank: int) -> None:
        run = run_from(hf, corpus, tmp_path / "first", (2, 2, 1), model=biased, train={"steps": 3})
        session = session_of(run, build_mesh(2, 2, 1))
        fit(session)
        session.log.close()

    run_on_ranks(write, 4)
    folder = tmp_path / "first" / "checkpoints" / "step-00000003"

    def read(rank: int) -> None:
        run = run_from(hf, corpus, tmp_path / "second", layout, model=biased, train={"init_from": str(folder)})
        session, reader = session_of(run, build_mesh(*layout)), Checkpoint(folder)
        assert begin_of(session) == (0, 0)
        for parameter, name in session.engine.names.items():
            assert torch.equal(parameter, part_of(reader.whole(name), parameter)), name
        extra = [reader.extra(writer) for writer in range(4)]
        for i, router in enumerate(session.engine.routers):
            assert router.expert_bias is not None and router.expert_bias.abs().max() > 0.01
            assert all(torch.equal(router.expert_bias, each[f"expert_bias/{i}"]) for each in extra)
        assert session.loader.state() == session_of(run, session.mesh).loader.state()  # the data start anew
        session.log.close()

    run_on_ranks(read, layout[0] * layout[1] * layout[2])
    for name in ("config.json", "tokenizer.model"):  # handed on from run to run
        assert (tmp_path / "second" / "hf" / name).read_bytes() == (hf / name).read_bytes()


def alone(run: Run) -> tuple[str, dict[str, np.ndarray]]:
    """Start a run on one rank; what it was refused for, and its weights."""

    def on_rank(rank: int) -> tuple[str, dict[str, np.ndarray]]:
        session = session_of(run, build_mesh(1, 1, 1))
        try:
            begin_of(session)
        except EngineError as error:
            return str(error), {}
        return "", {name: p.detach().numpy().copy() for p, name in session.engine.names.items()}

    return run_on_ranks(on_rank, 1)[0]


def test_an_imported_checkpoint_is_the_folder(hf: Path, corpus: Path, tmp_path: Path) -> None:
    imported = tmp_path / "imported"
    import_folder(HfFolder(hf), imported)
    for out, source in (("a", hf), ("b", imported)):
        _, found = alone(run_from(hf, corpus, tmp_path / out, (1, 1, 1), train={"init_from": str(source)}))
        assert found.keys() == whole_weights(hf).keys()
        assert all((found[name] == weight.numpy()).all() for name, weight in whole_weights(hf).items()), source


def test_other_shapes_are_refused_and_side_files_of_another_start_go(hf: Path, corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "hf").mkdir(parents=True)
    (out / "hf" / "vocab.json").write_text("{}")
    refusal, _ = alone(run_from(hf, corpus, out, (1, 1, 1), model={"moe_intermediate_size": 32}))
    assert re.search(r"6 weights are not those of the model, .*w_down .* \(4, 32, 24\) there", refusal), refusal
    assert (out / "hf" / "vocab.json").exists()
    assert alone(run_from(hf, corpus, out, (1, 1, 1)))[0] == ""
    assert not (out / "hf" / "vocab.json").exists() and (out / "hf" / "tokenizer.model").exists()


def refusals(run: Run, layout: Layout) -> list[str]:
    """What every rank is told when the run starts; empty where it does."""

    def on_rank(rank: int) -> str:
        session = session_of(run, build_mesh(*layout))
        try:
            begin_of(session)
        except EngineError as error:
            return f"{error.exit_code} {error}"
        return ""

    return run_on_ranks(on_rank, layout[0] * layout[1] * layout[2])


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    return theirs("llama", vocab_size=264)


def test_case_01_a_run_starts_with_the_set_that_transformers_loads(
    llama: nn.Module, corpus: Path, tmp_path: Path
) -> None:
    other = theirs("llama", vocab_size=264)
    with torch.no_grad():
        other.get_parameter("model.norm.weight").mul_(3)
    source = save(other, tmp_path / "two")
    save(llama, source, shard="1GB")
    run = run_from(source, corpus, tmp_path / "out", (1, 1, 1))
    refused, found = alone(run)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(source)
    assert refused == "" and (found["norm.weight"] == loaded.model.norm.weight.detach().numpy()).all()
    (line,) = [line for line in weight_warnings(run) if "more than one set" in line]
    assert line.endswith("(model.safetensors; not read: model.safetensors.index.json)")


def test_case_07_a_run_keeps_what_goes_along_and_its_export_has_it(
    llama: nn.Module, corpus: Path, tmp_path: Path
) -> None:
    source = save(llama, tmp_path / "source")
    files = {"additional_chat_templates/tool_use.jinja": b"{{ x }}", "LICENSE.md": b"mine", "modeling_x.py": b"1 / 0"}
    for name, content in files.items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes(content)
    said = json.loads((source / "config.json").read_text()) | {"eos_token_id": 256}  # that of the text, which is bytes
    (source / "real.json").write_text(json.dumps(said, indent=2))
    (source / "config.json").unlink()
    (source / "config.json").symlink_to("real.json")
    import_folder(HfFolder(source), tmp_path / "imported")
    for start in ("source", "imported"):
        out = tmp_path / f"of-{start}"
        run = run_from(source, corpus, out, (1, 1, 1), train={"init_from": str(tmp_path / start)})
        run_on_ranks(lambda rank, run=run: fit(session_of(run, build_mesh(1, 1, 1))), 1)
        export_checkpoint(out / "checkpoints" / "step-00000001", tmp_path / f"{start}-again", ExportOptions())
        for name in [*files, "tokenizer.model", "config.json", "real.json"]:
            for folder in (out / "hf", tmp_path / f"{start}-again"):
                assert (folder / name).read_bytes() == (source / name).read_bytes(), name


def test_case_07_a_folder_of_weights_in_the_place_of_what_goes_along_is_not_removed(
    llama: nn.Module, corpus: Path, tmp_path: Path
) -> None:
    """--init-from OUT/hf, say; and an earlier export that was written to OUT/hf."""
    source = save(llama, tmp_path / "out" / "hf")
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    assert refusals(run_from(source, corpus, tmp_path / "out", (1, 1, 1)), (1, 1, 1)) == [""]
    afresh = run_from(source, corpus, tmp_path / "out", (1, 1, 1), train={"init_from": None})
    assert re.search(r"78 .*hf holds weights, and a run keeps other files there", refusals(afresh, (1, 1, 1))[0])
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before


def test_case_07_no_export_goes_where_the_run_keeps_what_goes_along(
    llama: nn.Module, corpus: Path, tmp_path: Path
) -> None:
    """OUT/hf is there when the run ends, and the export would be refused then."""
    source = save(llama, tmp_path / "source")
    for name, problem in (("hf", "where the run itself writes hf"), ("final", "")):
        train = {"export_hf": str(tmp_path / "out" / ".." / "out" / name)}
        run = run_from(source, corpus, tmp_path / "out", (1, 1, 1), train=train)
        with pytest.raises(EngineError, match=problem) if problem else nullcontext():
            check_out_folder(run, goes_on=False)


@pytest.mark.parametrize(
    "layout",
    [
        (2, 1, 1),
        pytest.param((1, 1, 1), marks=pytest.mark.slow),
        pytest.param((1, 1, 2), marks=pytest.mark.slow),
        pytest.param((2, 1, 2), marks=pytest.mark.slow),
    ],
)
def test_case_08_a_run_does_not_start_with_nan(layout: Layout, corpus: Path, tmp_path: Path) -> None:
    """Every rank says the same, of whole tensors, whoever holds the elements."""
    model = theirs("llama", vocab_size=264)
    with torch.no_grad():
        model.get_parameter("model.layers.2.mlp.up_proj.weight")[39, 31] = float("inf")
        model.get_parameter("model.embed_tokens.weight")[[0, 263], 0] = float("nan")
    source = save(model, tmp_path / "source")
    told = refusals(run_from(source, corpus, tmp_path / "out", layout, zero=1), layout)
    assert len(set(told)) == 1, told
    assert re.search(r"^65 .*2 tensors hold NaN or infinite numbers; .* import --allow-nonfinite", told[0]), told
    assert "model.embed_tokens.weight: 2 NaN of 8448" in told[0]
    assert "model.layers.2.mlp.up_proj.weight: 1 infinite of 1280" in told[0]
    imported = tmp_path / "imported"
    import_folder(HfFolder(source), imported, allow_nonfinite=True)
    run = run_from(source, corpus, tmp_path / "out", layout, zero=1, train={"init_from": str(imported)})
    assert set(refusals(run, layout)) == {""}
    (line,) = [line for line in weight_warnings(run) if "NaN or infinite" in line]
    assert "model.embed_tokens.weight: 2 NaN of 8448" in line


@pytest.mark.parametrize(("said", "through"), [(None, "folder"), ("auto", "checkpoint")])
def test_case_11c_a_run_is_exported_in_the_dtype_of_the_tensors_it_began_from(
    said: str | None, through: str, corpus: Path, tmp_path: Path
) -> None:
    """Where config.json says nothing of it, or nothing that is a dtype; the run computes in fp32."""
    source = save(theirs("llama", vocab_size=264).bfloat16(), tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    config.pop("dtype")
    (source / "config.json").write_text(json.dumps(config if said is None else config | {"dtype": said}))
    start = source
    if through == "checkpoint":
        start = tmp_path / "imported"
        import_folder(HfFolder(source), start)
    run = run_from(source, corpus, tmp_path / "out", (1, 1, 1), train={"init_from": str(start)})
    run_on_ranks(lambda rank: fit(session_of(run, build_mesh(1, 1, 1))), 1)
    export_checkpoint(tmp_path / "out" / "checkpoints" / "step-00000001", tmp_path / "again", ExportOptions())
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "again").values()} == {torch.bfloat16}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert loaded.dtype == torch.bfloat16
    assert json.loads((tmp_path / "again" / "config.json").read_text())["torch_dtype"] == "bfloat16"
