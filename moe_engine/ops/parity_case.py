"""The form of the entries in each op's `cases.py`, read by the parity test."""

from collections.abc import Callable
from typing import NamedTuple

import torch


class Case(NamedTuple):
    """One input of one op. `inputs(dtype)` builds the arguments on CPU, the same at each call: tensors of `dtype` where
    the op takes any floating dtype, fp32 (fp64 for fp64) where its contract says fp32, and everything else as it is."""

    name: str
    op: Callable
    inputs: Callable[[torch.dtype], tuple]


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of what a contract calls fp32: fp64 if the rest is fp64, so that the reference can be checked in it."""
    return torch.promote_types(dtype, torch.float32)


def seeded(name: str) -> torch.Generator:
    """A generator whose numbers depend on the name alone."""
    return torch.Generator().manual_seed(int.from_bytes(name.encode()[-6:], "little"))
