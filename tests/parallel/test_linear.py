"""Cut linear layers and the cut embedding against torch's own on whole weights, on real ranks."""

import pytest
import torch
import torch.nn.functional as F

from moe_engine.parallel.collectives import all_gather, reduce_scatter
from moe_engine.parallel.linear import ColumnLinear, RowLinear, VocabEmbedding
from moe_engine.parallel.local_ranks import run_on_ranks
from moe_engine.parallel.mesh import build_mesh
from moe_engine.parallel.weight import note_of

ROWS, WIDE, HIDDEN, VOCAB = 8, 12, 6, 20


def whole(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def block_on_rank(rank: int, tp_size: int) -> None:
    tp = build_mesh(1, 1, tp_size).tp
    column, row = ColumnLinear(HIDDEN, WIDE, tp, 1.0).double(), RowLinear(WIDE, HIDDEN, tp, 1.0).double()
    x, upstream = whole(ROWS, HIDDEN, seed=0), whole(ROWS, HIDDEN, seed=3)
    up, down = whole(WIDE, HIDDEN, seed=1), whole(HIDDEN, WIDE, seed=2)
    y = F.linear(F.gelu(F.linear(x, up)), down)
    y.backward(upstream.detach())

    for layer, truth in ((column, up), (row, down)):
        layer.weight.data.copy_(truth.data[note_of(layer.weight).local_slices()])
    mine = x.detach()[tp.cut(ROWS)].clone().requires_grad_()
    ours = reduce_scatter(row(F.gelu(column(all_gather(mine, tp)))), tp)
    torch.testing.assert_close(ours, y.detach()[tp.cut(ROWS)])
    ours.backward(upstream.detach()[tp.cut(ROWS)])
    assert x.grad is not None
    torch.testing.assert_close(mine.grad, x.grad[tp.cut(ROWS)])
    for layer, truth in ((column, up), (row, down)):
        assert truth.grad is not None
        torch.testing.assert_close(layer.weight.grad, truth.grad[note_of(layer.weight).local_slices()])


def embedding_on_rank(rank: int, tp_size: int) -> None:
    tp = build_mesh(1, 1, tp_size).tp
    table, upstream = whole(VOCAB, HIDDEN, seed=4), whole(ROWS, HIDDEN, seed=5).detach()
    tokens = torch.tensor([0, 19, 10, 9, 5, 5, 15, 14])  # the first and last id of every shard, and a repeat
    F.embedding(tokens, table).backward(upstream)
    embedding = VocabEmbedding(VOCAB, HIDDEN, tp, 1.0).double()
    mine = note_of(embedding.weight).local_slices()
    embedding.weight.data.copy_(table.data[mine])
    ours = reduce_scatter(embedding(tokens), tp)
    torch.testing.assert_close(ours, table.detach()[tokens][tp.cut(ROWS)])
    ours.backward(upstream[tp.cut(ROWS)])
    assert table.grad is not None
    torch.testing.assert_close(embedding.weight.grad, table.grad[mine])


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_column_then_row_is_the_whole_block(tp: int):
    run_on_ranks(block_on_rank, tp, tp)


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_cut_embedding_is_the_whole_embedding(tp: int):
    run_on_ranks(embedding_on_rank, tp, tp)
