"""Importance of neurons against finite differences and a loop over tokens; groups of sequences and of gates."""

import pytest
import torch
from torch import Tensor

from moe_engine.data.loader import Batch, plain_batch
from moe_engine.errors import DataError
from moe_engine.model.attention import inverse_frequencies, places
from moe_engine.model.transformer import Transformer
from moe_engine.upcycle.features import group_sequences, hidden_inputs, mlp_inputs, sequence_features
from moe_engine.upcycle.importance import importance_of_clusters, neuron_importance
from tests.upcycle.small import DENSE, dense_model, relative

GROUPS, LENGTH = 3, 16


def batches() -> list[Batch]:
    """Two batches of unequal size; sequences with few labels; groups 0, 1, 2."""
    draw = torch.Generator().manual_seed(7)
    made = []
    for group_B in (torch.tensor([0, 2, 1]), torch.tensor([1, 1])):
        ids = torch.randint(DENSE.vocab_size, (len(group_B), LENGTH + 1), generator=draw)
        labels = ids[:, 1:].masked_fill(torch.rand(len(group_B), LENGTH, generator=draw) < 0.4, -100)
        positions = torch.arange(LENGTH).expand(len(group_B), LENGTH)
        made.append(plain_batch(ids[:, :-1].contiguous(), labels, positions)._replace(domain_B=group_B))
    return made


def h_and_grad(model: Transformer, batch: Batch, layer: int) -> tuple[Tensor, Tensor]:
    """h and dL/dh of one layer by replacing its feed-forward with plain torch on a leaf."""
    kept = {}

    def plain(module, args, output):
        gate, up = module.w_gate_up
        h = (torch.nn.functional.silu(args[0] @ gate.T) * (args[0] @ up.T)).detach().requires_grad_()
        kept["h"] = h
        return h @ module.down.weight.T

    handle = model.layers[layer].ffn.register_forward_hook(plain)
    loss_T = model(batch.tokens_BS, batch.positions_BS, batch.labels_BS).loss_T
    handle.remove()
    loss_T.sum().backward()
    return kept["h"].detach(), kept["h"].grad


def inputs(model: Transformer, batch: Batch, counted_BS: Tensor | None = None) -> list[Tensor]:
    """x[T, D] of each layer."""
    seen: list[Tensor] = []

    def see(layer: int, x_TD: Tensor) -> None:
        assert layer == len(seen)
        seen.append(x_TD)

    mlp_inputs(model, batch, see, counted_BS)
    return seen


@pytest.mark.parametrize("variant", ["feature_change", "total", "feature_grad"])
@pytest.mark.parametrize("by_gates", [False, True])
def test_equals_a_loop_over_tokens(variant: str, by_gates: bool) -> None:
    model = dense_model()
    gates = torch.randn(3, GROUPS, DENSE.hidden_size, generator=torch.Generator().manual_seed(1)) if by_gates else None
    score_NEF = neuron_importance(model, batches(), GROUPS, gates, variant)
    assert score_NEF.shape == (3, GROUPS, 40) and all(p.grad is None for p in model.parameters())
    for layer in range(3):
        sums, counts = torch.zeros(GROUPS, 40, dtype=torch.float64), torch.zeros(GROUPS, 1)
        for batch in batches():
            h_TF, grad_TF = h_and_grad(model, batch, layer)
            x_TD = inputs(model, batch)[layer]
            for t in range(len(h_TF)):
                if batch.labels_BS.flatten()[t] == -100:
                    continue
                group = (
                    int((gates[layer] @ x_TD[t]).argmax()) if gates is not None else int(batch.domain_B[t // LENGTH])
                )
                value = (grad_TF[t] if variant == "feature_grad" else h_TF[t] * grad_TF[t]).double()
                sums[group] += value if variant == "total" else value.abs()
                counts[group] += 1
        assert relative(score_NEF[layer], sums.abs() / counts) < 1e-5


def test_the_product_is_the_change_of_the_loss_when_a_neuron_is_scaled() -> None:
    """d loss / d alpha at alpha = 1 of h_i -> alpha h_i is the sum of h_i dL/dh_i, by central differences in fp64."""
    model = dense_model().double()
    (batch,) = [b._replace(domain_B=torch.zeros(3, dtype=torch.int64)) for b in batches()[:1]]
    total_NEF = neuron_importance(model, [batch], 1, variant="total")
    labelled = int((batch.labels_BS != -100).sum())
    down = model.layers[2].ffn.down.weight  # in the last layer a token without a label has no gradient
    for neuron in (0, 17, 39):
        loss = []
        for alpha in (1.02, 0.98):
            column = down[:, neuron].detach().clone()
            down.data[:, neuron] = column * alpha
            loss.append(float(model(batch.tokens_BS, batch.positions_BS, batch.labels_BS)[0].sum().detach()))
            down.data[:, neuron] = column
        slope = abs(loss[0] - loss[1]) / 0.04 / labelled
        assert float(total_NEF[2, 0, neuron]) == pytest.approx(slope, rel=1e-3)


def test_frozen_parameters_and_empty_groups() -> None:
    model = dense_model()
    score_NEF = neuron_importance(model, batches(), GROUPS)
    model.requires_grad_(False)
    assert torch.equal(neuron_importance(model, batches(), GROUPS), score_NEF)
    with pytest.raises(DataError, match="group 3 has no token in layer 0"):
        neuron_importance(model, batches(), 4)


def test_features_are_the_layers_inputs_without_padding() -> None:
    model, batch = dense_model(), batches()[0]
    counted_BS = torch.arange(LENGTH) < torch.tensor([[16], [3], [9]])
    whole, few = inputs(model, batch), inputs(model, batch, counted_BS)
    assert [x_TD.shape for x_TD in whole] == [(3 * LENGTH, 48)] * 3 and len(few) == 3
    assert torch.equal(few[1], whole[1][counted_BS.flatten()])
    x_NSD = hidden_inputs(model, batch.tokens_BS[1])
    assert torch.equal(x_NSD[0], model.embedding.weight[batch.tokens_BS[1]])
    at = places(batch.positions_BS[1:2], inverse_frequencies(DENSE), torch.float32)
    block = model.layers[1]
    attended = x_NSD[1] + block.attention(block.attention_norm(x_NSD[1]), at)
    assert torch.allclose(block.ffn_norm(attended), whole[1].view(3, LENGTH, 48)[1], atol=1e-5)


def test_sequences_are_grouped_by_their_mean_feature() -> None:
    model = dense_model()
    draw = torch.Generator().manual_seed(3)
    ids = torch.cat([torch.randint(low, low + 4, (n, LENGTH), generator=draw) for low, n in ((0, 6), (80, 5))])
    batch = plain_batch(ids, ids, torch.arange(LENGTH).expand(11, LENGTH))
    counted_BS = torch.ones(11, LENGTH, dtype=torch.bool)
    counted_BS[3, 5:] = False
    h_TD = model.hidden(batch.tokens_BS, batch.positions_BS)[0].detach()
    feature_BD = sequence_features(h_TD, batch.tokens_BS.shape, counted_BS)
    h_BSD = h_TD.view(11, LENGTH, 48)
    assert torch.allclose(feature_BD[3], h_BSD[3, :5].mean(dim=0), atol=1e-6)
    group_B = group_sequences(feature_BD, 2, seed=0)
    assert len(group_B[:6].unique()) == len(group_B[6:].unique()) == 1 and group_B[0] != group_B[10]


@pytest.mark.parametrize("variant", ["feature_change", "total", "feature_grad"])
def test_case_21_clusters_and_their_importances_come_of_one_pass(variant: str) -> None:
    """The same numbers as of a pass for the features, a grouping, and a pass for the gradients."""
    model, given = dense_model(), batches()
    hidden = [model.hidden(batch.tokens_BS, batch.positions_BS)[0].detach() for batch in given]
    features = [sequence_features(h_TD, batch.tokens_BS.shape) for h_TD, batch in zip(hidden, given, strict=True)]
    groups = group_sequences(torch.cat(features), 2, seed=0).split([len(batch.tokens_BS) for batch in given])
    grouped = [batch._replace(domain_B=group_B) for batch, group_B in zip(given, groups, strict=True)]
    wanted = neuron_importance(model, grouped, 2, variant=variant)  # pyright: ignore[reportArgumentType]
    passes: list[int] = []
    model.register_forward_hook(lambda *_: passes.append(1))
    found = importance_of_clusters(model, given, 2, 0, variant)  # pyright: ignore[reportArgumentType]
    assert len(passes) == len(given)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)
