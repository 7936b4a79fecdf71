"""The arithmetic of weights against the notes of built models: names, order, shapes, cuts, and each rank's parts."""

import json
from pathlib import Path

import pytest
import torch

from moe_engine.config import Model, Parallel
from moe_engine.config.files import preset_names, read_model
from moe_engine.config.hf import model_from_hf
from moe_engine.config.weights import weights_of
from moe_engine.model.transformer import Transformer
from moe_engine.parallel.mesh import Axis, Mesh
from moe_engine.parallel.weight import note_of

SMALL = {
    "vocab_size": 48, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 4, "num_attention_heads": 32,
    "num_key_value_heads": 4, "head_dim": 6,
}  # fmt: skip
KINDS = {
    "dense": {},
    "tied": {"tie_word_embeddings": True, "qk_norm": "head"},
    "moe": {"num_local_experts": 4, "moe_layers": [1, 3], "shared_intermediate_size": 12, "qk_norm": "projection"},
    "attention experts": {"num_attention_experts": 4, "attention_moe_layers": [0, 3], "qk_norm": "head"},
    "both": {"num_local_experts": 4, "moe_intermediate_size": 8, "num_attention_experts": 8},
}
HF = Path(__file__).parents[3] / "shared" / "data" / "configs_hf"


def same(model: Model, mesh: Mesh, parallel: Parallel) -> None:
    replicate = parallel.replicate_attention_experts
    with torch.device("meta"):
        built = dict(Transformer(model, mesh, replicate_attention_experts=replicate).named_parameters())
    ours = list(weights_of(model, replicate))
    assert [weight.name for weight in ours] == list(built)
    for weight in ours:
        parameter = built[weight.name]
        note = note_of(parameter)
        assert weight.shape == note.shape, weight
        assert weight.cut == {d: axis.name for d, axis in note.cut.items()}, weight
        assert weight.on_rank(parallel) == tuple(parameter.shape), weight
        assert weight.expert == note.expert, weight


@pytest.mark.parametrize("replicate", [False, True])
@pytest.mark.parametrize(("ep", "tp"), [(1, 1), (2, 2), (4, 1), (1, 4)])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_built_model(kind: str, ep: int, tp: int, replicate: bool) -> None:
    mesh = Mesh(ep=Axis("ep", ep, ep - 1), tp=Axis("tp", tp, tp - 1))
    parallel = Parallel(ep=ep, tp=tp, replicate_attention_experts=replicate)
    same(Model.model_validate(SMALL | KINDS[kind]), mesh, parallel)


@pytest.mark.parametrize("name", preset_names())
def test_equals_the_built_preset(name: str) -> None:
    same(Model.model_validate(read_model(name)), Mesh(), Parallel())


@pytest.mark.skipif(not HF.is_dir(), reason=f"no real config.json files in {HF}")
def test_equals_the_built_model_of_each_real_configuration() -> None:
    read = 0
    for path in sorted(HF.rglob("*.json")):
        config = json.loads(path.read_text())
        if config.get("model_type") in ("llama", "mixtral", "qwen3_moe", "olmoe"):
            same(model_from_hf(config), Mesh(), Parallel())
            read += 1
    assert read > 3
