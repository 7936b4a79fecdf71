"""The decoder as a whole: which layers hold experts, padding, tied weights, FLOPs, and tp against one process."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moe_engine.config import Model
from moe_engine.model.attention import inverse_frequencies
from moe_engine.model.flops import forward_flops_per_token, step_flops_per_token
from moe_engine.model.mlp import DenseMLP
from moe_engine.model.moe import MoE
from moe_engine.model.router_losses import z_loss
from moe_engine.model.transformer import Transformer
from moe_engine.parallel.local_ranks import run_on_ranks
from moe_engine.parallel.mesh import Mesh, build_mesh
from moe_engine.parallel.weight import initialise, note_of

SIZES = dict(
    vocab_size=48, hidden_size=32, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, moe_intermediate_size=24, num_local_experts=4, initializer_range=0.2,
)  # fmt: skip


def model(mesh: Mesh | None = None, **changes: object) -> Transformer:
    transformer = Transformer(Model(**SIZES | changes), mesh or Mesh())
    initialise(transformer, 0)
    return transformer


def batch(sequences: int = 2, length: int = 12) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    tokens, labels = torch.randint(48, (2, sequences, length), generator=torch.Generator().manual_seed(0))
    return tokens, torch.arange(length).expand(sequences, length), labels


@pytest.mark.parametrize(("moe_layers", "kinds"), [("all", "MMM"), ((1,), "DMD"), ((), "DDD")])
def test_layers_hold_what_the_config_says(moe_layers: object, kinds: str):
    transformer = model(moe_layers=moe_layers)
    assert [type(block.ffn) for block in transformer.layers] == [MoE if kind == "M" else DenseMLP for kind in kinds]
    output = transformer(*batch())
    assert len(output.routings) == kinds.count("M") and not output.attention_routings
    assert [stats.prob_NBE.shape for stats in output.stats] == [(kinds.count("M"), 2, 4)] * ("M" in kinds)


def test_rotary_frequencies_are_kept_in_fp32_and_are_no_weights():
    transformer = model().bfloat16()
    transformer(*batch())
    kept = transformer.inverse_frequency
    assert kept.dtype == torch.float32 and torch.equal(kept, inverse_frequencies(transformer.config))
    transformer(*batch())
    assert transformer.inverse_frequency is kept and not list(transformer.buffers())
    assert transformer.state_dict().keys() == dict(transformer.named_parameters()).keys()


def test_loss_is_that_of_the_logits():
    transformer = model()
    tokens, positions, labels = batch()
    labels[0, 3:7] = -100
    loss_T = transformer(tokens, positions, labels).loss_T
    logits = transformer.logits(tokens, positions)
    wanted = torch.nn.functional.cross_entropy(logits, labels.flatten(), reduction="none")
    torch.testing.assert_close(loss_T, wanted)


def test_padding_is_not_counted_by_routers():
    """What a padding token holds changes no statistic, and statistics equal those of the tokens that count."""
    transformer = model()
    tokens, positions, labels = batch()
    counted = torch.ones(2, 12, dtype=torch.bool)
    counted[0, 8:] = counted[1, 3:] = False
    (stats,) = transformer(tokens, positions, labels, counted).stats
    (other,) = transformer(tokens.where(counted, tokens.roll(1, 1)), positions, labels, counted).stats
    torch.testing.assert_close(stats, other)
    for b, length in enumerate((8, 3)):
        row = slice(b, b + 1), slice(length)
        (alone,) = transformer(tokens[row], positions[row], labels[row]).stats
        for mixed, single in zip(stats[1:], alone[1:], strict=True):
            torch.testing.assert_close(mixed[:, b], single[:, 0], atol=1e-4, rtol=1e-5)
    assert stats.tokens_NB.tolist() == [[8, 3]] * 3 and torch.isfinite(z_loss([stats]))


def test_tied_embedding_sums_both_gradients():
    tied, free = model(tie_word_embeddings=True), model()
    free.head.weight.data.copy_(tied.embedding.weight.data)
    for transformer in (tied, free):
        transformer(*batch())[0].sum().backward()
    assert tied.embedding.weight.grad is not None and free.embedding.weight.grad is not None
    torch.testing.assert_close(
        tied.embedding.weight.grad, free.embedding.weight.grad + free.head.weight.grad, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_local_experts": 0},
        {"moe_layers": (0, 2)},
        {"num_experts_per_tok": 3},
        {"shared_intermediate_size": 12},
    ],
)
def test_flops_are_those_that_torch_counts(changes: dict[str, object]):
    """torch counts products as they run: attention over the whole square, router statistics, and no custom op."""
    transformer = model(**changes)
    config, (tokens, positions, labels) = transformer.config, batch()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        transformer(tokens, positions, labels)
    length, heads = 12, config.num_attention_heads * config.head_dim
    experts = config.num_experts_per_tok * 6 * config.hidden_size * config.moe_intermediate_size
    custom = config.num_moe_layers * (experts + 2 * config.hidden_size * config.num_local_experts)
    attended = config.num_hidden_layers * 4 * heads
    statistics = config.num_moe_layers * 2 * len(tokens) * (3 * config.num_local_experts + 3)
    ours = forward_flops_per_token(config, length) - custom + statistics + attended * (length - (length + 1) / 2)
    by_op = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    sdpa = sum(n for op, n in by_op.items() if "scaled_dot_product" in op)
    seen = counter.get_total_flops() + (attended * length * tokens.numel() if not sdpa else 0)
    assert ours * tokens.numel() == pytest.approx(seen)
    assert step_flops_per_token(config, length) == 3 * forward_flops_per_token(config, length)


def test_flops_of_attention_experts():
    """All of them are dense attention with a kv head for each, and a router; half of them, half, and shorter rows."""
    sizes = Model(**SIZES | {"num_key_value_heads": 4})
    dense, length = forward_flops_per_token(sizes, 64), 64
    routed = [
        forward_flops_per_token(
            sizes.model_copy(update={"num_attention_experts": 4, "num_attention_experts_per_tok": k}), length
        )
        for k in (4, 2)
    ]
    router, attended = 2 * 32 * 4, 2 * 4 * 8
    assert routed[0] == dense + 3 * router
    projections = 2 * 32 * 4 * 32
    assert routed[0] - routed[1] == 3 * (projections / 2 + attended * (65 - 33 / 2))


@pytest.mark.parametrize(("tied", "recompute"), [(False, "none"), (True, "full"), (False, "selective")])
def test_tensor_parallel_equals_one_process(tied: bool, recompute: str):
    """Losses and every gradient on tp 2, dense and MoE layers, replicated weights included."""

    def on_rank(rank: int) -> None:
        mesh = build_mesh(1, 1, 2)
        changes: dict[str, object] = {"moe_layers": (1,), "tie_word_embeddings": tied}
        whole, part = model(**changes), model(mesh, **changes)
        for layer in part.layers:
            layer.recompute = recompute
        truth, ours = whole(*batch()), part(*batch())
        for output in (truth, ours):
            (stats,) = output.stats
            (output.loss_T.sum() + (stats.prob_NBE.square().sum() + stats.z_NB.square().sum()) * 1e-3).backward()
        torch.testing.assert_close(ours.loss_T, truth.loss_T, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours.stats, truth.stats, atol=1e-4, rtol=1e-5)
        for (name, p), q in zip(part.named_parameters(), whole.parameters(), strict=True):
            wanted = q.grad[note_of(p).local_slices()]
            assert float((p.grad - wanted).norm() / wanted.norm()) < 1e-5, name

    run_on_ranks(on_rank, 2)
