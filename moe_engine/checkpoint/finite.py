"""NaN and infinities among weights: counted while a tensor is in memory anyway, and refused unless somebody wants them.

A model with a single one computes NaN from there on, and a loss that is NaN says nothing of where it came from.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from moe_engine.config.messages import BULLET
from moe_engine.errors import DataError

SHOWN = 5


def nonfinite(tensor: Tensor) -> str:
    """How many elements are no finite numbers, as in "3 NaN and 2 infinite of 1024"; empty when all are finite.

    One pass without temporary memory as long as all are: the extremes of what holds a NaN are NaN.
    """
    if not tensor.numel() or not tensor.is_floating_point() or bool(torch.stack(tensor.aminmax()).isfinite().all()):
        return ""
    counts = {"NaN": int(tensor.isnan().sum()), "infinite": int(tensor.isinf().sum())}
    return f"{' and '.join(f'{count} {what}' for what, count in counts.items() if count)} of {tensor.numel()}"


def refusal(where: object, found: Mapping[str, str], remedy: str) -> DataError:
    """The error that says which tensors hold such numbers, and how many."""
    lines = [f"{name}: {said}" for name, said in list(found.items())[:SHOWN]]
    more = [f"and {len(found) - SHOWN} tensors more"] if len(found) > SHOWN else []
    many = "1 tensor holds" if len(found) == 1 else f"{len(found)} tensors hold"
    return DataError(f"{where}: {many} NaN or infinite numbers; {remedy}:{BULLET}{BULLET.join([*lines, *more])}")
