"""Tiny random models as transformers saves them, and ours on the same weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from moe_engine.checkpoint.pieces import Piece
from moe_engine.checkpoint.source import Source
from moe_engine.config import Model
from moe_engine.model.transformer import Transformer
from moe_engine.parallel.mesh import Mesh
from moe_engine.parallel.weight import note_of

transformers = pytest.importorskip("transformers")

LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip
SIZES = dict(vocab_size=96, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4,
             initializer_range=0.2, bos_token_id=1, eos_token_id=2, pad_token_id=None)  # fmt: skip
SIDE = {
    "tokenizer.json": b'{"model": {}}\r\n',
    "tokenizer_config.json": '{"chat_template": "{{ ü }}"}'.encode(),
    "chat_template.jinja": b"{{ messages }}\n\n",
    "generation_config.json": b'{"eos_token_id": [2, 3]}',
    "special_tokens_map.json": b"{}",
    "tokenizer.model": bytes(range(256)),
}


def theirs(family: str, **changes: Any) -> nn.Module:
    """A model of transformers with random weights, in eval mode."""
    experts = {"num_experts_per_tok": 2, "intermediate_size": 24}
    kinds: dict[str, tuple[Any, Any, dict[str, Any]]] = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {"intermediate_size": 40}),
        "mixtral": (transformers.MixtralConfig, transformers.MixtralForCausalLM, experts | {"num_local_experts": 4}),
        "qwen3_moe": (
            transformers.Qwen3MoeConfig, transformers.Qwen3MoeForCausalLM,
            {"num_experts_per_tok": 2, "intermediate_size": 40, "moe_intermediate_size": 24, "num_experts": 4,
             "head_dim": 12, "mlp_only_layers": [1]},
        ),
        "olmoe": (transformers.OlmoeConfig, transformers.OlmoeForCausalLM, experts | {"num_experts": 4}),
    }  # fmt: skip
    config, kind, more = kinds[family]
    torch.manual_seed(3)
    model = kind(config(**SIZES | more | changes))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter, mean=1.0, std=0.2)
    return model.eval()


def save(model: nn.Module, folder: Path, *, fused: bool = False, shard: str = "30KB", side: bool = True) -> Path:
    """As transformers 5 writes it, with the files of a tokenizer beside it."""
    model.save_pretrained(folder, max_shard_size=shard, save_original_format=not fused)  # pyright: ignore
    for name, content in SIDE.items() if side else ():
        (folder / name).write_bytes(content)
    return folder


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the safetensors files of a folder, by name."""
    out: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                assert name not in out, f"{name} is there twice"
                out[name] = file.get_tensor(name)
    return out


def same_tensors(a: Path, b: Path) -> None:
    """Names, dtypes, shapes and bits."""
    ours, wanted = tensors_of(a), tensors_of(b)
    assert ours.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert ours[name].dtype == tensor.dtype and ours[name].shape == tensor.shape, name
        assert torch.equal(ours[name].view(torch.uint8), tensor.view(torch.uint8)), name


def ours(source: Source, model: Model, mesh: Mesh) -> Transformer:
    """The engine's model on this rank, its weights read from a source."""
    decoder = Transformer(model, mesh)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            box = tuple((s.start, s.stop) for s in note_of(parameter).local_slices())
            source.fill("master", Piece(name, box, 0, parameter.numel()), parameter.data.view(-1))
    return decoder.eval()


def edit_index(folder: Path, change: dict[str, Any]) -> None:
    """Put other files into weight_map."""
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] |= change
    path.write_text(json.dumps(index))
