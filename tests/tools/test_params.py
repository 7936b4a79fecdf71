"""Counts against published totals, against every parameter of a model on the meta device, and PEFT's own line."""

import json
import math
import re
from collections import Counter
from pathlib import Path

import pytest
import torch

from moe_engine.config import Model, Parallel
from moe_engine.config.files import read_model
from moe_engine.config.hf import FAMILIES
from moe_engine.config.sizes import parameter_counts, rank_parameters
from moe_engine.config.weights import weights_of
from moe_engine.model.transformer import Transformer
from moe_engine.parallel.mesh import Axis, Mesh
from moe_engine.parallel.weight import note_of
from moe_engine.plan.params import PROJECTIONS, Lora, count, stem
from tools.params import main

ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = ROOT.parent / "shared" / "data" / "configs_hf"
HALF = ["--model", "llama-3.2-3b-moe-8x-half"]
ODD = Model.model_validate(
    {"vocab_size": 34, "hidden_size": 24, "intermediate_size": 22, "num_hidden_layers": 3, "num_attention_heads": 4}
    | {"num_key_value_heads": 2, "head_dim": 10, "num_local_experts": 6, "moe_intermediate_size": 14}
    | {"moe_layers": (0, 2), "num_experts_per_tok": 3}
)

ROUTED = ODD.model_copy(
    update={"num_attention_experts": 2, "attention_moe_layers": (0, 1), "shared_intermediate_size": 18}
    | {"num_attention_experts_per_tok": 1, "qk_norm": "head"}
)


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = main(list(arguments))
    return code, "".join(capsys.readouterr())


def numbers(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    code, text = said(capsys, *arguments, "--json")
    assert code == 0, text
    return json.loads(text)


def preset(name: str) -> Model:
    return Model.model_validate(read_model(name))


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("mixtral-8x7b", 46_702_792_704, 12_879_925_248),
        ("llama-3.2-3b", 3_212_749_824, 3_212_749_824),
        ("llama-3-8b", 8_030_261_248, 8_030_261_248),
        ("llama-3.2-3b-moe-8x-half", 9_555_225_600, 3_213_437_952),
        ("llama-3.2-3b-moe-8x", 18_010_942_464, 5_327_367_168),
        ("llama-moe-v2-8b", 8_031_309_824, 3_803_451_392),
        ("qwen3-30b-a3b", 30_532_122_624, 3_353_032_704),
        ("olmoe-1b-7b", 6_919_161_856, 1_282_017_280),
    ],
)
def test_published_totals(name: str, total: int, active: int, capsys: pytest.CaptureFixture[str]) -> None:
    found = numbers(capsys, "--model", name)
    whole = {"parameters": total, "active": active, "on_one_rank": total, "trainable": total}
    assert found["all"] == whole and found["bf16_bytes"] == 2 * total
    assert {key: sum(part[key] for part in found["components"].values()) for key in whole} == whole
    assert f" {total:,} " in said(capsys, "--model", name)[1]


def test_the_line_that_peft_prints(capsys: pytest.CaptureFixture[str]) -> None:
    code, text = said(capsys, *HALF, "--lora-rank", "64")
    line = "trainable params: 344,981,504 || all params: 9,900,207,104 || trainable%: 3.4846"
    assert code == 0 and text.rstrip("\n").endswith("\n" + line)
    assert "bf16      19.80 GB (18.44 GiB) in all" in text
    layers, experts, rank, hidden, width = 28, 8, 64, 3072, 4096
    attention = layers * rank * 2 * ((hidden + 3072) + (hidden + 1024))
    gate_and_up_fused = layers * experts * rank * ((hidden + 2 * width) + (width + hidden))
    assert (
        attention + gate_and_up_fused == 300_941_312 != numbers(capsys, *HALF, "--lora-rank", "64")["all"]["trainable"]
    )


def test_what_trains(capsys: pytest.CaptureFixture[str]) -> None:
    def trainable(*flags: str) -> int:
        return numbers(capsys, *HALF, *flags)["all"]["trainable"]

    lora = ["--lora-rank", "64"]
    assert trainable(*lora, "--freeze", "attention") == 308_281_344
    assert trainable(*lora, "--freeze", "attention", "--train", "router") == 308_281_344 + 688_128 == 308_969_472
    assert trainable("--train", "router") == trainable("--train", "routers") == 688_128
    assert trainable("--freeze", "experts,embedding") == 9_555_225_600 - 28 * 8 * 3 * 3072 * 4096 - 128_256 * 3072
    assert trainable(*lora, "--lora-targets", "q,v") == 28 * 64 * ((3072 + 3072) + (3072 + 1024))
    assert (
        "all params: 9,900,207,104 || trainable%: 3.1208"
        in said(capsys, *HALF, *lora, "--freeze", "attention", "--train", "router")[1]
    )


def component_of(name: str) -> str:
    """The component of a parameter of Transformer."""
    words = name.split(".")
    if "attention" in words:
        return {"router": "attention_routers", "experts": "attention_experts"}.get(words[3], "attention")
    beside = {"router": "routers", "experts": "experts", "shared": "shared_experts"}
    if "ffn" in words:
        return beside.get(words[3], "dense_mlp")
    return "norms" if "norm" in words[-2] else words[0]


def enumerated(model: Model, parallel: Parallel, rank: int) -> tuple[Counter[str], Counter[str]]:
    """Parameters of one rank by component, and of adapters on all seven projections, one by one, from their shapes."""
    mesh = Mesh(ep=Axis("ep", parallel.ep), tp=Axis("tp", parallel.tp))
    with torch.device("meta"):
        transformer = Transformer(model, mesh, "none", parallel.replicate_attention_experts)
    own, adapters = Counter(), Counter()
    for name, parameter in transformer.named_parameters():
        # norms of one head are counted with the norms; those of all heads are cut as attention is
        whole = parameter.dim() == 1 and not note_of(parameter).tensor_parallel
        component = "norms" if whole else component_of(name)
        own[component] += parameter.numel()
        over_ep = ["experts"] if parallel.replicate_attention_experts else ["experts", "attention_experts"]
        assert note_of(parameter).expert == (component in over_ep)
        adapted = ("attention", "attention_experts", "dense_mlp", "shared_experts", "experts")
        if component in adapted and parameter.dim() > 1:
            heads = {"w_q": (1, 2), "w_o": (2, 3)}.get(name.rpartition(".")[2], (0, 0))  # are one dimension of theirs
            *copies, rows, columns = parameter.flatten(*heads).shape
            adapters[f"{component} lora"] += math.prod(copies) * rank * (rows + columns)
    return own, adapters


@pytest.mark.parametrize(
    ("model", "layouts"),
    [
        (ODD, [(1, 1, 1), (3, 2, 2), (5, 3, 1), (2, 1, 2), (1, 6, 2)]),
        (ODD.model_copy(update={"tie_word_embeddings": True, "moe_layers": ()}), [(1, 1, 1), (3, 1, 2)]),
        (ODD.model_copy(update={"qk_norm": "head", "shared_intermediate_size": 18}), [(1, 1, 1), (2, 3, 2)]),
        (ODD.model_copy(update={"qk_norm": "projection"}), [(1, 1, 1), (2, 3, 2)]),
        (ROUTED, [(1, 1, 1), (3, 2, 2), (2, 1, 2), (5, 2, 1)]),
        (ROUTED.model_copy(update={"attention_moe_layers": "all", "moe_layers": ()}), [(1, 1, 1), (1, 2, 2)]),
        ("qwen3-30b-a3b", [(1, 1, 1), (3, 16, 4)]),
        ("olmoe-1b-7b", [(1, 1, 1), (1, 8, 16)]),
        ("mixtral-8x7b", [(1, 1, 1), (4, 2, 1), (1, 8, 1), (2, 2, 4)]),
        ("llama-3.2-3b-moe-8x-half", [(1, 1, 1), (2, 4, 2)]),
        ("llama-3.2-3b", [(2, 1, 2)]),
        ("llama-moe-v2-8b", [(1, 4, 8)]),
    ],
)
@pytest.mark.parametrize("replicate", [False, True])
@pytest.mark.parametrize("zero", [0, 2, 3])
def test_counts_equal_an_enumeration(
    model: Model | str, layouts: list[tuple[int, int, int]], zero: int, replicate: bool
) -> None:
    model = preset(model) if isinstance(model, str) else model
    for dp, ep, tp in layouts:
        parallel = Parallel(dp=dp, ep=ep, tp=tp, zero=zero, replicate_attention_experts=replicate)
        census = count(model, parallel, Lora(5), train=["norms"])
        own, adapters = enumerated(model, parallel, rank=5)
        assert {part.name: part.rank for part in census.parts} == own + adapters
        everything = count(model, parallel)
        rank = rank_parameters(model, parallel)
        assert sum(part.rank for part in everything.parts) == rank.resident
        assert everything.optimized == (rank.owned if zero else rank.resident)
        assert everything.held == (rank.owned if zero == 3 else rank.resident)
        expert = adapters["experts lora"] + (0 if replicate else adapters["attention_experts lora"])
        dense = own["norms"] + adapters.total() - expert
        assert census.optimized == (math.ceil(dense / (dp * ep)) + math.ceil(expert / dp) if zero else dense + expert)
        whole_own, whole_adapters = enumerated(model, Parallel(), rank=5)
        assert {part.name: part.parameters for part in census.parts} == whole_own + whole_adapters


@pytest.mark.parametrize(
    "model",
    [
        ODD,
        ROUTED,
        ODD.model_copy(update={"shared_intermediate_size": 18}),
        "mixtral-8x7b",
        "llama-3.2-1b",
        "qwen3-30b-a3b",
    ],
)
def test_projections_are_all_matrices_of_their_components(model: Model | str) -> None:
    """Adapters sit on all matrices of attention and feed-forward layers, and on nothing else."""
    model = preset(model) if isinstance(model, str) else model
    sums = Counter()
    for weight in weights_of(model):
        if stem(weight) in PROJECTIONS:
            sums[weight.component] += weight.parameters
    counts = parameter_counts(model)
    assert sums == Counter(
        attention=counts.attention,
        attention_experts=counts.attention_experts,
        dense_mlp=counts.dense_mlp,
        shared_experts=counts.shared_experts,
        experts=counts.experts,
    )
    active = {part.component: part.active for part in count(model, Parallel()).parts}
    assert active.get("experts", 0) == counts.active_experts
    assert active.get("attention_experts", 0) == counts.active_attention_experts


@pytest.mark.parametrize(("name", "kind"), [("qwen3-30b-a3b", "qwen3_moe"), ("olmoe-1b-7b", "olmoe")])
def test_families_beside_llama_have_the_parameters_of_transformers(name: str, kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    values = read_model(name)
    values["num_experts"] = values.pop("num_local_experts")
    values = {key: value for key, value in values.items() if key not in ("qk_norm", "router_aux_loss")}
    config = transformers.AutoConfig.for_model(kind, **values)
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(config)
    assert sum(parameter.numel() for parameter in theirs.parameters()) == parameter_counts(preset(name)).total


TOTALS = {
    "Qwen--Qwen3-30B-A3B_config.json": 30_532_122_624,
    "veomni_qwen3_moe_toy.json": 999_967_744,
    "Llama-3.2-1B-Instruct_config.json": 1_235_814_400,
    "Llama-3.2-3B-Instruct_config.json": 3_212_749_824,
    "meta-llama--Meta-Llama-3.1-8B_config.json": 8_030_261_248,
    "mistralai--Mixtral-8x7B-v0.1_config.json": 46_702_792_704,
    "drop_upcycling_mixtral_8x1.5B.json": 8_957_429_760,
    "drop_upcycling_mixtral_8x152M.json": 416_608_768,
}


def test_published_configs_are_counted_or_refused_by_family(capsys: pytest.CaptureFixture[str]) -> None:
    if not PUBLISHED.is_dir():
        pytest.skip(f"the published configs are not at {PUBLISHED}")
    counted = set()
    for path in sorted(PUBLISHED.glob("*.json")):
        family = json.loads(path.read_text())["model_type"]
        if family in FAMILIES:
            assert numbers(capsys, "--model", str(path))["all"]["parameters"] == TOTALS[path.name], path.name
            counted.add(path.name)
        else:
            code, text = said(capsys, "--model", str(path))
            assert code == 78 and text.count("\n") == 1 and f"{path}: model_type: found '{family}'" in text
    assert counted >= set(TOTALS)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            ["--freeze", "atention"],
            "freeze: found 'atention', expected components of this model: embedding, attention,",
        ),
        (["--train", "head"], "train: found 'head', expected components of this model: embedding, attention, experts,"),
        (["--train", "router", "--freeze", "routers"], "train, freeze: both name routers"),
        (["--lora-rank", "0"], "lora rank: found 0, expected 1 or more"),
        (["--lora-rank", "-3"], "lora rank: found -3, expected 1 or more"),
        (["--lora-rank", "x"], "argument --lora-rank: invalid int value: 'x'"),
        (["--lora-rank", "8", "--lora-targets", "q,qkv"], "found 'qkv', expected some of q,k,v,o,gate,up,down"),
        (["--lora-rank", "8", "--lora-targets", ""], "found '', expected some of q,k,v,o,gate,up,down"),
        (["--lora-targets", "q"], "--lora-targets: given without a rank, expected --lora-rank R"),
        (["--ep", "3"], "parallel.ep: found 3, expected a divisor of num_local_experts 8"),
        (["--tp", "3"], "parallel.tp: found 3, which does not divide num_key_value_heads 8"),
        (["--zero", "4"], "parallel.zero (--zero): found '4'"),
        (["--zero", "3", "--ep", "2"], "parallel.zero: found 3 with ep 2"),
        (["--model", "mixtral-8x7"], "did you mean mixtral-8x7b?"),
        (["--bogus"], "unrecognized arguments: --bogus"),
    ],
)
def test_bad_input_is_one_line(flags: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = said(capsys, *HALF, *flags)
    assert code == 78 and words in text and text.startswith("error: ") and text.count("\n") == 1


def test_a_model_must_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    code, text = said(capsys)
    assert code == 78 and "expected --model NAME|PATH or --config FILE" in text


def test_runs_and_changes_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    found = numbers(capsys, "--config", str(ROOT / "configs" / "runs" / "mixtral-8x7b-zero2.yaml"), "--dp", "4")
    assert found["layout"] == {"dp": 4, "ep": 2, "tp": 1, "zero": 2}
    assert (2 * found["one_rank"]["held"] + 18 * found["one_rank"]["optimized"]) / 1e9 == pytest.approx(153.4, abs=0.05)
    changed = ["--set", "model.num_local_experts=16", "--set", "model.moe_intermediate_size=2048"]
    assert numbers(capsys, *HALF, *changed)["all"]["parameters"] == 9_555_225_600 + 688_128


def test_the_page_shows_the_real_output(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    shown = re.findall(r"^\$ python tools/params.py (.+)\n((?:.*\n)*?)```$", page, re.MULTILINE)
    assert shown
    for command, output in shown:
        assert said(capsys, *command.split()) == (0, output)
