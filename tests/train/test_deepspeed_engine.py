"""ZeRO stages, precisions and offload: the same training by other means."""

import itertools
from typing import Any

import numpy as np
import pytest

from moe_engine.config.checks import layout_problems, other_problems
from moe_engine.parallel.local_ranks import run_on_ranks
from moe_engine.parallel.mesh import build_mesh
from moe_engine.train.deepspeed_engine import DeepSpeedEngine
from moe_engine.train.engine import OneRank
from moe_engine.train.session import make_engine
from moe_engine.train.terms import pretraining_terms
from tests.train.small import engine_of, my_batches, relative, run_of, train_step, transformer_of

STEPS = 5
BUCKETS = ("reduce_bucket_size", "allgather_bucket_size")
Trace = tuple[list[float], list[float], dict[str, np.ndarray]]


def train(rank: int, layout: tuple[int, int, int], settings: dict[str, Any]) -> Trace:
    """Losses, gradient norms and this rank's fp32 master values, put together from the slices it owns."""
    mesh, run = build_mesh(*layout), run_of(*layout, accumulation=2, **settings)
    engine, terms = engine_of(run, mesh), pretraining_terms(run.model)
    reports = [train_step(engine, terms, mesh, my_batches(run, mesh, s), 1e-3) for s in range(STEPS)]
    assert all(report.skipped is None for report in reports)
    masters = {f"{owned.name}[{owned.start}]": owned.master.float().numpy().copy() for owned in engine.owned()}
    return [float(r.measures["lm_loss"]) for r in reports], [r.grad_norm for r in reports], masters


def run_stages(layout: tuple[int, int, int], kinds: list[dict[str, Any]]) -> list[Trace]:
    def on_rank(rank: int) -> list[Trace]:
        return [train(rank, layout, kind) for kind in kinds]

    per_rank = run_on_ranks(on_rank, layout[0] * layout[1] * layout[2])
    for rank in per_rank[1:]:
        for mine, first in zip(rank, per_rank[0], strict=True):
            assert mine[:2] == first[:2]  # all ranks report the same numbers, bit for bit
    return per_rank[0]


FP32 = [
    *({"zero": zero} for zero in (0, 1, 2)),
    *({"zero": zero, "offload_optimizer": True} for zero in (1, 2)),
    {"zero": 2, "overlap_comm": False, "reduce_bucket_size": 1000, "allgather_bucket_size": 1000},
]


@pytest.mark.parametrize("layout", [(2, 2, 1), pytest.param((1, 2, 2), marks=pytest.mark.slow)])
def test_stages_agree_in_fp32(layout: tuple[int, int, int]):
    truth, *others = run_stages(layout, FP32)
    for (losses, norms, masters), kind in zip(others, FP32[1:], strict=True):
        assert losses == pytest.approx(truth[0], rel=1e-5), kind
        assert norms == pytest.approx(truth[1], rel=1e-5), kind
        if kind["zero"] == 1 and "offload_optimizer" not in kind:
            slices = masters
        elif "reduce_bucket_size" not in kind:
            assert masters.keys() == slices.keys()  # stage 1 and 2 own the same elements
            for name, part in masters.items():
                np.testing.assert_allclose(part, slices[name], rtol=1e-4, atol=1e-6, err_msg=f"{kind} {name}")


@pytest.mark.parametrize("layout", [(1, 1, 1), (2, 1, 1)])
def test_stage_3_agrees_where_it_is_allowed(layout: tuple[int, int, int]):
    two, three, offloaded = run_stages(layout, [{"zero": 2}, {"zero": 3}, {"zero": 3, "offload_optimizer": True}])
    for losses, norms, _ in (three, offloaded):
        assert losses == pytest.approx(two[0], rel=1e-5)
        assert norms == pytest.approx(two[1], rel=1e-5)


BF16 = [{"zero": 1}, {"zero": 2}, {"zero": 1, "offload_optimizer": True}, {"zero": 2, "offload_optimizer": True}]


@pytest.mark.parametrize("layout", [(1, 1, 1), (2, 2, 1), pytest.param((1, 2, 2), marks=pytest.mark.slow)])
def test_stages_agree_in_bf16_as_far_as_bf16_goes(layout: tuple[int, int, int]):
    """Stages reduce bf16 gradients in different orders, so each gradient element may differ by some units of 2^-9.

    Such a change is relative to the element's summands, so the norm of the first step, over thousands of elements,
    keeps it within 2^-8. AdamW's first steps are lr * g / |g|: an element whose gradient is rounding noise may go the
    other way, 2 lr apart. From then on two runs are neighbours, not twins; their losses stay within 2^-8 at this lr.
    """
    fp32, *kinds = run_stages(layout, [{"zero": 1}, *({**kind, "precision": "bf16"} for kind in BF16)])
    for (losses, norms, masters), kind in zip(kinds, BF16, strict=True):
        assert norms[0] == pytest.approx(fp32[1][0], rel=2**-8), kind
        assert losses == pytest.approx(fp32[0], rel=2**-8), kind
        assert masters.keys() == fp32[2].keys()
        for name, part in masters.items():
            assert part.dtype == np.float32
            apart = np.abs(part - fp32[2][name])
            assert apart.max() <= 2 * 1e-3 * STEPS * 1.1, (kind, name)
            assert np.median(apart) < 1e-3 / 4, (kind, name)  # most elements went the same way
        fine = [np.any(part.view(np.uint32) & 0xFFFF) for part in masters.values()]
        assert all(fine), kind  # masters hold more bits than bf16 has


def test_stage_0_in_bf16_is_refused_by_name():
    assert not other_problems(run_of(zero=0, precision="bf16"))  # one data rank does without DeepSpeed
    (problem,) = layout_problems(run_of(2, zero=0, precision="bf16"), 2)
    assert "parallel.zero: found 0 with precision bf16, expected 1, 2 or 3" in problem


def test_weights_are_the_rounded_masters():
    """In bf16 forward reads bf16(master), on every rank, after a step."""

    def on_rank(rank: int) -> None:
        mesh, run = build_mesh(2, 1, 1), run_of(2, 1, 1, precision="bf16", zero=2)
        engine = engine_of(run, mesh)
        train_step(engine, pretraining_terms(run.model), mesh, my_batches(run, mesh, 0), 1e-2)
        weights = {name: p.detach().view(-1) for p, name in engine.names.items()}
        seen = 0
        for owned in engine.owned():
            part = weights[owned.name][owned.start : owned.start + owned.master.numel()]
            assert np.array_equal(owned.master.bfloat16().float().numpy(), part.float().numpy()), owned.name
            seen += owned.master.numel()
        assert 0 < seen < sum(p.numel() for p in engine.names)  # each rank owns a part

    run_on_ranks(on_rank, 2)


@pytest.mark.parametrize("zero", [0, 1, 2])
def test_owned_slices_cover_every_element_once(zero: int):
    def on_rank(rank: int) -> list[tuple[str, int, int, list[list[int]]]]:
        from moe_engine.parallel.weight import note_of

        mesh, run = build_mesh(2, 2, 1), run_of(2, 2, 1, zero=zero)
        engine = engine_of(run, mesh)
        train_step(engine, pretraining_terms(run.model), mesh, my_batches(run, mesh, 0), 1e-2)
        notes = {name: note_of(p) for p, name in engine.names.items()}
        return [
            (o.name, o.start, o.master.numel(), [[s.start, s.stop] for s in notes[o.name].local_slices()])
            for o in engine.owned()
            if o.first_copy and o.moments["exp_avg"].shape == o.master.shape == o.moments["exp_avg_sq"].shape
        ]

    pieces = [piece for rank in run_on_ranks(on_rank, 4) for piece in rank]
    run = run_of(2, 2, 1)
    from moe_engine.model.transformer import Transformer
    from moe_engine.parallel.mesh import Mesh

    for name, parameter in Transformer(run.model, Mesh()).named_parameters():
        places = []
        for _, start, count, box in (piece for piece in pieces if piece[0] == name):
            inside = np.arange(parameter.numel()).reshape(parameter.shape)[tuple(slice(*side) for side in box)]
            places += inside.reshape(-1)[start : start + count].tolist()
        assert sorted(places) == list(range(parameter.numel())), name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_case_23_one_rank_steps_as_deepspeed_does(precision: str):
    """Masters and moments to the bit; a clipped step to 1e-6: DeepSpeed sums the norm's squares in another order."""

    def on_rank(rank: int) -> None:
        mesh = build_mesh(1, 1, 1)
        for clip, zero in itertools.product((0.0, 0.5), (1, 2)):
            run, states = run_of(accumulation=2, zero=zero, precision=precision, clip=clip), []
            for make in (DeepSpeedEngine, make_engine):
                engine, terms = make(transformer_of(run, mesh), run, mesh), pretraining_terms(run.model)
                for step in range(3):
                    train_step(engine, terms, mesh, my_batches(run, mesh, step), 1e-3)
                states.append({o.name: {"master": o.master} | o.moments for o in engine.owned()})
            assert type(engine) is OneRank and states[0].keys() == states[1].keys()
            for name, theirs in states[0].items():
                for kind, values in theirs.items():
                    error = relative(states[1][name][kind], values)
                    assert error <= (1e-6 if clip else 0), (clip, zero, name, kind, error)

    run_on_ranks(on_rank, 1)


@pytest.mark.parametrize(
    ("settings", "sizes"),
    [
        ({"zero": 1}, (1, 7, 1537, 2, 1536)),
        ({"zero": 2}, (1537, 1000)),
        ({"zero": 3}, (1, 7, 1537)),
        ({"zero": 1, "precision": "bf16"}, (7,)),
        ({"zero": 1, "precision": "bf16", "offload_optimizer": True}, (7, 2)),
        ({"zero": 2, "precision": "bf16"}, (7, 2)),
    ],
    ids=str,
)
def test_case_14_the_rule_on_bucket_sizes_is_deepspeeds(settings: dict[str, Any], sizes: tuple[int, ...]):
    """What the layout check lets through runs, with the loss of large buckets, and what it refuses does not."""

    large: list[dict[str, Any]] = [settings | {"reduce_bucket_size": 1 << 20}]
    kinds = large + [settings | {key: size} for key in BUCKETS for size in sizes]

    def on_rank(rank: int) -> list[bool]:
        mesh, usual, works = build_mesh(2, 1, 1), 0.0, []
        for kind in kinds:
            run = run_of(2, 1, 1, **kind)
            try:
                engine, terms = engine_of(run, mesh), pretraining_terms(run.model)
                reports = [train_step(engine, terms, mesh, my_batches(run, mesh, s), 1e-3) for s in range(2)]
            except AssertionError:
                works.append(False)
                continue
            usual = usual or reports[1].loss
            works.append(reports[1].loss == usual)
        return works

    allowed = [not other_problems(run_of(2, 1, 1, **kind)) for kind in kinds]
    assert allowed[0] and run_on_ranks(on_rank, 2) == [allowed, allowed]
