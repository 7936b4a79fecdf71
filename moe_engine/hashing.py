"""splitmix64 (Steele et al. 2014): random bits as a function of a place, so that no order of drawing matters."""

from typing import Any

GAMMA = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed number


def mix64(x: Any) -> Any:
    """The finaliser, of an int64 array or tensor, whose products wrap around; a bijection."""
    x = (x ^ _shifted(x, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    x = (x ^ _shifted(x, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    return x ^ _shifted(x, 31)


def _shifted(x: Any, bits: int) -> Any:
    """To the right, without the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
