"""k-means whose clusters have bounded sizes: low <= size <= high. Lloyd's rounds from k-means++ seeds.

A round assigns points to centroids at the least sum of squared distances within the bounds. That is a transport problem
with one price a cluster: a point goes where distance + price is least. Each price in turn is put where its cluster has
an allowed size, 0 if it can be, until all have; what then still lies outside is moved, the cheapest point first.
Prices that fit are a proof that no assignment is better (complementary slackness).
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray[Any, Any]
SWEEPS = 50  # over the prices, in one round


class Clusters(NamedTuple):
    """label_N int64; centroid_KD fp32, the mean of its points."""

    label_N: Tensor
    centroid_KD: Tensor


def kmeans(
    x_ND: Tensor, clusters: int, draw: torch.Generator, low: int = 0, high: int | None = None, rounds: int = 500
) -> Clusters:
    """The points x (in fp32) in `clusters` clusters of low to high (default: all) points. ValueError if none can be."""
    points, high = x_ND.shape[0], x_ND.shape[0] if high is None else high
    if not (clusters * low <= points <= clusters * high and clusters <= points):
        raise ValueError(f"found {points} points for {clusters} clusters of {low} to {high}: these do not fit")
    x_ND = x_ND.float()
    centroid_KD, label_N, price_K = _seeds(x_ND, clusters, draw), None, None
    for _ in range(rounds):
        before, (label_N, price_K) = label_N, assign(_distances(x_ND, centroid_KD), low, high, price_K)
        if before is not None and torch.equal(before, label_N):
            break
        count_K = label_N.bincount(minlength=clusters).unsqueeze(1)
        sum_KD = torch.zeros_like(centroid_KD).index_add_(0, label_N, x_ND)
        centroid_KD = torch.where(count_K > 0, sum_KD / count_K.clamp(min=1), centroid_KD)
    assert label_N is not None
    return Clusters(label_N, centroid_KD)


def assign(cost_KN: Tensor, low: int, high: int, price_K: Array | None = None) -> tuple[Tensor, Array]:
    """The cluster of each point, at a small total cost, every cluster holding low to high points; the prices.

    price_K: those to begin with, of a round before.
    """
    label_N, price_K = _assign(cost_KN.cpu().numpy(), low, high, price_K)
    return torch.from_numpy(label_N).to(cost_KN.device), price_K


def _assign(cost_KN: Array, low: int, high: int, price_K: Array | None) -> tuple[Array, Array]:
    """In numpy: prices need thousands of operations so small that handing them to threads takes most of the time."""
    price_K = np.zeros_like(cost_KN[:, 0]) if price_K is None else price_K.copy()
    for _ in range(SWEEPS):
        label_N = (cost_KN + price_K[:, None]).argmin(axis=0)
        if _fits(label_N, price_K, low, high):
            return label_N, price_K
        for cluster in range(len(cost_KN)):
            price_K[cluster] = _price(cost_KN, price_K, cluster, low, high)
    priced_KN = cost_KN + price_K[:, None]
    return _moved(priced_KN, priced_KN.argmin(axis=0), low, high), price_K


def _price(cost_KN: Array, price_K: Array, cluster: int, low: int, high: int) -> float:
    """The price, nearest to 0, at which a cluster holds low to high points while the other prices stay."""
    elsewhere_KN = cost_KN + price_K[:, None]
    elsewhere_KN[cluster] = np.inf
    gain_N = elsewhere_KN.min(axis=0) - cost_KN[cluster]  # a point comes while the price is below its gain
    points, free = len(gain_N), int((gain_N > 0).sum())
    size = min(max(free, low), high, points)
    if size == free:
        return 0.0
    around = [place for place in (points - size - 1, points - size) if 0 <= place < points]
    gain_N.partition(around)
    last = gain_N[points - size] if size else gain_N[-1]
    first_out = gain_N[points - size - 1] if size < points else last - 1
    return (last + first_out) / 2


def _moved(cost_KN: Array, label_N: Array, low: int, high: int) -> Array:
    """Points moved one by one, each time the cheapest, out of a cluster that is too large or into one too small."""
    points, free_K = np.arange(len(label_N)), np.zeros_like(cost_KN[:, 0])
    while not _fits(label_N, free_K, low, high):
        count_K = np.bincount(label_N, minlength=len(cost_KN))
        if count_K.max() > high:
            gives_K, takes_K = count_K == count_K.max(), count_K < high
        else:
            gives_K, takes_K = count_K > low, count_K == count_K.min()
        extra_KN = cost_KN - cost_KN[label_N, points]
        extra_KN[~gives_K[label_N] | ~takes_K[:, None]] = np.inf
        cluster, point = divmod(int(extra_KN.argmin()), len(label_N))
        label_N[point] = cluster
    return label_N


def _fits(label_N: Array, price_K: Array, low: int, high: int) -> bool:
    """Whether every size is allowed, and every price needed: above 0 for a full cluster only, below for a least one."""
    count_K = np.bincount(label_N, minlength=len(price_K))
    least_K, most_K = np.where(price_K > 0, high, low), np.where(price_K < 0, low, high)
    return bool(((least_K <= count_K) & (count_K <= most_K)).all())


def _distances(x_ND: Tensor, centroid_KD: Tensor) -> Tensor:
    """Squared distances[K, N], less the points' own squares, which no choice depends on."""
    return centroid_KD.square().sum(dim=1, keepdim=True) - 2 * centroid_KD @ x_ND.T


def _seeds(x_ND: Tensor, clusters: int, draw: torch.Generator) -> Tensor:
    """k-means++: each next seed is a point drawn with probability proportional to its squared distance to the last."""
    chosen = [int(torch.randint(len(x_ND), (), generator=draw))]
    nearest_N = torch.full((len(x_ND),), torch.inf)
    while len(chosen) < clusters:
        nearest_N = torch.minimum(nearest_N, (x_ND - x_ND[chosen[-1]]).square().sum(dim=1).cpu())
        nearest_N[chosen] = 0.0
        weight_N = (
            nearest_N if nearest_N.sum() > 0 else torch.ones_like(nearest_N).index_fill_(0, torch.tensor(chosen), 0)
        )
        chosen.append(int(torch.multinomial(weight_N, 1, generator=draw)))
    return x_ND[chosen].clone()
