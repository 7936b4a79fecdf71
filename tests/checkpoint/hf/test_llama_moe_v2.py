"""LLaMA-MoE-v2's names: attention experts, an expert that is always on, dense layers at both ends; there and back."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_engine.checkpoint.hf.export import ExportOptions, export_checkpoint
from moe_engine.checkpoint.hf.folder import HfFolder
from moe_engine.checkpoint.hf.to_checkpoint import import_folder
from moe_engine.checkpoint.pieces import Box, Piece
from moe_engine.checkpoint.weights_only import write_weights
from moe_engine.config import Model
from moe_engine.config.hf import family_of
from moe_engine.config.sizes import parameter_counts
from moe_engine.config.weights import weight_shapes
from moe_engine.errors import ConfigError
from tests.checkpoint.hf.small import same_tensors, tensors_of

BASE = dict(
    vocab_size=40, hidden_size=16, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=6,
    intermediate_size=32, num_local_experts=7, num_experts_per_tok=1, moe_intermediate_size=4, moe_layers=(1, 2),
    shared_intermediate_size=4,
)  # fmt: skip
ATTENTION = dict(num_attention_experts=2, num_attention_experts_per_tok=1, attention_moe_layers=(1, 2))
CASES: dict[str, dict[str, Any]] = {
    "residual": {},
    "attention": ATTENTION | {"attention_scaling_factor": 2.0, "routed_scaling_factor": 3.0},
    "shared heads": ATTENTION | {"num_attention_experts": 4, "num_attention_experts_per_tok": 2},
    "vanilla everywhere": {
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "moe_layers": "all",
        "shared_intermediate_size": 0,
        **(ATTENTION | {"attention_moe_layers": "all", "routed_scaling_factor": 4.0}),
    },
}


class Drawn:
    """Random weights of a model."""

    def __init__(self, model: Model):
        self.shapes = weight_shapes(model)
        torch.manual_seed(5)
        self.weights = {name: torch.randn(shape).bfloat16() for name, shape in self.shapes.items()}

    def part(self, name: str, box: Box, dtype: torch.dtype | None = None) -> torch.Tensor:
        return self.weights[name][tuple(slice(a, b) for a, b in box)].contiguous().to(dtype or torch.bfloat16)

    def dtype(self, name: str, box: Box) -> torch.dtype:
        return torch.bfloat16


@pytest.mark.parametrize("case", CASES)
def test_names_shapes_and_bits(case: str, tmp_path: Path) -> None:
    model = Model.model_validate(BASE | CASES[case])
    drawn = Drawn(model)
    pieces = {
        name: Piece(name, tuple((0, side) for side in shape), 0, torch.Size(shape).numel())
        for name, shape in drawn.shapes.items()
    }
    write_weights(drawn, model, [pieces], {}, {}, tmp_path / "checkpoint", None)
    with pytest.raises(ConfigError, match="no Hugging Face family"):  # transformers' Mixtral would load it wrongly
        family_of(model)
    options = ExportOptions(family="llama_moe_v2", dtype="bfloat16")
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "hf", options)
    found, ours = tensors_of(tmp_path / "hf"), drawn.weights
    inner = "model.layers.1"
    experts = ours["layers.1.ffn.experts.w_gate_up"]
    assert torch.equal(found[f"{inner}.block_sparse_moe.experts.3.w1.weight"], experts[3, 0])
    assert torch.equal(found[f"{inner}.block_sparse_moe.experts.3.w3.weight"], experts[3, 1])
    if model.shared_intermediate_size:
        assert torch.equal(found[f"{inner}.mlp_residual.w2.weight"], ours["layers.1.ffn.shared.down.weight"])
        assert torch.equal(found["model.layers.0.block_sparse_moe.w3.weight"], ours["layers.0.ffn.w_gate_up"][1])
    if model.num_attention_experts:
        q, o = (ours[f"layers.1.attention.experts.w_{letter}"] for letter in "qo")
        assert torch.equal(found[f"{inner}.self_attn.q_proj.1.weight"], q[1].flatten(0, 1))
        assert torch.equal(found[f"{inner}.self_attn.o_proj.1.weight"], o[1].flatten(1))
        assert found[f"{inner}.self_attn.gate.weight"].shape == (model.num_attention_experts, 16)
    assert sum(tensor.numel() for tensor in found.values()) == parameter_counts(model).total
    again = HfFolder(tmp_path / "hf")
    assert again.family == "llama_moe_v2" and again.config["model_type"] == "mixtral"
    for key in ("moe_layers", "shared_intermediate_size", "routed_scaling_factor", "attention_scaling_factor"):
        same = getattr(again.model, key) == getattr(model, key)
        assert same or (key.startswith("attention") and not model.num_attention_experts), key
    import_folder(again, tmp_path / "again")
    export_checkpoint(tmp_path / "again", tmp_path / "twice", ExportOptions())
    same_tensors(tmp_path / "twice", tmp_path / "hf")
    assert (tmp_path / "twice" / "config.json").read_bytes() == (tmp_path / "hf" / "config.json").read_bytes()


def test_published_configuration_counts() -> None:
    """The released 8top2: 8,031,309,824 parameters, of which the routers are what the dense model lacks."""
    config = json.loads(
        """{"model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 1792, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "num_local_experts": 8,
        "num_experts_per_tok": 2, "scale_factor": 4.0, "use_attn_moe": false, "num_moe_contract_layers": 0,
        "rope_theta": 500000.0, "max_position_embeddings": 8192, "moe_type": "modulelist", "hidden_act": "silu"}"""
    )
    from moe_engine.config.hf import model_from_hf

    model = model_from_hf(config)
    counts = parameter_counts(model)
    assert counts.total == 8_031_309_824 and counts.total - counts.routers == 8_030_261_248
    assert counts.active == 3_803_451_392 and model.intermediate_size == 14336
