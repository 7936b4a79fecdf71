"""Logits, loss, balancing loss and every gradient equal transformers' Llama, Mixtral, Qwen3-MoE and OLMoE (tiny,
random, fp32)."""

import pytest
import torch
from torch import nn

from moe_engine.config import Model, RopeScaling
from moe_engine.model.router_losses import balance_loss
from moe_engine.model.transformer import Transformer
from moe_engine.parallel.mesh import Mesh

transformers = pytest.importorskip("transformers")

LLAMA3_ROPE = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
SIZES = dict(
    vocab_size=99, hidden_size=48, intermediate_size=40, num_hidden_layers=3, num_attention_heads=6,
    num_key_value_heads=2, head_dim=10, rope_theta=10_000.0, max_position_embeddings=128, rms_norm_eps=1e-5,
)  # fmt: skip
CASES = {
    "llama": {},
    "llama-tied-rope3": {"tie_word_embeddings": True, "rope_scaling": LLAMA3_ROPE},
    "mixtral": {"num_local_experts": 5, "num_experts_per_tok": 2},
    "mixtral-tied-rope3-top3": {
        "num_local_experts": 7, "num_experts_per_tok": 3, "tie_word_embeddings": True, "rope_scaling": LLAMA3_ROPE,
    },
    "qwen3": {"qk_norm": "head"},
    "qwen3-moe": {"qk_norm": "head", "num_local_experts": 6, "moe_intermediate_size": 24},
    "qwen3-moe-as-they-are": {
        "qk_norm": "head", "num_local_experts": 6, "moe_intermediate_size": 24, "num_experts_per_tok": 3,
        "norm_topk_prob": False, "moe_layers": (0, 2),
    },
    "olmoe": {
        "qk_norm": "projection", "num_local_experts": 7, "num_experts_per_tok": 3, "norm_topk_prob": False,
        "head_dim": 8,  # hidden_size / heads: OLMoE has no other
    },
}  # fmt: skip


def hf_model(config: Model) -> nn.Module:
    """The same architecture by transformers, randomly initialised with a spread that makes routing decisive."""
    shared = config.model_dump(include=set(SIZES) | {"tie_word_embeddings"}) | {
        "attention_dropout": 0.0, "pad_token_id": None, "attn_implementation": "eager",
    }  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": shared.pop("rope_theta")}
    if config.rope_scaling:
        rope |= config.rope_scaling.model_dump()
    shared["rope_parameters"] = rope
    routing = {
        "num_experts_per_tok": config.num_experts_per_tok, "output_router_logits": True, "router_aux_loss_coef": 0.02,
    }  # fmt: skip
    dense = [i for i in range(config.num_hidden_layers) if not config.is_moe(i)]
    match config.qk_norm, config.num_local_experts:
        case "none", 0:
            model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shared))
        case "none", experts:
            hf_config = transformers.MixtralConfig(**shared, **routing, num_local_experts=experts, sliding_window=None)
            model = transformers.MixtralForCausalLM(hf_config)
        case "head", 0:
            model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**shared, use_sliding_window=False))
        case "head", experts:
            hf_config = transformers.Qwen3MoeConfig(
                **shared, **routing, num_experts=experts, moe_intermediate_size=config.moe_intermediate_size,
                norm_topk_prob=config.norm_topk_prob, mlp_only_layers=dense, use_sliding_window=False,
            )  # fmt: skip
            model = transformers.Qwen3MoeForCausalLM(hf_config)
        case _, experts:
            hf_config = transformers.OlmoeConfig(**shared, **routing, num_experts=experts, norm_topk_prob=False)
            model = transformers.OlmoeForCausalLM(hf_config)
    if config.num_local_experts:
        model.set_experts_implementation("eager")
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, std=0.3 if "norm" not in name else 0.1, mean=0.0 if "norm" not in name else 1.0)
    return model


def pairs(ours: Transformer, theirs: nn.Module) -> list[tuple[str, nn.Parameter, nn.Parameter]]:
    """(name, our parameter, their parameter); the fused ones differ in shape only."""
    named = dict(theirs.named_parameters())
    rows = []
    for name, parameter in ours.named_parameters():
        hf = name.replace("embedding.", "model.embed_tokens.").replace("head.", "lm_head.")
        hf = "model.norm.weight" if name == "norm.weight" else hf
        hf = hf.replace("layers.", "model.layers.").replace("attention_norm", "input_layernorm")
        hf = hf.replace("ffn_norm", "post_attention_layernorm").replace("ffn.router.weight", "mlp.gate.weight")
        hf = hf.replace("ffn.experts.w_gate_up", "mlp.experts.gate_up_proj")
        hf = hf.replace("ffn.experts.w_down", "mlp.experts.down_proj").replace("ffn.down.", "mlp.down_proj.")
        hf = hf.replace("attention.q_norm", "self_attn.q_norm").replace("attention.k_norm", "self_attn.k_norm")
        for letter in "qkvo":
            hf = hf.replace(f"attention.{letter}.", f"self_attn.{letter}_proj.")
        if hf.endswith("ffn.w_gate_up"):
            stem = hf.removesuffix("ffn.w_gate_up")
            rows += [
                (f"{name}[{i}]", parameter, named[f"{stem}mlp.{p}_proj.weight"]) for i, p in ((0, "gate"), (1, "up"))
            ]
        else:
            rows.append((name, parameter, named[hf]))
    return rows


def part(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor[int(name[-2])] if name.endswith("]") else tensor


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours.reshape(-1) - theirs.reshape(-1)).norm() / theirs.norm().clamp(min=1e-12))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_equals_transformers(case: str, recompute: str):
    config = Model(**SIZES | CASES[case], router_aux_loss="hf_mixtral")
    theirs = hf_model(config)
    ours = Transformer(config, Mesh(), recompute)
    for name, mine, other in pairs(ours, theirs):
        part(name, mine.data).copy_(other.data.view_as(part(name, mine.data)))
    tokens = torch.randint(config.vocab_size, (3, 33), generator=torch.Generator().manual_seed(2))
    inputs, labels = tokens[:, :-1], tokens[:, 1:].clone()
    labels[0, 5:9] = -100
    positions = torch.arange(32).expand(3, 32)

    reference = theirs(inputs)
    loss = nn.functional.cross_entropy(reference.logits.flatten(0, 1), labels.flatten())
    loss_T, *_, stats = ours(inputs, positions, labels)
    mine = loss_T.sum() / (labels != -100).sum()
    assert relative(ours.logits(inputs, positions), reference.logits) < 1e-5
    if config.num_local_experts:
        aux = transformers.models.mixtral.modeling_mixtral.load_balancing_loss_func(
            reference.router_logits, config.num_local_experts, config.num_experts_per_tok
        )
        value = balance_loss("hf_mixtral", stats)
        assert relative(value, aux) < 1e-5
        loss, mine = loss + 0.3 * aux, mine + 0.3 * value
    assert relative(mine, loss) < 1e-5
    loss.backward()
    mine.backward()
    for name, parameter, other in pairs(ours, theirs):
        assert relative(part(name, parameter.grad), other.grad) < 1e-5, name
