"""Runs, boxes and their overlaps, against an index of every element."""

import math
import random

import pytest
import torch

from moe_engine.checkpoint.pieces import Box, Piece, overlap, volume, within


def elements(piece: Piece, shape: list[int]) -> torch.Tensor:
    """The number, in the whole weight, of each element of the run."""
    whole = torch.arange(math.prod(shape)).view(shape)
    part = whole[tuple(slice(*side) for side in piece.box)].reshape(-1)
    return part[piece.start : piece.start + piece.length]


def random_piece(draw: random.Random, shape: list[int]) -> Piece:
    box: Box = tuple(
        (low, draw.randrange(low + 1, side + 1)) for side in shape if (low := draw.randrange(side)) is not None
    )
    size = volume(box)
    start = draw.randrange(size)
    return Piece("w", box, start, draw.randrange(1, size - start + 1))


@pytest.mark.parametrize("shape", [[7], [1], [5, 4], [3, 1, 5], [4, 2, 3, 5], [2, 1, 1, 7]], ids=str)
def test_any_run_is_copied_to_any_other(shape: list[int]):
    draw = random.Random(str(shape))
    for _ in range(200):
        source, target = random_piece(draw, shape), random_piece(draw, shape)
        stored, wanted = elements(source, shape), elements(target, shape)
        out = torch.full_like(wanted, -1)
        copied = 0
        for a, a_place in source.boxes():
            for b, b_place in target.boxes():
                if both := overlap(a, b):
                    within(out, b, b_place, both).copy_(within(stored, a, a_place, both))
                    copied += volume(both)
        there = torch.isin(wanted, stored)
        assert copied == there.sum(), (source, target)  # each common element once
        assert torch.equal(out, wanted.where(there, torch.tensor(-1))), (source, target)


def test_the_boxes_of_a_run_are_few():
    """At most two for each dimension but the last: the cost of a copy does not grow with the weight."""
    box: Box = ((8, 16), (0, 2), (0, 14336), (0, 4096))
    assert len(list(Piece("w", box, 12345, volume(box) - 54321).boxes())) <= 7
    assert list(Piece("w", box, 0, volume(box)).boxes()) == [(box, 0)]


def test_no_overlap():
    assert overlap(((0, 2), (0, 4)), ((2, 4), (0, 4))) is None
    assert overlap(((0, 3), (1, 4)), ((2, 4), (0, 2))) == ((2, 3), (1, 2))
