"""Fine-tuning on masked samples, packed: loss and gradients are those of transformers on each sample alone."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe_engine.checkpoint.hf.folder import HfFolder
from moe_engine.config import Data, Domain, Run
from moe_engine.log.rows import read_rows
from moe_engine.parallel.local_ranks import run_on_ranks
from moe_engine.parallel.mesh import build_mesh
from moe_engine.prepare.sample_shards import SampleOptions, SampleSource, prepare_samples
from moe_engine.prepare.template import Template
from moe_engine.prepare.tokenizer.load import load_tokenizer
from moe_engine.train.loop import fit
from moe_engine.train.step import accumulate
from tests.checkpoint.hf.small import save, theirs, transformers
from tests.train.small import begin_of, relative, run_of, session_of

S = 128
Layout = tuple[int, int, int]
ROWS = [
    {"question": f"What comes after {i}?" * (1 + i % 3), "answer": f"After {i} comes {i + 1}." * (1 + i % 4)}
    for i in range(23)
]


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = theirs("mixtral", vocab_size=264, router_aux_loss_coef=0.0, max_position_embeddings=S)
    return save(model, tmp_path_factory.mktemp("hf") / "hf")


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("samples")
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    options = SampleOptions(template="instruction", eval_fraction=0.1, max_length=S)
    prepare_samples({"d": SampleSource((str(folder / "rows.jsonl"),))}, folder / "out", "bytes", options, quiet=True)
    return folder / "out"


@pytest.fixture(scope="module")
def oracle(hf: Path, samples: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[float, HfFolder, float]:
    """Loss, gradients and their norm over all training samples, each of them alone through transformers."""
    template = Template(load_tokenizer("bytes"), "instruction")
    held_out = json.loads((samples / "manifest.json").read_text())["domains"]["d"]["splits"]["eval"]["documents"]
    whole = [template.render([{"role": "user", "content": row["question"]},
                              {"role": "assistant", "content": row["answer"]}]) for row in ROWS]  # fmt: skip
    from moe_engine.data.shards import TokenDataset

    dataset = TokenDataset(samples, "d", "train")
    trained_on = {dataset.read(i, 0, int(n)).tobytes() for i, n in enumerate(dataset.lengths)}
    chosen = [r for r in whole if r.ids[:S].astype("<u2").tobytes() in trained_on]
    assert len(chosen) == len(ROWS) - held_out == len(dataset)
    model = transformers.AutoModelForCausalLM.from_pretrained(hf, experts_implementation="eager").train()
    total, count = 0.0, sum(int(r.trained[1:S].sum()) for r in chosen)
    for ids, trained in chosen:
        tokens = torch.from_numpy(ids[:S].astype("int64"))
        labels = torch.where(torch.from_numpy(trained[:S]), tokens, -100)
        loss = F.cross_entropy(model(tokens[None, :-1]).logits[0], labels[1:], ignore_index=-100, reduction="sum")
        (loss / count).backward()
        total += float(loss)
    norm = torch.stack([p.grad.double().norm() for p in model.parameters()]).norm()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.grad)
    folder = save(model, tmp_path_factory.mktemp("gradients") / "hf", side=False)
    return total / count, HfFolder(folder), float(norm)


def run_on(hf: Path, samples: Path, out: Path, layout: Layout, **train: Any) -> Run:
    """One step takes the whole epoch."""
    dp, ep, _ = layout
    settings = {"seq_length": S, "micro_batch": 2, "accumulation": 16 // (dp * ep), "global_batch": 32} | train
    run = run_of(*layout, model={"vocab_size": 264})
    changes = {"out": str(out), "init_from": str(hf), "epochs": 1, "eval_every": 1, "eval_batches": 4, **settings}
    model = HfFolder(hf).model
    data = Data(domains=(Domain(name="d", path=str(samples)),))
    return run.model_copy(update={"model": model, "data": data, "train": run.train.model_copy(update=changes)})


@pytest.mark.parametrize("packing", ["auto", "none"])
def test_loss_and_gradients_are_transformers(
    packing: str, hf: Path, samples: Path, oracle: tuple[float, HfFolder, float], tmp_path: Path
) -> None:
    loss, gradients, _ = oracle
    run = run_on(hf, samples, tmp_path, (1, 1, 1), accumulation=8, global_batch=24, micro_batch=3)
    run = run.model_copy(update={"data": run.data.model_copy(update={"packing": packing})})
    session = session_of(run, build_mesh(1, 1, 1))
    begin_of(session)
    batches = session.loader.next_step()
    assert session.run.train.steps == 1
    tally = accumulate(session.engine, session.terms, session.mesh, batches)
    assert float(tally.sums["lm_loss"] / tally.counts["lm_loss"]) == pytest.approx(loss, rel=1e-5)
    for parameter, name in session.engine.names.items():
        assert isinstance(parameter.grad, Tensor), name
        assert relative(parameter.grad, gradients.whole(name)) < 1e-5, name


@pytest.mark.parametrize("layout", [(1, 2, 1), (2, 1, 2), (1, 4, 1)])
def test_every_layout_takes_the_same_step(
    layout: Layout, hf: Path, samples: Path, oracle: tuple[float, HfFolder, float], tmp_path: Path
) -> None:
    loss, _, norm = oracle

    def on_rank(rank: int) -> None:
        mesh = build_mesh(*layout)
        session = session_of(run_on(hf, samples, tmp_path, layout), mesh)
        fit(session)
        session.log.close()

    run_on_ranks(on_rank, layout[0] * layout[1] * layout[2])
    (row,) = read_rows(tmp_path / "metrics.jsonl")
    assert row["lm_loss"] == pytest.approx(loss, rel=1e-5) and row["grad_norm"] == pytest.approx(norm, rel=1e-5)
    (evaluated,) = read_rows(tmp_path / "eval.jsonl")
    assert 0 < evaluated["loss"] < 20


def test_goes_on_in_the_middle_of_an_epoch_on_another_layout(hf: Path, samples: Path, tmp_path: Path) -> None:
    """The same losses as a run that nothing stopped."""
    small = {"global_batch": 4, "epochs": 2, "micro_batch": 1, "eval_every": 0}

    def trained(out: Path, layout: Layout, **changes: Any) -> None:
        def on_rank(rank: int) -> None:
            accumulation = 4 // (layout[0] * layout[1])
            run = run_on(hf, samples, out, layout, accumulation=accumulation, **small | changes)
            flat = run.optimizer.model_copy(update={"lr": 1e-3, "min_lr": 1e-3, "warmup_steps": 0})
            session = session_of(run.model_copy(update={"optimizer": flat}), build_mesh(*layout))
            train = session.run.train.model_copy(update={key: changes[key] for key in ("steps",) if key in changes})
            fit(session._replace(run=session.run.model_copy(update={"train": train})))
            session.log.close()

        run_on_ranks(on_rank, layout[0] * layout[1] * layout[2])

    trained(tmp_path / "straight", (1, 2, 1))
    trained(tmp_path / "parts", (1, 2, 1), steps=4)
    trained(tmp_path / "parts", (2, 1, 2), resume="auto")
    wanted, found = (read_rows(tmp_path / name / "metrics.jsonl") for name in ("straight", "parts"))
    assert len(wanted) == len(found) > 8
    assert [row["lm_loss"] for row in found] == pytest.approx([row["lm_loss"] for row in wanted], rel=1e-5)
