"""The kernel benchmark: its arithmetic on a tiny run, its routings, and that a wrong contender is seen."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tools.bench_kernels import main, unused
from tools.kernels.contenders import PEERS, differentiable, our_layer, torch_layer
from tools.kernels.inputs import Inputs, choose, make_inputs
from tools.kernels.measure import agreeing, saved_bytes, tolerance
from tools.kernels.shapes import layer_flops, shape_of
from tools.kernels.single_ops import OPS

ROOT = Path(__file__).parents[2]
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
SHAPE, TOKENS, CPU = shape_of("5,2,64,48"), 33, torch.device("cpu")


def inputs(routing: str, dtype: torch.dtype = torch.float32) -> Inputs:
    return make_inputs(SHAPE, TOKENS, routing, dtype, CPU)


def test_a_run_writes_what_it_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "result.json"
    arguments = "--device cpu --shapes 5,2,64,48 --tokens 33 --routing one-hot --dtype fp32 --repeats 2 --threads 1"
    assert main([*arguments.split(), "--json", str(path), "--plot"]) == 0
    printed, result = capsys.readouterr().out, json.loads(path.read_text())
    absent = {peer.name for peer in PEERS if not peer.installed}
    assert result["absent"].keys() == absent
    assert all(f"absent: {peer.name} ({peer.install})" in printed for peer in PEERS if peer.name in absent)
    (group,) = result["groups"]
    assert group["counts"] == [33, 33, 0, 0, 0]
    assert group["work"] == {"forward": 6 * 66 * 64 * 48, "forward+backward": 18 * 66 * 64 * 48}
    rows = {(row["contender"], row["direction"]): row for row in group["rows"]}
    assert {"moe_engine", "torch grouped_mm", "transformers grouped_mm"} <= {name for name, _ in rows}
    for (name, direction), row in rows.items():
        others = [r["seconds"] for (peer, d), r in rows.items() if d == direction and peer != "moe_engine"]
        assert row["ratio"] == min(others) / row["seconds"]
        assert row["per_second"] == group["work"][direction] / row["seconds"]
        assert row["share"] == pytest.approx(row["per_second"] / group["ceilings"]["flops"], rel=1e-12)
        assert row["error"] <= 1e-4 and (row["error"] == 0) == (name == "moe_engine")
        assert row["peak_bytes"] is None and row["saved_bytes"] > 0
    assert path.with_suffix(".png").stat().st_size > 0


def test_a_run_writes_over_no_other(tmp_path: Path) -> None:
    path = tmp_path / "cpu-2026-01-01.json"
    assert unused(path) == path
    path.touch()
    (tmp_path / "cpu-2026-01-01-2.json").touch()
    assert unused(path).name == "cpu-2026-01-01-3.json"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("routing", ["balanced", "zipf", "one-hot"])
def test_router_chooses_what_the_routing_says(routing: str, dtype: torch.dtype) -> None:
    """Also after rounding, and for a router that multiplies in bf16."""
    i = inputs(routing, dtype)
    chosen = (i.x @ i.router.T).topk(SHAPE.top_k).indices
    assert torch.equal(chosen.flatten().bincount(minlength=SHAPE.experts), i.counts)
    assert i.counts.sum() == TOKENS * SHAPE.top_k
    if routing == "one-hot":
        assert i.counts.tolist() == [TOKENS, TOKENS, 0, 0, 0]


def test_popularities() -> None:
    tokens, experts = 40_000, 4
    generator = torch.Generator().manual_seed(0)
    for routing, weight in (("balanced", torch.ones(experts)), ("zipf", 1 / torch.arange(1.0, experts + 1))):
        p = weight / weight.sum()
        first = choose(routing, tokens, experts, 1, generator).flatten().bincount(minlength=experts) / tokens
        torch.testing.assert_close(first, p, atol=0.01, rtol=0)
        pairs = choose(routing, tokens, experts, 2, generator)
        assert (pairs[:, 0] != pairs[:, 1]).all()
        second = torch.stack([sum(p[j] * p[e] / (1 - p[j]) for j in range(experts) if j != e) for e in range(experts)])
        found = pairs.flatten().bincount(minlength=experts) / tokens
        torch.testing.assert_close(found, p + second, atol=0.015, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", OPS)
def test_every_op_agrees_with_plain_torch(op: str, dtype: torch.dtype) -> None:
    contenders = {c.name: lambda c=c: c for c in OPS[op](inputs("zipf", dtype), SHAPE).contenders}
    found, left_out, differs = agreeing(contenders, tolerance(dtype, CPU))
    assert set(found) == {"moe_engine", "torch"} and not left_out and not differs


def test_work_of_the_pieces_is_that_of_the_layer() -> None:
    layer = layer_flops(SHAPE, TOKENS)
    assert OPS["experts"](inputs("zipf"), SHAPE).work.amount == layer
    part = OPS["grouped_mm"](inputs("zipf"), SHAPE).work.amount
    assert {name: flops * 3 / 2 for name, flops in part.items()} == pytest.approx(layer)


def test_a_wrong_or_failing_contender_is_named() -> None:
    i = inputs("zipf")

    def wrong_weights():  # right output, wrong gradient of the router
        layer = our_layer(i)
        assert layer.backward
        return layer._replace(backward=lambda y: (g := layer.backward(y), (g[0], -g[1], *g[2:]))[1])

    def broken():
        raise RuntimeError("no kernel image\nis available")

    not_a_number = differentiable("nan", lambda: i.x * float("nan"), i.leaves[:1], i.dy)
    builders = {"moe_engine": lambda: our_layer(i), "torch": lambda: torch_layer(i), "wrong": wrong_weights}
    found, left_out, differs = agreeing(builders | {"broken": broken, "nan": lambda: not_a_number}, 1e-4)
    assert set(found) == {"moe_engine", "torch"} and differs
    assert left_out["wrong"] == "differs from moe_engine: relative error 2.0e+00 in gradient 2"
    assert left_out["broken"] == "RuntimeError: no kernel image"
    assert "nan" in left_out
    found, left_out, differs = agreeing({"nan": lambda: not_a_number, "torch": lambda: torch_layer(i)}, 1e-4)
    assert not found and differs and left_out["nan"] == "differs from nan: relative error inf in the output"


def test_saved_bytes_are_those_of_the_op() -> None:
    """D + 2 K F elements a token, and what routing takes: E logits' probabilities, K weights and 3 K indices."""
    rows = TOKENS * SHAPE.top_k
    kept = TOKENS * SHAPE.hidden + rows * 2 * SHAPE.ffn
    routing = TOKENS * SHAPE.experts + 4 * rows + SHAPE.experts
    assert 4 * kept <= saved_bytes(our_layer(inputs("zipf"))) <= 4 * (kept + routing)


def test_help_answers_without_torch() -> None:
    code = """
import sys
from tools.bench_kernels import main
try:
    main(["--help"])
finally:
    assert not {"torch", "matplotlib"} & sys.modules.keys()
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0 and "--routing" in run.stdout, run.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--shapes 8,2,512", "expected E,K,D,F or one of mixtral-8x7b"),
        ("--shapes 8,9,512,64", "1 <= K <= E <= D"),
        ("--ops nothing", "expected all or one of layer, router_logits"),
        ("--peers nobody", "expected all, none, or some of torch, transformers"),
        ("--json none --plot", "--plot draws beside the JSON"),
        ("--json nowhere/x.json", "found --json nowhere/x.json, expected a path in a folder that exists"),
        pytest.param("--device cuda", "no GPU here; leave it out", marks=NO_GPU),
    ],
)
def test_mistakes_are_refused(arguments: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments.split())
    assert stop.value.code == 2 and expected in capsys.readouterr().err
