"""Balanced k-means: sizes, optimal assignment, degenerate points."""

from functools import lru_cache

import pytest
import torch
from torch import Tensor

from moe_engine.upcycle.kmeans import assign, kmeans


def least_cost(cost_NK: Tensor, low: int, high: int) -> float:
    """The best assignment of all, by dynamic programming over the points and the clusters' sizes."""
    points, clusters = cost_NK.shape

    @lru_cache(None)
    def best(point: int, sizes: tuple[int, ...]) -> float:
        if point == points:
            return 0.0 if min(sizes) >= low else float("inf")
        options = [tuple(s + (j == k) for j, s in enumerate(sizes)) for k in range(clusters) if sizes[k] < high]
        return min(
            float(cost_NK[point, next(k for k in range(clusters) if after[k] > sizes[k])]) + best(point + 1, after)
            for after in options
        )

    return best(0, (0,) * clusters)


@pytest.mark.parametrize(
    ("points", "clusters", "low", "high"),
    [(12, 2, 6, 6), (12, 3, 4, 4), (13, 3, 3, 5), (11, 4, 2, 11), (10, 5, 0, 2), (11, 4, 0, 4), (9, 4, 1, 3)],
)
def test_assignment_is_the_best_of_all(points: int, clusters: int, low: int, high: int) -> None:
    for seed in range(16):
        cost_NK = torch.rand(points, clusters, generator=torch.Generator().manual_seed(seed)).square()
        cost_NK += torch.linspace(0, 0.1 * (seed % 4), clusters)  # some clusters are in demand
        old = torch.rand(clusters, generator=torch.Generator().manual_seed(99)).sub(0.5).numpy()
        for price_K in (None, old):  # of a round before
            label_N, _ = assign(cost_NK.T.contiguous(), low, high, price_K)
            sizes = label_N.bincount(minlength=clusters)
            assert low <= int(sizes.min()) and int(sizes.max()) <= high
            ours = float(cost_NK.gather(1, label_N.unsqueeze(1)).sum())
            assert ours == pytest.approx(least_cost(cost_NK, low, high), rel=1e-5)


@pytest.mark.parametrize("points", [torch.zeros(12, 3), torch.eye(3).repeat(4, 1), torch.arange(12.0).view(12, 1)])
def test_sizes_hold_for_equal_points_too(points: Tensor) -> None:
    label_N = kmeans(points, 4, torch.Generator().manual_seed(0), 3, 3).label_N
    assert label_N.bincount(minlength=4).tolist() == [3, 3, 3, 3]


def test_unbounded_clusters_and_their_centroids() -> None:
    draw = torch.Generator().manual_seed(1)
    centres = torch.tensor([[0.0, 0], [10, 0], [0, 10]])
    group = torch.tensor([0] * 20 + [1] * 3 + [2] * 7)
    points = centres[group] + 0.1 * torch.randn(30, 2, generator=draw)
    label_N, centroid_KD = kmeans(points, 3, torch.Generator().manual_seed(2))
    assert sorted(label_N.bincount().tolist()) == [3, 7, 20]
    assert all(len(label_N[group == g].unique()) == 1 for g in range(3))
    for cluster in range(3):
        assert torch.allclose(centroid_KD[cluster], points[label_N == cluster].mean(dim=0), atol=1e-5)


def test_what_does_not_fit_is_refused() -> None:
    for low, high, points in ((3, 4, 20), (3, 9, 8), (0, 9, 2)):
        with pytest.raises(ValueError, match="do not fit"):
            kmeans(torch.rand(points, 2), 4 if points > 2 else 3, torch.Generator(), low, high)
