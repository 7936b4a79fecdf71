"""First rows of routers: their distributions, centroids, prompts and the warning about rows that are alike."""

import math
import warnings

import pytest
import torch

from moe_engine.errors import ConfigError, DataError
from moe_engine.upcycle.features import hidden_inputs
from moe_engine.upcycle.prompts import ExpertPrompts, prompt_rows
from moe_engine.upcycle.routers import DRAWN, clusters, drawn, random_features, warn_if_alike
from tests.upcycle.small import dense_model

E, D = 16, 2048
MOMENTS = {  # mean, deviation, smallest, largest
    "zeros": (0, 0, 0, 0),
    "normal": (0, 0.02, None, None),
    "xavier": (0, math.sqrt(2 / (E + D)), -math.sqrt(6 / (E + D)), math.sqrt(6 / (E + D))),
    "kaiming": (0, math.sqrt(1 / 3 / D), -math.sqrt(1 / D), math.sqrt(1 / D)),
    "random": (0, 1, None, None),
    "uniform_random": (0, math.sqrt(1 / 3 / D), -math.sqrt(1 / D), math.sqrt(1 / D)),
    "uniform": (0.5, 0.2887, 0, 1),
    "uniform_centred": (0, 0.2887, -0.51, 0.51),
    "normal_002": (0, 0.02, None, None),
    "normal_02887": (0, 0.2887, None, None),
    "uniform_scaled": (0, 0.02, -0.036, 0.036),
}


@pytest.mark.parametrize("kind", MOMENTS)
def test_moments(kind: str) -> None:
    mean, deviation, smallest, largest = MOMENTS[kind]
    rows = drawn(kind, E, D, 3, 0)
    assert rows.shape == (E, D) and rows.dtype == torch.float32
    assert abs(float(rows.mean()) - mean) <= 4 * deviation / math.sqrt(E * D)
    assert abs(float(rows.std()) - deviation) <= 0.03 * deviation
    if smallest is not None:
        assert smallest <= float(rows.min()) <= float(rows.max()) <= largest
        assert float(rows.max() - rows.min()) >= 0.99 * (largest - smallest) * (0.97 if kind != "zeros" else 1)
    assert torch.equal(rows, drawn(kind, E, D, 3, 0))
    assert kind == "zeros" or not torch.equal(rows, drawn(kind, E, D, 4, 0))


def test_kinds() -> None:
    assert {*DRAWN, "normal"} == set(MOMENTS)
    assert float(drawn("normal", E, D, 0, 0, std=1e-4).std()) == pytest.approx(1e-4, rel=0.03)
    assert abs(float(drawn("uniform_centred", 3, 5, 0, 0).mean())) < 1e-7
    assert float(drawn("uniform_scaled", 3, 5, 0, 0).std()) == pytest.approx(0.02)
    with pytest.raises(ConfigError, match="router_init 'xavjer'"):
        drawn("xavjer", 3, 5, 0, 0)


def test_clusters_are_centroids_of_balanced_groups() -> None:
    draw = torch.Generator().manual_seed(0)
    centre = torch.randn(4, 12, generator=draw) * 5
    label = torch.arange(102) % 4
    x_TD = centre[label] + 0.05 * torch.randn(102, 12, generator=draw)
    rows = clusters(x_TD, 4, 0, seed=0)
    order = torch.cdist(centre, rows).argmin(dim=1)
    assert sorted(order.tolist()) == [0, 1, 2, 3]
    for e in range(4):
        assert torch.allclose(rows[order[e]], x_TD[label == e].mean(dim=0), atol=1e-4)
    skewed = torch.cat([torch.randn(90, 12, generator=draw), torch.randn(10, 12, generator=draw) + 50])
    strict, loose = (clusters(skewed, 2, 0, 0, jitter) for jitter in (0.0, 1.0))
    assert float(strict.max()) < 20 < float(loose.max())  # 40 of the near points are forced into the far cluster
    with pytest.raises(DataError, match="3 tokens for 4 router rows"):
        clusters(x_TD[:3], 4, 0, 0)


def test_random_features_are_different_tokens() -> None:
    x_TD = torch.randn(9, 5).bfloat16()
    rows = random_features(x_TD, 9, 0, 0)
    assert rows.dtype == torch.float32 and sorted(map(tuple, rows.tolist())) == sorted(map(tuple, x_TD.tolist()))
    with pytest.raises(DataError):
        random_features(x_TD, 10, 0, 0)


PROMPTS = [
    ExpertPrompts([[5, 6, 7], [8, 9]], [[1, 2]]),
    ExpertPrompts([[50, 51, 52, 53]]),
    ExpertPrompts([[3, 70, 71]], [[5, 6], [60]]),  # begins with BOS already
]


@pytest.mark.parametrize("kind", ["hidden", "hidden_avg", "cheap_embed"])
def test_prompts_equal_their_formula(kind: str) -> None:
    model, bos = dense_model(), 3

    def vector(prompts) -> torch.Tensor:
        found = []
        for ids in prompts:
            ids = torch.tensor(list(ids) if ids[0] == bos else [bos, *ids])
            if kind == "cheap_embed":
                found.append(model.embedding.weight[ids].sum(dim=0).expand(3, -1) * len(prompts))
            else:
                x_NSD = hidden_inputs(model, ids)
                found.append(x_NSD[:, -1] if kind == "hidden" else x_NSD.mean(dim=1))
        return sum(found) / len(prompts)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows_NED = prompt_rows(kind, model, PROMPTS, bos)
    assert rows_NED.shape == (3, 3, 48)
    for e, (positive, negative) in enumerate(PROMPTS):
        row_ND = vector(positive) - (vector(negative) if negative else 0)
        assert torch.allclose(rows_NED[:, e], row_ND / row_ND.norm(dim=1, keepdim=True), atol=1e-5)


def test_prompts_that_cannot_be() -> None:
    model = dense_model()
    with pytest.raises(ConfigError, match="expert 1 has no positive prompt"):
        prompt_rows("hidden", model, [PROMPTS[0], ExpertPrompts([])], 3)
    with pytest.raises(ConfigError, match="from prompts are hidden, hidden_avg, cheap_embed"):
        prompt_rows("normal", model, PROMPTS, 3)


def test_rows_that_are_alike_are_warned_of() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert warn_if_alike(torch.eye(3, 7), 0) == pytest.approx(1)
        warn_if_alike(torch.diag(torch.tensor([4.9, 1.0])), 0)
    with pytest.warns(UserWarning, match=r"layer 2: the router's rows are alike \(condition number 5.1"):
        warn_if_alike(torch.diag(torch.tensor([5.1, 1.0])), 2)
    with pytest.warns(UserWarning, match="condition number"):
        warn_if_alike(torch.ones(2, 7), 0)
    with pytest.warns(UserWarning, match="layer 0"):
        prompt_rows("cheap_embed", dense_model(), [ExpertPrompts([[5, 6]]), ExpertPrompts([[5, 6]])], 3)
