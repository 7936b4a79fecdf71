"""tools/upcycle.py from a folder of transformers to a folder or a checkpoint that transformers and the engine read."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe_engine.checkpoint.hf.folder import HfFolder
from moe_engine.checkpoint.open import open_checkpoint
from moe_engine.model.transformer import Transformer
from moe_engine.parallel.mesh import Mesh
from moe_engine.upcycle.flags import COPIES, OPTIONS, PARTITIONS
from moe_engine.upcycle.methods import METHODS, SCORED
from moe_engine.upcycle.options import OF_FEATURES, OF_PROMPTS, Options
from moe_engine.upcycle.routers import DRAWN
from moe_engine.upcycle.source import Upcycled, dense_of
from tests.checkpoint.hf.small import ours, save, tensors_of, theirs, transformers
from tests.tools.upcycling import SIZES, make_home, run

DRAWN_TOO = ["normal", *DRAWN]
TOKENS = torch.randint(300, (3, 21), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_home(tmp_path_factory.mktemp("home"))


def weights(path: Path) -> dict[str, Tensor]:
    """Of a checkpoint, under the engine's names."""
    reader = open_checkpoint(path)
    return {name: reader.whole(name, dtype=None) for name in reader.shapes}


def engine(path: Path) -> Transformer:
    """What the engine makes of a folder or of a checkpoint."""
    if (path / "config.json").exists() and not (path / "manifest.json").exists():
        folder = HfFolder(path)
        return ours(folder, folder.model, Mesh())
    reader = open_checkpoint(path)
    model = reader.model
    return ours(reader, model, Mesh())


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    if isinstance(model, Transformer):
        return model.logits(TOKENS, torch.arange(TOKENS.shape[1]).expand_as(TOKENS)).view(*TOKENS.shape, -1)
    return model(TOKENS).logits


def mixtral(path: Path) -> nn.Module:
    """The folder as transformers reads it, every tensor of it used."""
    options = {"output_loading_info": True, "experts_implementation": "eager"}  # grouped_mm has no odd widths
    model, found = transformers.MixtralForCausalLM.from_pretrained(path, **options)
    assert not found["missing_keys"] and not found["unexpected_keys"] and not found["mismatched_keys"]
    return model.float().eval()


def llama(path: Path) -> nn.Module:
    return transformers.LlamaForCausalLM.from_pretrained(path).float().eval()


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def router(path: Path, layer: int) -> Tensor:
    return tensors_of(path)[f"model.layers.{layer}.block_sparse_moe.gate.weight"]


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("copy", []),
        ("copy", ["--experts", 3, "--top-k", 1, "--router-init", "zeros"]),
        ("copy", ["--experts", 1, "--top-k", 1]),
        ("virtual", ["--granularity", 2]),
        ("virtual", ["--experts", 10, "--top-k", 5, "--granularity", 5, "--router-init", "clusters"]),
        ("drop", ["--drop-ratio", 0]),
    ],
)
def test_exact_methods_are_the_parent_in_transformers(
    method: str, more: list[Any], home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(home, method, tmp_path / "out", *more) == 0
    said = capsys.readouterr().out
    assert "100.0 % of the tokens" in said and "theory      exact: " in said
    ours, wanted = logits(mixtral(tmp_path / "out")), logits(llama(home / "dense"))
    assert apart(ours, wanted) < 1e-5


def test_bf16_keeps_dtype_and_bits(home: Path, tmp_path: Path) -> None:
    assert run(home, "copy", tmp_path / "out", hf="bf16") == 0
    parent, child = tensors_of(home / "bf16"), tensors_of(tmp_path / "out")
    assert {tensor.dtype for tensor in child.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    for layer in range(3):
        for expert in range(4):
            for w, name in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")):
                made = child[f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{w}.weight"]
                assert torch.equal(made, parent[f"model.layers.{layer}.mlp.{name}.weight"])
    untouched = [name for name in parent if ".mlp." not in name]
    assert len(untouched) == 3 + 3 * 6
    assert all(torch.equal(parent[name], child[name]) for name in untouched)


def test_bf16_virtual_of_three_shards_promises_no_bound(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """3 w is no bf16 number."""
    save(theirs("llama", **SIZES, intermediate_size=42).to(torch.bfloat16), tmp_path / "dense", side=False)
    more = ["--experts", 6, "--top-k", 3, "--granularity", 3]
    assert run(tmp_path, "virtual", tmp_path / "out", *more, "--text", home / "text.txt") == 0
    assert "w_down times 3, rounded to bfloat16" in capsys.readouterr().out
    assert apart(logits(mixtral(tmp_path / "out")), logits(llama(tmp_path / "dense"))) < 0.02


@pytest.mark.parametrize("method", ["random", "clustering", "gradient", "llama_moe_v2", "sharing_inner"])
def test_partitions_are_the_same_in_folder_and_checkpoint(method: str, home: Path, tmp_path: Path) -> None:
    """In the folder the scale E/k = 4/3 is part of w2; in the checkpoint it is a number beside the weights."""
    for kind in ("hf", "checkpoint"):
        assert run(home, method, tmp_path / kind, "--top-k", 3, "--format", kind) == 0
    model = open_checkpoint(tmp_path / "checkpoint").model
    assert model.routed_scaling_factor == 4 / 3 and model.moe_intermediate_size == 10
    wanted = logits(engine(tmp_path / "checkpoint"))
    assert apart(logits(mixtral(tmp_path / "hf")), wanted) < 1e-5
    assert apart(logits(engine(tmp_path / "hf")), wanted) < 1e-5


def test_a_partition_with_all_experts_and_scale_e_is_the_parent(home: Path, tmp_path: Path) -> None:
    more = ["--top-k", 4, "--scale", 4, "--router-init", "zeros"]
    assert run(home, "random", tmp_path / "out", *more) == 0
    assert apart(logits(mixtral(tmp_path / "out")), logits(llama(home / "dense"))) < 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_every_method_as_checkpoint_keeps_what_it_does_not_turn(method: str, home: Path, tmp_path: Path) -> None:
    """Experts' rows are the parent's, and dense ends and attention stay bit by bit."""
    more = ["--models", home / "math", "--top-k", 1] if method == "mix" else []
    more += ["--experts", 3] if method in ("sharing_inter", "residual") else []
    more += ["--text-tokens", 4096, "--format", "checkpoint", "--dense-ends", 1]
    assert run(home, method, tmp_path / "out", *more) == 0
    made, parent = weights(tmp_path / "out"), HfFolder(home / "dense")
    if method != "mix":
        for name in parent.shapes:
            assert name.startswith("layers.1.ffn.") or torch.equal(made[name], parent.whole(name, dtype=None)), name
    assert made["layers.1.ffn.router.weight"].shape == (
        2 if method == "mix" else len(made["layers.1.ffn.experts.w_down"]),
        32,
    )
    assert engine(tmp_path / "out").config.moe_layers == (1,)
    if method in PARTITIONS:
        gate_FD, up_FD = parent.whole("layers.1.ffn.w_gate_up", dtype=None)
        down_DF = parent.whole("layers.1.ffn.down.weight", dtype=None)
        for gate_up, down in zip(made["layers.1.ffn.experts.w_gate_up"], made["layers.1.ffn.experts.w_down"]):
            rows = [int((gate_FD == row).all(dim=1).nonzero()) for row in gate_up[0]]
            assert torch.equal(up_FD[rows], gate_up[1]) and torch.equal(down_DF[:, rows], down)


def test_llama_moe_v2(home: Path, tmp_path: Path) -> None:
    """1 + 3 experts of 10 neurons, gates the centroids that group the tokens of importance, attention by heads."""
    more = ["--experts", 3, "--top-k", 1, "--router-init", "clusters", "--no-share-neurons", "--dense-ends", 1]
    more += ["--attention-experts", 4, "--attention-top-k", 2, "--format", "checkpoint", "--text-tokens", 4096]
    assert run(home, "residual", tmp_path / "out", *more) == 0
    made, parent, model = weights(tmp_path / "out"), HfFolder(home / "dense"), engine(tmp_path / "out")
    config = model.config
    assert (config.shared_intermediate_size, config.moe_intermediate_size, config.moe_layers) == (10, 10, (1,))
    assert (config.num_attention_experts, config.attention_scaling_factor, config.attention_moe_layers) == (
        4,
        2.0,
        (1,),
    )
    gate_FD, up_FD = parent.whole("layers.1.ffn.w_gate_up")
    blocks = [made["layers.1.ffn.shared.w_gate_up"], *made["layers.1.ffn.experts.w_gate_up"]]
    rows = [[int((gate_FD == row).all(dim=1).nonzero()) for row in block[0]] for block in blocks]
    assert sorted(neuron for chosen in rows for neuron in chosen) == list(range(40)), "each neuron once"
    assert all(torch.equal(up_FD[chosen], block[1]) for chosen, block in zip(rows, blocks))
    q, k, v, o = (parent.whole(f"layers.1.attention.{letter}.weight") for letter in "qkvo")
    for a in range(4):  # heads of 8; experts 0 and 1 share KV head 0
        experts = {name: made[f"layers.1.attention.experts.{name}"][a] for name in ("w_q", "w_k", "w_v", "w_o")}
        assert torch.equal(experts["w_q"].flatten(0, 1), q[8 * a : 8 * a + 8])
        assert torch.equal(experts["w_o"].flatten(1), o[:, 8 * a : 8 * a + 8])
        kv = slice(8 * (a // 2), 8 * (a // 2) + 8)
        assert torch.equal(experts["w_k"], k[kv]) and torch.equal(experts["w_v"], v[kv])
    assert logits(model).isfinite().all()
    score_EF = importance(home, 1, 4096, made["layers.1.ffn.router.weight"])
    built = METHODS["residual"].build(
        1, dense_of(parent, 1), Options(experts=3, top_k=1, share_neurons=False), score_EF
    )
    assert torch.equal(built.w_down, made["layers.1.ffn.experts.w_down"])
    more[more.index("checkpoint")] = "hf"
    more += ["--family", "llama_moe_v2"]
    assert run(home, "residual", tmp_path / "hf", *more) == 0
    folder = HfFolder(tmp_path / "hf")
    assert folder.family == "llama_moe_v2" and folder.shapes.keys() == made.keys()
    assert all(torch.equal(folder.whole(name), made[name]) for name in made)


def importance(home: Path, layer: int, tokens: int, gate_ED: Tensor) -> Tensor:
    """score[E, F]: the mean of |h dL/dh| over the tokens that each gate takes, by transformers' gradients."""
    ids = torch.tensor([*(home / "text.txt").read_bytes()][:tokens]).view(-1, 32)
    model, seen = llama(home / "dense"), {}
    for name in ("mlp", "mlp.down_proj"):
        note = lambda module, args, name=name: seen.__setitem__(name, args[0])  # noqa: E731
        model.get_submodule(f"model.layers.{layer}.{name}").register_forward_pre_hook(note)
    found = model(ids).logits[:, :-1].flatten(0, 1)
    loss = nn.functional.cross_entropy(found, ids[:, 1:].flatten(), reduction="sum")
    (grad,) = torch.autograd.grad(loss, seen["mlp.down_proj"])
    value_TF = (grad * seen["mlp.down_proj"]).abs()[:, :-1].flatten(0, 1).detach()
    group_T = (seen["mlp"][:, :-1].flatten(0, 1) @ gate_ED.T).argmax(dim=1)
    return torch.stack([value_TF[group_T == e].mean(dim=0) for e in range(len(gate_ED))])


def test_mix_is_an_expert_of_each_model_and_the_mean_of_the_rest(home: Path, tmp_path: Path) -> None:
    assert run(home, "mix", tmp_path / "out", "--models", home / "math", home / "code") == 0
    made, models = tensors_of(tmp_path / "out"), [tensors_of(home / name) for name in ("dense", "math", "code")]
    for name in models[0]:
        if ".mlp." not in name:
            mean = (models[0][name] + models[1][name] + models[2][name]) / 3
            torch.testing.assert_close(made[name], mean, rtol=1e-6, atol=1e-7)
    for expert, model in enumerate(models):
        w2 = made[f"model.layers.2.block_sparse_moe.experts.{expert}.w2.weight"]
        assert torch.equal(w2, model["model.layers.2.mlp.down_proj.weight"])
    assert len(mixtral(tmp_path / "out").get_submodule("model.layers.0.mlp.gate").get_parameter("weight")) == 3


@pytest.mark.parametrize("kind", DRAWN_TOO)
def test_drawn_routers_have_their_spread(kind: str, home: Path, tmp_path: Path) -> None:
    """Over 3 layers x 4 experts x 32 inputs; bounds and deviations of the kinds' definitions."""
    assert run(home, "copy", tmp_path / "out", "--router-init", kind, "--router-std", 0.5) == 0
    rows = torch.stack([router(tmp_path / "out", layer) for layer in range(3)])
    bound = {"xavier": (6 / 36) ** 0.5, "kaiming": 32**-0.5, "uniform_random": 32**-0.5}.get(kind)
    stds = {"zeros": 0, "normal": 0.5, "random": 1, "normal_002": 0.02, "normal_02887": 0.2887, "uniform_scaled": 0.02}
    std = bound / 3**0.5 if bound else stds.get(kind, 12**-0.5)
    assert float(rows.std()) == pytest.approx(std, rel=0.12, abs=1e-9)
    assert bound is None or rows.abs().max() <= bound
    assert float(rows.mean()) == pytest.approx(
        0.5 if kind == "uniform" else 0, abs=5 * std / rows.numel() ** 0.5 + 1e-9
    )
    assert kind == "zeros" or not torch.equal(rows[0], rows[1])


@torch.no_grad()
def mlp_inputs(home: Path, layer: int, tokens: int) -> Tensor:
    """x[T, D] of the first tokens of the text, by transformers."""
    ids = torch.tensor([*(home / "text.txt").read_bytes()][:tokens]).view(-1, 32)
    model, seen = llama(home / "dense"), []
    model.get_submodule(f"model.layers.{layer}.mlp").register_forward_pre_hook(
        lambda module, args: seen.append(args[0])
    )
    model(ids)
    return seen[0].flatten(0, 1)


def test_clusters_are_centroids_and_random_features_are_inputs(home: Path, tmp_path: Path) -> None:
    for kind in OF_FEATURES:
        more = ["--text-tokens", 320, "--router-init", kind, "--top-k", 4, "--granularity", 2]
        assert run(home, "virtual", tmp_path / kind, *more) == 0
    for layer in range(3):
        x_TD = mlp_inputs(home, layer, 320)
        centroids, features = (router(tmp_path / kind, layer) for kind in OF_FEATURES)
        for rows in (centroids, features):
            assert torch.equal(rows[0], rows[1]) and torch.equal(rows[2], rows[3]) and not torch.equal(rows[1], rows[2])
        assert all((x_TD - row).abs().max(dim=1).values.min() < 1e-5 for row in features)
        a, b = centroids[0], centroids[2]
        size = float(320 * (x_TD.mean(dim=0) - b) @ (a - b) / (a - b).square().sum())  # the mean of all lies between
        assert round(size) == pytest.approx(size, abs=0.01) and 144 <= round(size) <= 176
        nearest = torch.argsort((x_TD - a).square().sum(dim=1) - (x_TD - b).square().sum(dim=1))
        for rows, centroid in ((nearest[: round(size)], a), (nearest[round(size) :], b)):  # Lloyd's fixed point
            torch.testing.assert_close(x_TD[rows].mean(dim=0), centroid, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", OF_PROMPTS)
def test_rows_from_prompts(kind: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--experts", 3, "--router-init", kind, "--prompts", home / "prompts.yaml"]
    assert run(home, "copy", tmp_path / "out", *more) == 0
    for line in capsys.readouterr().err.splitlines():
        assert line.startswith(("warning: layer ", "reading  ", "making  ", "comparing  "))
    model = llama(home / "dense")

    def states(text: str) -> Tensor:  # [layers, S, D]; the bytes tokenizer has no BOS, its EOS stands for it
        found = model(torch.tensor([[256, *text.encode()]]), output_hidden_states=True).hidden_states[:-1]
        return torch.stack(found)[:, 0]

    for number, word in enumerate(("sum", "poem", "code")):
        texts = [states(f"{word} a"), states(word)]
        if kind == "cheap_embed":
            row = (texts[0][:1].sum(dim=1) + texts[1][:1].sum(dim=1) - texts[1][:1].sum(dim=1)).expand(3, -1)
        else:
            each = [x[:, -1] if kind == "hidden" else x.mean(dim=1) for x in texts]
            row = (each[0] + each[1]) / 2 - each[1]
        for layer in range(3):
            wanted = row[layer] / row[layer].norm()
            torch.testing.assert_close(router(tmp_path / "out", layer)[number], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["hf", "checkpoint"])
def test_an_interrupted_run_goes_on(kind: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    more = ["--router-init", "clusters", "--shard-gb", 3e-5, "--format", kind]
    assert run(home, "random", tmp_path / "whole", *more) == 0
    part, calls = Upcycled.part, []

    def breaks(*arguments: Any) -> Tensor:
        calls.append(0)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return part(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Upcycled, "part", breaks)
        run(home, "random", tmp_path / "out", *more)
    assert not (tmp_path / "out").exists()
    left = {path.name: path.stat().st_ino for path in (tmp_path / "out.partial").glob("*.safetensors")}
    assert run(home, "random", tmp_path / "out", *more, "--receipt-tokens", 0) == 0
    now = {path.name: path.stat().st_ino for path in (tmp_path / "out").glob("*.safetensors")}
    assert len(left.items() & now.items()) > 1, "finished files stay"
    for path in sorted((tmp_path / "whole").iterdir()):
        same = path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()
        assert same or path.name == "manifest.json", path.name


def test_a_broken_promise_is_exit_1(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    part = Upcycled.part
    monkeypatch.setattr(
        Upcycled, "part", lambda self, name, *more: part(self, name, *more) * (1.01 if "w_down" in name else 1)
    )
    assert run(home, "copy", tmp_path / "out") == 1
    assert "theory allows 1e-05: this is a bug" in capsys.readouterr().err


def test_flags_without_effect_are_named(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--drop-ratio", 0.2, "--attention-scale", 2, "--prompts", home / "prompts.yaml", "--importance", "total"]
    assert run(home, "copy", tmp_path / "out", *more, "--noise-share", 0.5) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert [line.split(" has no effect")[0] for line in said] == [
        *("warning: --drop-ratio", "warning: --attention-scale", "warning: --prompts", "warning: --importance")
    ]


def test_nothing_runs_that_is_not_asked_for(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a receipt, copying needs neither tokenizer nor text nor the dense model."""
    monkeypatch.setattr("moe_engine.upcycle.decoder.Transformer", None)
    more = ["--receipt-tokens", 0, "--tokenizer", home / "none", "--text", home / "none"]
    assert run(home, "copy", tmp_path / "out", *more) == 0


def test_flags_are_the_librarys_options() -> None:
    assert list(OPTIONS) == list(Options.__dataclass_fields__)
    assert {*COPIES, "half", *PARTITIONS} == {*METHODS} and {*SCORED} <= {*PARTITIONS}
