"""Recompute under every ZeRO stage: what ran between two steps, forward passes without gradients above all, is no
business of a recomputed layer. Losses, norms and weights are those of a run that recomputes nothing, to the bit."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_engine.log.rows import read_rows
from moe_engine.parallel.local_ranks import run_on_ranks
from moe_engine.parallel.mesh import build_mesh
from moe_engine.train.loop import fit
from tests.faults.arena import make_corpus
from tests.train.small import loop_run, session_of

# experts of more than 100,000 elements: smaller weights stay gathered under ZeRO 3
MODEL = {
    "vocab_size": 264, "hidden_size": 128, "moe_intermediate_size": 112, "num_local_experts": 8,
    "num_hidden_layers": 3, "moe_layers": (0, 2), "shared_intermediate_size": 16,
}  # fmt: skip
ATTENTION = {
    "num_attention_heads": 8, "num_attention_experts": 4, "num_attention_experts_per_tok": 2, "head_dim": 208,
    "attention_moe_layers": (1,),
}  # fmt: skip
BETWEEN: dict[str, dict[str, Any]] = {
    "nothing": {"model": {"router_aux_loss": "micro_batch"}},
    "evaluation": {"model": {"router_aux_loss": "micro_batch"}, "train": {"eval_every": 1}},
    "global_batch": {"accumulation": 1},
    "accumulation": {},  # with global_batch: a forward pass of all micro-batches begins each step
    "a signal that saves": {"train": {"eval_every": 2}, "save_after": 2},
    "attention experts": {"model": ATTENTION, "train": {"eval_every": 1}},
    "bf16": {"precision": "bf16", "train": {"eval_every": 1}},
    "offload": {"offload_optimizer": True, "train": {"eval_every": 1}},
    "all": {"train": {"eval_every": 1}, "save_after": 2},
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def trace(corpus: Path, out: Path, layout: tuple[int, int, int], zero: int, recompute: str, name: str) -> list[Any]:
    """Losses and norms of three steps, held-out losses, and the bits of this rank's master weights."""
    kind = dict(BETWEEN[name])
    train, save_after = kind.pop("train", {}), kind.pop("save_after", None)
    settings = {"accumulation": 2, "zero": zero, "recompute": recompute} | kind
    settings["model"] = MODEL | kind.get("model", {})
    out = out / f"{zero} {recompute} {name}"
    session = session_of(loop_run(corpus, out, layout, settings=settings, **{"steps": 3} | train), build_mesh(*layout))
    if save_after:

        def heartbeat(step: int, where: str) -> None:
            session.requests.save |= (step, where) == (save_after, "training")

        session = session._replace(heartbeat=heartbeat)
    fit(session)
    rows = [[row["loss"], row["grad_norm"]] for row in read_rows(out / "metrics.jsonl")]
    held_out = [row["loss"] for row in read_rows(out / "eval.jsonl")]
    masters = {owned.name: owned.master.numpy().copy() for owned in session.engine.owned()}
    assert not save_after or (out / "checkpoints" / f"step-{save_after:08}").is_dir()
    session.engine.close()
    return [rows, held_out, masters]


def compare(corpus: Path, out: Path, layout: tuple[int, int, int], zero: int, kinds: list[str], names: list[str]):
    def on_rank(rank: int) -> None:
        for name in names:
            rows, held_out, masters = trace(corpus, out, layout, zero, "none", name)
            assert len(rows) == 3 and held_out and masters
            for kind in kinds:
                other_rows, other_held_out, other_masters = trace(corpus, out, layout, zero, kind, name)
                assert (other_rows, other_held_out) == (rows, held_out), (kind, name)
                for weight, master in masters.items():
                    assert np.array_equal(master, other_masters[weight]), (kind, name, weight)

    run_on_ranks(on_rank, layout[0] * layout[1] * layout[2])


def test_case_12_zero_3_recomputes_after_forward_passes_without_gradients(corpus: Path, tmp_path: Path):
    compare(corpus, tmp_path, (2, 1, 1), 3, ["selective", "full"], ["all"])


@pytest.mark.slow
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_case_12_recompute_changes_no_bit_under_any_stage(corpus: Path, tmp_path: Path, zero: int):
    names = [name for name in BETWEEN if zero or name not in ("bf16", "offload")]  # which need masters of their own
    compare(corpus, tmp_path, (2, 1, 1), zero, ["selective", "full"], names)


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "zero"), [((2, 1, 2), 3), ((1, 2, 1), 2)])
def test_case_12_recompute_changes_no_bit_with_tp_or_ep(
    corpus: Path, tmp_path: Path, layout: tuple[int, int, int], zero: int
):
    """Under ZeRO 3 the widths of experts decide too whether a weight is there before its module's forward."""
    compare(corpus, tmp_path, layout, zero, ["selective", "full"], ["all", "attention experts"])
