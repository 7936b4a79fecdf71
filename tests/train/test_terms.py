"""A term of a user's own: the example of docs/adding-a-term.md, run as it stands there."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_engine.log.rows import read_rows
from moe_engine.parallel.local_ranks import run_on_ranks
from moe_engine.parallel.mesh import Mesh, build_mesh
from moe_engine.train.loop import fit
from moe_engine.train.step import accumulate
from moe_engine.train.terms import LanguageModelLoss, Measure, Term, pretraining_terms
from tests.faults.arena import make_corpus
from tests.train.small import (
    engine_of,
    global_batch,
    loop_run,
    my_batches,
    part_of,
    relative,
    run_of,
    session_of,
    transformer_of,
)

PAGE = Path(__file__).parents[2] / "docs" / "adding-a-term.md"


def example() -> dict[str, Any]:
    """What the page's first block defines."""
    names: dict[str, Any] = {}
    exec(re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[0], names)
    return names


def test_the_term_of_the_page_is_minimised_and_logged(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    """Three steps on ep 2: in metrics.jsonl, in TensorBoard and on the progress line, and part of the loss."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = loop_run(make_corpus(tmp_path), tmp_path / "run", (1, 2, 1), steps=3)
    entropy = example()["RouterEntropy"]

    def on_rank(rank: int) -> None:
        mesh = build_mesh(1, 2, 1)
        session = session_of(run, mesh)
        session.log.quiet = mesh.world.rank > 0
        fit(session._replace(terms=(*session.terms, entropy(0.01, mesh.tp))))

    run_on_ranks(on_rank, 2)
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert len(rows) == 3
    for row in rows:
        assert -math.log(4) <= row["router_entropy"] < -0.1  # four experts
        parts = row["lm_loss"] + 0.05 * row["aux_loss"] + 1e-3 * row["z_loss"] + 0.01 * row["router_entropy"]
        assert row["loss"] == pytest.approx(parts, rel=1e-5)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    logged = [event.value for event in events.Scalars("train/router_entropy")]
    assert logged == pytest.approx([row["router_entropy"] for row in rows], rel=1e-5)
    assert "| router_entropy -" in capfd.readouterr().out


@pytest.mark.parametrize("layout", [(2, 1, 1), (1, 2, 2), (1, 1, 2)])
def test_its_value_and_gradients_are_those_of_one_process(layout: tuple[int, int, int]):
    """A sum over this tp rank's tokens, completed over tp: nothing depends on the layout, nor on micro-batches."""
    entropy, run = example()["RouterEntropy"], run_of(*layout, accumulation=2)
    batch, model = global_batch(0), transformer_of(run, Mesh())
    output = model(batch.tokens_BS, batch.positions_BS, batch.labels_BS)
    (routing,) = output.routings
    wanted = (routing.probs_TE * routing.probs_TE.log()).sum(1).mean()
    (output.loss_T.sum() / (batch.labels_BS != -100).sum() + 0.3 * wanted).backward()
    truth = {name: parameter.grad for name, parameter in model.named_parameters()}

    def on_rank(rank: int) -> None:
        mesh = build_mesh(*layout)
        engine = engine_of(run, mesh)
        tally = accumulate(engine, (LanguageModelLoss(), entropy(0.3, mesh.tp)), mesh, my_batches(run, mesh, 0))
        tally.reduce(mesh.data)
        assert float(tally.values()["router_entropy"]) == pytest.approx(float(wanted.detach()), rel=1e-6)
        gradients = engine.gradients()
        for parameter, name in engine.names.items():
            assert relative(gradients[name], part_of(truth[name], parameter)) < 1e-5, name

    run_on_ranks(on_rank, layout[0] * layout[1] * layout[2])


def test_each_term_is_computed_once_a_micro_batch():
    calls: list[str] = []

    class Counted(Term):
        name, coefficient = "counted", 0.0  # measured all the same

        def total(self, batch: Any, output: Any, load: Any) -> torch.Tensor:
            calls.append("total")
            return output.loss_T.sum() * 0 + 3.0 * batch.tokens_BS.numel()

        def measures(self, batch: Any, output: Any) -> dict[str, Measure]:
            calls.append("measures")
            two = torch.ones(2, dtype=torch.int32)
            return {"rows": Measure(two), "halves": Measure(torch.ones(3), two.sum())}

    def on_rank(rank: int) -> None:
        run = run_of(accumulation=4)
        terms = (*pretraining_terms(run.model), Counted())
        tally = accumulate(engine_of(run, Mesh()), terms, Mesh(), my_batches(run, Mesh(), 0))
        tally.reduce(Mesh().data)
        values = tally.values()
        assert calls == ["total", "measures"] * 4 and values["counted"] == 3.0
        assert values["rows"].tolist() == [4, 4] and values["rows"].dtype == torch.int32
        assert values["halves"].tolist() == [0.5] * 3

    run_on_ranks(on_rank, 1)
