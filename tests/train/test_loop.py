"""The loop on a real (small) corpus: who reads what, what is written down, and when it stops."""

import json
import math
import re
from pathlib import Path

import pytest
import torch

from moe_engine.errors import ConfigError, EngineError
from moe_engine.log.rows import read_rows
from moe_engine.model.transformer import Output
from moe_engine.parallel.local_ranks import run_on_ranks
from moe_engine.parallel.mesh import build_mesh
from moe_engine.train.loop import fit
from moe_engine.train.schedule import learning_rate
from tests.faults.arena import make_corpus
from tests.train.small import SEQUENCES, loop_run, parameters_of, relative, session_of

FIELDS = {
    *(
        "step",
        "loss",
        "lm_loss",
        "aux_loss",
        "aux_loss_hf",
        "z_loss",
        "grad_norm",
        "lr",
        "tokens",
        "tokens_per_s",
        "mfu",
    ),
    *("domain_loss", "moe_layers", "expert_load", "load_entropy", "dropped"),
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.mark.parametrize("layout", [(2, 2, 1), (1, 2, 2)])
def test_no_two_data_ranks_read_the_same_sample(corpus: Path, tmp_path: Path, layout: tuple[int, int, int]):
    """Sample by sample over 20 steps; the ranks of one tp group read the same."""
    run = loop_run(corpus, tmp_path, layout, settings={"model": {"vocab_size": 264}, "accumulation": 2})

    def on_rank(rank: int) -> tuple[int, list[bytes]]:
        mesh = build_mesh(*layout)
        loader = session_of(run, mesh).loader
        batches = [batch for _ in range(20) for batch in loader.next_step()]
        return mesh.data.rank, [row.numpy().tobytes() for batch in batches for row in batch.tokens_BS]

    read: dict[int, list[bytes]] = {}
    for data_rank, samples in run_on_ranks(on_rank, 4):
        assert read.setdefault(data_rank, samples) == samples
    everything = [sample for samples in read.values() for sample in samples]
    assert len(read) == layout[0] * layout[1]
    assert len(everything) == 20 * SEQUENCES == len(set(everything))


def test_rows_of_a_run(corpus: Path, tmp_path: Path):
    """Every field of every step, with the values that other parts of the row imply; and an evaluation."""
    run = loop_run(corpus, tmp_path, (2, 1, 1), settings={"lr": 1e-2}, steps=6, eval_every=3)

    def on_rank(rank: int) -> None:
        fit(session_of(run, build_mesh(2, 1, 1)))

    run_on_ranks(on_rank, 2)
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    for i, row in enumerate(rows):
        assert set(row) >= FIELDS
        assert all(sum(layer) == pytest.approx(1, abs=1e-6) for layer in row["expert_load"])
        entropy = -sum(p * math.log(p) for p in row["expert_load"][0])
        assert row["load_entropy"][0] == pytest.approx(entropy, rel=1e-4) and row["dropped"] == [0]
        assert row["lr"] == learning_rate(i, 6, run.optimizer) and row["moe_layers"] == [1]
        assert row["loss"] == pytest.approx(row["lm_loss"] + 0.05 * row["aux_loss"] + 1e-3 * row["z_loss"], rel=1e-5)
        assert row["tokens"] == (i + 1) * SEQUENCES * 8
        assert set(row["domain_loss"]) == {"prose", "code"}
        assert 0 < row["mfu"] < 1.5 and row["tokens_per_s"] > 0 and row["grad_norm"] > 0
    assert rows[-1]["lm_loss"] < rows[0]["lm_loss"]
    assert [row["step"] for row in read_rows(tmp_path / "eval.jsonl")] == [3, 6]
    manifest = json.loads((tmp_path / "checkpoints" / "step-00000006" / "manifest.json").read_text())
    assert manifest["step"] == 6 and manifest["layout"] == {"dp": 2, "ep": 1, "tp": 1, "zero": 2}


@pytest.mark.parametrize("attention", [False, True])
def test_rows_are_the_documented_ones(corpus: Path, tmp_path: Path, attention: bool):
    routed = {"num_attention_experts": 4, "attention_moe_layers": (1,), "num_attention_experts_per_tok": 3}
    run = loop_run(
        corpus, tmp_path, (1, 1, 1), steps=1, settings={"model": {"vocab_size": 264} | (routed if attention else {})}
    )
    run_on_ranks(lambda rank: fit(session_of(run, build_mesh(1, 1, 1))), 1)
    (row,) = read_rows(tmp_path / "metrics.jsonl")
    page = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    page = page.partition("## metrics.jsonl")[2].partition("## eval.jsonl")[0]
    documented = set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE))
    assert set(row) <= documented
    of_attention = {"attention_moe_layers", "attention_load"}
    taught = {"routing_supervision_loss", "routing_accuracy", "label_accuracy"}
    assert documented - set(row) <= taught | {"skipped"} | (set() if attention else of_attention)
    if attention:
        assert row["attention_moe_layers"] == [1] and len(row["attention_load"][0]) == 4
        assert sum(row["attention_load"][0]) == pytest.approx(1.0) and max(row["attention_load"][0]) <= 1 / 3 + 1e-9
        assert row["aux_loss"] > 1.5 and sum(row["expert_load"][0]) == pytest.approx(1.0)  # about 1 of either kind
    assert "skipped" not in row


def test_curve_does_not_depend_on_the_layout(corpus: Path, tmp_path: Path):
    curves = []
    for layout in ((1, 1, 1), (2, 1, 1), (1, 2, 2)):
        out = tmp_path / "x".join(map(str, layout))
        run = loop_run(corpus, out, layout, steps=8)
        world = layout[0] * layout[1] * layout[2]
        run_on_ranks(lambda rank, run=run, layout=layout: fit(session_of(run, build_mesh(*layout))), world)
        rows = read_rows(out / "metrics.jsonl")
        held_out = read_rows(out / "eval.jsonl")[-1]["loss"] if layout == (1, 1, 1) else None
        curves.append([x for row in rows for x in (row["loss"], row["grad_norm"], *row["domain_loss"].values())])
        assert held_out is None or held_out > 0
    for curve in curves[1:]:
        assert curve == pytest.approx(curves[0], rel=1e-5)


def test_five_skipped_steps_in_a_row_stop_the_run(corpus: Path, tmp_path: Path):
    run = loop_run(corpus, tmp_path, (1, 2, 1), steps=30)

    def on_rank(rank: int) -> str:
        mesh = build_mesh(1, 2, 1)
        session = session_of(run, mesh)
        before = parameters_of(session.engine)
        passes = []

        def spoil(module: torch.nn.Module, inputs: object, output: Output) -> Output:
            passes.append(0)  # steps 1, 2 and 4 are good; from 6 on none is, so that 10 is the fifth bad one in a row
            bad = rank == 1 and len(passes) in (3, 5, *range(6, 99))
            return output._replace(loss_T=output.loss_T * math.nan) if bad else output

        session.engine.model.register_forward_hook(spoil)
        with pytest.raises(EngineError, match="5 steps in a row were skipped") as caught:
            fit(session)
        assert len(passes) == 9 and caught.value.exit_code == 70
        after = parameters_of(session.engine)
        assert all(bool(p.isfinite().all()) for p in after.values())
        assert max(relative(p, before[name]) for name, p in after.items()) > 1e-3  # three good steps moved them
        return str(caught.value)

    messages = run_on_ranks(on_rank, 2)
    assert messages[0] == messages[1] and "the loss on rank 1" in messages[0] and "step 4" in messages[0]
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [bool(row.get("skipped")) for row in rows] == [False, False, True, False, *[True] * 5]
    assert rows[2]["grad_norm"] is None and rows[3]["grad_norm"] > 0
    assert not (tmp_path / "checkpoints").exists()


def test_a_used_folder_is_not_overwritten(corpus: Path, tmp_path: Path):
    """A second run without --resume would drop the first one's metrics and checkpoints."""
    run = loop_run(corpus, tmp_path, (1, 1, 1), settings={"model": {"vocab_size": 264}})
    (tmp_path / "checkpoints" / "step-00000500").mkdir(parents=True)
    run = run.model_copy(update={"train": run.train.model_copy(update={"out": str(tmp_path), "resume": None})})

    def on_rank(rank: int) -> str:
        with pytest.raises(ConfigError, match="--resume auto") as caught:
            fit(session_of(run, build_mesh(1, 1, 1)))
        return str(caught.value)

    assert str(tmp_path) in run_on_ranks(on_rank, 1)[0]
