"""Which elements of which weight lie where, whatever the layout.

    box     a part of the whole weight: (start, stop) along each dimension; experts count by their global number
    piece   a run of `length` elements from `start` in the flattened box: what one rank owns under ZeRO

A run is cut into boxes, each of which is contiguous in the run; two boxes overlap in a box. So any piece is copied to
any other without an index per element and without the whole weight.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

Box = tuple[tuple[int, int], ...]


class Piece(NamedTuple):
    """A run of elements of one weight: `length` of them from `start`, in the flattened `box` of the whole weight."""

    name: str
    box: Box
    start: int
    length: int

    def boxes(self) -> Iterator[tuple[Box, int]]:
        """Boxes that make up the run, in order, each with the place of its first element in the run."""
        place = 0
        for relative in _cut([stop - start for start, stop in self.box], self.start, self.length):
            box = tuple((low + a, low + b) for (low, _), (a, b) in zip(self.box, relative, strict=True))
            yield box, place
            place += volume(box)


def volume(box: Box) -> int:
    """Number of elements."""
    return math.prod(stop - start for start, stop in box)


def overlap(a: Box, b: Box) -> Box | None:
    """The elements that are in both, None if there are none."""
    both = tuple((max(p[0], q[0]), min(p[1], q[1])) for p, q in zip(a, b, strict=True))
    return both if all(start < stop for start, stop in both) else None


def within(run: Tensor, box: Box, place: int, part: Box) -> Tensor:
    """The elements of `part` in a flat run that holds `box` from `place` on; a view."""
    shaped = run[place : place + volume(box)].view([stop - start for start, stop in box])
    return shaped[tuple(slice(p - low, q - low) for (p, q), (low, _) in zip(part, box, strict=True))]


def _cut(sides: list[int], start: int, length: int) -> Iterator[Box]:
    """A run in a flattened array of `sides` as boxes: the end of a row, whole rows, the beginning of one."""
    if not sides:
        if length:
            yield ()
        return
    inner = math.prod(sides[1:])
    while length > 0:
        row, rest = divmod(start, inner)
        rows = 0 if rest else length // inner
        if rows:
            yield ((row, row + rows), *((0, side) for side in sides[1:]))
            done = rows * inner
        else:
            done = min(length, inner - rest)
            yield from (((row, row + 1), *box) for box in _cut(sides[1:], rest, done))
        start, length = start + done, length - done
