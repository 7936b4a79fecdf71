"""Ten steps straight equal five and five more: bit for bit on the same layout, to 1e-5 on another."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from moe_engine.checkpoint.find import verify
from moe_engine.checkpoint.folders import steps_in
from moe_engine.checkpoint.open import Checkpoint
from moe_engine.errors import DataError, StorageError
from moe_engine.host import disk
from moe_engine.log.rows import read_rows
from moe_engine.parallel.local_ranks import run_on_ranks
from moe_engine.parallel.mesh import Mesh, build_mesh
from moe_engine.train.loop import fit
from tests.checkpoint.small import ALONE
from tests.faults.arena import make_corpus
from tests.train.small import begin_of, loop_run, relative, session_of, transformer_of

BIASED = {"vocab_size": 264, "expert_bias_update_rate": 0.01}
Layout = tuple[int, int, int]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def train(corpus: Path, out: Path, layout: Layout, settings: dict[str, Any], **changes: Any) -> list[dict[str, Any]]:
    """Runs the loop and returns its rows."""
    run = loop_run(corpus, out, layout, settings=settings, **changes)

    def on_rank(rank: int) -> None:
        session = session_of(run, build_mesh(*layout))
        fit(session)
        session.log.close()

    run_on_ranks(on_rank, layout[0] * layout[1] * layout[2])
    return read_rows(out / "metrics.jsonl")


def exact(rows: list[dict[str, Any]]) -> list[tuple[int, str, str, str]]:
    return [(r["step"], *(float(r[key]).hex() for key in ("loss", "grad_norm", "lr"))) for r in rows]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Everything in every rank's file."""
    out = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            out |= {f"{path.name}/{key}": file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return out


SAME = [
    ((2, 2, 1), {"zero": 2, "model": BIASED}),
    ((2, 2, 1), {"zero": 2, "model": BIASED, "precision": "bf16"}),
    ((2, 1, 2), {"zero": 1, "model": BIASED}),
    ((1, 1, 1), {"zero": 0, "model": BIASED}),
    pytest.param(*((2, 2, 1), {"zero": 0, "model": BIASED}), marks=pytest.mark.slow),
    pytest.param(*((2, 1, 1), {"zero": 1, "model": BIASED, "precision": "bf16"}), marks=pytest.mark.slow),
    pytest.param(*((2, 1, 1), {"zero": 3, "model": BIASED}), marks=pytest.mark.slow),
    pytest.param(*((2, 1, 1), {"zero": 2, "model": BIASED, "offload_optimizer": True}), marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("layout", "settings"), SAME, ids=str)
def test_same_layout_is_bit_exact(corpus: Path, tmp_path: Path, layout: Layout, settings: dict[str, Any]):
    straight = train(corpus, tmp_path / "straight", layout, settings, save_every=5)
    half = tmp_path / "straight" / "checkpoints" / "step-00000005"
    resumed = train(corpus, tmp_path / "resumed", layout, settings, resume=str(half))
    assert exact(resumed) == exact(straight[5:])
    wanted, found = (tensors(tmp_path / x / "checkpoints" / "step-00000010") for x in ("straight", "resumed"))
    assert wanted.keys() == found.keys() and any("master/" in key for key in wanted)
    assert {key.split("/")[1] for key in wanted} == {"master", "exp_avg", "exp_avg_sq", "extra"}
    for key, tensor in wanted.items():
        assert torch.equal(tensor, found[key]), key
    names = dict(transformer_of(loop_run(corpus, tmp_path, layout, settings=settings), Mesh()).named_parameters())
    reader = Checkpoint(half)
    for name, p in names.items():
        whole = reader.whole(name)
        assert whole.shape == p.shape
        assert whole.dtype == torch.float32 and not torch.equal(whole, p)  # trained, in full precision


def test_jitter_continues_bit_exactly(corpus: Path, tmp_path: Path):
    settings = {"zero": 2, "model": {"vocab_size": 264, "router_jitter_noise": 0.1}}
    straight = train(corpus, tmp_path / "straight", (1, 2, 1), settings, steps=4, save_every=2)
    half = tmp_path / "straight" / "checkpoints" / "step-00000002"
    assert exact(train(corpus, tmp_path / "resumed", (1, 2, 1), settings, steps=4, resume=str(half))) == exact(
        straight[2:]
    )


@pytest.mark.parametrize(("zero", "then"), [(0, 2), (2, 1)])
def test_attention_experts_continue_on_another_layout(corpus: Path, tmp_path: Path, zero: int, then: int):
    """Their kv heads are cut by ep and whole on every rank of tp; each value is saved once."""
    model = {
        "vocab_size": 264, "num_attention_experts": 4, "num_attention_heads": 8, "head_dim": 4, "qk_norm": "head",
        "shared_intermediate_size": 16,
    }  # fmt: skip
    straight = train(corpus, tmp_path / "straight", (1, 2, 2), {"zero": zero, "model": model}, steps=4, save_every=2)
    half = tmp_path / "straight" / "checkpoints" / "step-00000002"
    resumed = train(corpus, tmp_path / "resumed", (2, 1, 1), {"zero": then, "model": model}, steps=4, resume=str(half))
    for ours, theirs in zip(resumed, straight[2:], strict=True):
        for key in ("loss", "lm_loss", "aux_loss", "grad_norm"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-5), (ours["step"], key)


OTHER = [
    ((2, 2, 1), (1, 1, 1), 2, 0),
    pytest.param(*((1, 1, 1), (2, 2, 1), 0, 2), marks=pytest.mark.slow),
    pytest.param(*((2, 1, 2), (1, 2, 2), 1, 2), marks=pytest.mark.slow),
    ((1, 4, 1), (2, 1, 2), 2, 1),
]


@pytest.mark.parametrize(("first", "second", "zero", "then"), OTHER, ids=str)
def test_another_layout_continues_the_same_run(
    corpus: Path, tmp_path: Path, first: Layout, second: Layout, zero: int, then: int
):
    model = {"vocab_size": 264, "expert_bias_update_rate": 0.01}
    straight = train(corpus, tmp_path / "straight", first, {"zero": zero, "model": model}, save_every=5)
    half = tmp_path / "straight" / "checkpoints" / "step-00000005"
    resumed = train(corpus, tmp_path / "resumed", second, {"zero": then, "model": model}, resume=str(half))
    assert [row["step"] for row in resumed] == [6, 7, 8, 9, 10]
    for ours, theirs in zip(resumed, straight[5:], strict=True):
        for key in ("loss", "lm_loss", "aux_loss", "grad_norm", "lr"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-5), (ours["step"], key)
    wanted, found = (Checkpoint(tmp_path / x / "checkpoints" / "step-00000010") for x in ("straight", "resumed"))
    whole = transformer_of(loop_run(corpus, tmp_path, first, settings={"model": model}), Mesh())
    for name, _ in whole.named_parameters():
        for kind in ("master", "exp_avg", "exp_avg_sq"):
            assert relative(found.whole(name, kind), wanted.whole(name, kind)) < 1e-4, (name, kind)
    for key in ("expert_bias/0",):
        torch.testing.assert_close(found.extra(0)[key], wanted.extra(0)[key])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("first", "second"), [((1, 1, 1), (2, 1, 1)), ((2, 1, 1), (1, 1, 1))], ids=str)
def test_case_23_one_data_rank_continues_on_two_and_back(
    corpus: Path, tmp_path: Path, first: Layout, second: Layout, precision: str
):
    """The engine without DeepSpeed and the one with it read each other's checkpoints: every master and moment."""
    settings = {"zero": 2, "precision": precision, "model": BIASED}
    straight = train(corpus, tmp_path / "straight", first, settings, steps=4, save_every=2)
    half = tmp_path / "straight" / "checkpoints" / "step-00000002"
    resumed = train(corpus, tmp_path / "resumed", second, settings, steps=4, save_every=1, resume=str(half))
    for ours, theirs in zip(resumed, straight[2:], strict=True):
        for key in ("loss", "lm_loss", "aux_loss", "grad_norm"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-5 if precision == "fp32" else 2**-8), key
    wanted, found = (Checkpoint(tmp_path / x / "checkpoints" / "step-00000004") for x in ("straight", "resumed"))
    for name, _ in transformer_of(loop_run(corpus, tmp_path, first, settings=settings), Mesh()).named_parameters():
        for kind in ("master", "exp_avg", "exp_avg_sq"):
            rounded = precision == "bf16" and kind != "master"  # DeepSpeed adds the ranks' gradients in bf16
            error = relative(found.whole(name, kind), wanted.whole(name, kind))
            assert error < (2**-4 if rounded else 1e-4), (name, kind, error)


@pytest.mark.slow
def test_twenty_steps_on_eight_ranks_then_on_others(corpus: Path, tmp_path: Path):
    """dp 4 x ep 2, then dp 2 x ep 2 x tp 2, ep 8, and one process: the losses of the run that was never interrupted."""
    settings = {"zero": 2, "model": BIASED | {"num_local_experts": 8}}
    straight = train(corpus, tmp_path / "straight", (4, 2, 1), settings, steps=30, save_every=20)
    half = tmp_path / "straight" / "checkpoints" / "step-00000020"
    for layout in ((2, 2, 2), (1, 8, 1), (1, 1, 1)):
        out = tmp_path / "x".join(map(str, layout))
        resumed = train(corpus, out, layout, settings, steps=30, resume=str(half))
        assert [row["step"] for row in resumed] == list(range(21, 31))
        for ours, theirs in zip(resumed, straight[20:], strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5), (layout, ours["step"])
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5), (layout, ours["step"])


def test_auto(corpus: Path, tmp_path: Path):
    """Nothing there: a fresh run. Something there: the newest, with rows of later steps dropped from the log."""
    settings = {"zero": 1}
    fresh = train(corpus, tmp_path, (1, 1, 1), settings, steps=4, save_every=2, resume="auto")
    assert [row["step"] for row in fresh] == [1, 2, 3, 4]
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000004")  # as if the run had been killed after step 2
    again = train(corpus, tmp_path, (1, 1, 1), settings, steps=4, save_every=2, resume="auto")
    assert exact(again) == exact(fresh)
    more = train(corpus, tmp_path, (1, 1, 1), settings, steps=6, resume="auto")
    assert [row["step"] for row in more] == [1, 2, 3, 4, 5, 6] and exact(more)[:4] == exact(fresh)


def test_an_earlier_checkpoint_starts_another_past(corpus: Path, tmp_path: Path):
    """What was later than it is kept but no longer counts, so that --resume auto never mixes two histories."""
    settings = {"zero": 1}
    train(corpus, tmp_path, (1, 1, 1), settings, steps=6, save_every=2)
    root = tmp_path / "checkpoints"
    train(corpus, tmp_path, (1, 1, 1), settings, steps=3, resume=str(root / "step-00000002"))
    assert steps_in(root) == [2, 3]
    assert {path.name for path in root.glob("*.aside")} == {"step-00000004.aside", "step-00000006.aside"}


def test_background_saves_are_the_same_checkpoints(corpus: Path, tmp_path: Path):
    layout, settings = (2, 2, 1), {"zero": 2, "model": BIASED}
    straight = train(corpus, tmp_path / "a", layout, settings, save_every=3)
    behind = train(corpus, tmp_path / "b", layout, settings, save_every=3, async_save=True, keep_last=2)
    assert exact(straight) == exact(behind)
    assert steps_in(tmp_path / "a" / "checkpoints") == [3, 6, 9, 10]
    assert steps_in(tmp_path / "b" / "checkpoints") == [9, 10]
    for step in ("step-00000009", "step-00000010"):
        wanted, found = (tensors(tmp_path / x / "checkpoints" / step) for x in "ab")
        assert wanted.keys() == found.keys() and all(torch.equal(wanted[key], found[key]) for key in wanted)


@pytest.mark.parametrize("policy", ["stop", "warn"])
def test_a_full_disk(corpus: Path, tmp_path: Path, policy: str, monkeypatch: pytest.MonkeyPatch):
    """Training stops with exit code 74, or goes on, as the run says; the older checkpoint is whole either way."""
    run = loop_run(corpus, tmp_path, (2, 1, 1), settings={"zero": 1}, steps=6, save_every=2, on_save_error=policy)
    real, calls = disk.require_space, []

    def full_at_step_4(folder: Path, needed: int) -> None:
        calls.append(needed)
        real(folder, 10**18 if len(calls) == 2 else needed)

    monkeypatch.setattr(disk, "require_space", full_at_step_4)

    def on_rank(rank: int) -> str:
        session = session_of(run, build_mesh(2, 1, 1))
        try:
            fit(session)
        except StorageError as error:
            assert error.exit_code == 74
            return str(error)
        finally:
            session.log.close()
        return ""

    said = run_on_ranks(on_rank, 2)
    assert said[0] == said[1] and bool(said[0]) == (policy == "stop")
    assert len(read_rows(tmp_path / "metrics.jsonl")) == (4 if policy == "stop" else 6)
    assert steps_in(tmp_path / "checkpoints") == ([2] if policy == "stop" else [2, 6])
    assert not verify(tmp_path / "checkpoints" / "step-00000002", ALONE)


def test_damage_costs_the_steps_since_the_one_before(corpus: Path, tmp_path: Path):
    fresh = train(corpus, tmp_path, (1, 1, 1), {"zero": 1}, steps=6, save_every=2)
    path = tmp_path / "checkpoints" / "step-00000006" / "rank-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1])

    def on_rank(rank: int) -> None:
        run = loop_run(corpus, tmp_path, (1, 1, 1), settings={"zero": 1}, steps=6, resume=str(path.parent))
        with pytest.raises(
            DataError, match=r"rank-00000\.safetensors: \d+ bytes, written with \d+; resume from another"
        ):
            begin_of(session_of(run, build_mesh(1, 1, 1)))

    run_on_ranks(on_rank, 1)
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 6  # nothing was touched
    again = train(corpus, tmp_path, (1, 1, 1), {"zero": 1}, steps=6, save_every=2, resume="auto")
    assert exact(again) == exact(fresh)
    assert steps_in(tmp_path / "checkpoints") == [2, 4, 6]
    assert (tmp_path / "checkpoints" / "step-00000006.aside").is_dir()
