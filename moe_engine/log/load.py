"""The load of experts: what is derived from shares of the assignments, and when it is warned about."""

import math
from collections.abc import Sequence
from typing import Any

COLLAPSE, IMBALANCE = 0.4, 2.0  # of the fair share 1/E: 5 % and 25 % of the assignments at E = 8


def load_entropy(share_E: Sequence[float]) -> float:
    """Entropy -sum p ln p of one layer's load shares, in nats; ln E when the load is uniform (S1.30)."""
    return -sum(p * math.log(p) for p in share_E if p > 0)


def load_max_over_mean(share_E: Sequence[float]) -> float:
    """Load of the busiest expert over the mean load: 1 when uniform, E when one expert gets everything."""
    return max(share_E) * len(share_E)


def load_warnings(shares: Sequence[Sequence[float]], layers: Sequence[int] | None = None) -> list[str]:
    """One text for each expert whose share of the assignments is out of bounds (S1.31).

    `shares[i][e]` is the share of layer `layers[i]` (default i) that expert e received; a layer sums to 1. The bounds
    of S1.31, < 5 % (collapse) and > 25 % (imbalance), are for 8 experts; for E experts they are 0.4/E and 2/E, which is
    the same at 8. With top-k no expert can receive more than 1/k, so imbalance cannot be reported when E <= 2k.
    """
    found = []
    for layer, share_E in zip(layers or range(len(shares)), shares):
        count = len(share_E)
        if abs(sum(share_E) - 1) > 1e-3:  # no token was routed
            continue
        for expert, share in enumerate(share_E):
            fair, name = share * count, f"layer {layer} expert {expert} receives {100 * share:.2f} % of the assignments"
            if fair < COLLAPSE - 1e-6:
                found.append(f"{name} (< {100 * COLLAPSE / count:.3g} %: collapse)")
            elif fair > IMBALANCE + 1e-6:
                found.append(f"{name} (> {100 * IMBALANCE / count:.3g} %: imbalance)")
    return found


def with_load_statistics(row: dict[str, Any]) -> dict[str, Any]:
    """`row` with per-layer lists `moe_layers`, `load_entropy`, `load_max_over_mean` added if it has `expert_load`."""
    shares = row.get("expert_load")
    if not shares:
        return row
    derived = {
        "moe_layers": list(range(len(shares))),
        "load_entropy": [load_entropy(share_E) for share_E in shares],
        "load_max_over_mean": [load_max_over_mean(share_E) for share_E in shares],
    }
    return {**derived, **row}
