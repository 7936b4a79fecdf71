"""Starting values: a function of seed, name and place in the whole weight, whatever the layout that draws them."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from moe_engine.config import Model
from moe_engine.model.transformer import Transformer
from moe_engine.parallel import weight as weight_file
from moe_engine.parallel.mesh import Axis, Mesh
from moe_engine.parallel.weight import WeightNote, draw_normal_, initialise, key_of, note_of, weight

CONFIG = Model(
    vocab_size=80, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=4, moe_intermediate_size=24, moe_layers=(1,), num_local_experts=4, initializer_range=0.05,
)  # fmt: skip


def started(mesh: Mesh, seed: int = 0) -> Transformer:
    model = Transformer(CONFIG, mesh)
    initialise(model, seed)
    return model


def cell(ep: int, tp: int, e: int, t: int) -> Mesh:
    """The mesh as rank (e, t) sees it; starting values need no process group."""
    return Mesh(ep=Axis("ep", ep, e), tp=Axis("tp", tp, t))


@pytest.mark.parametrize(("ep", "tp"), [(1, 2), (1, 4), (2, 1), (4, 1), (2, 2), (4, 2)])
def test_every_layout_starts_from_the_same_whole_weights(ep: int, tp: int):
    truth = dict(started(Mesh()).named_parameters())
    assembled = {name: torch.full_like(p, math.nan) for name, p in truth.items()}
    for e, t in itertools.product(range(ep), range(tp)):
        for name, p in started(cell(ep, tp, e, t)).named_parameters():
            note = note_of(p)
            assert note.shape == truth[name].shape
            assert p.numel() * (ep if note.expert else 1) * (tp if note.tensor_parallel else 1) == truth[name].numel()
            assembled[name].data[note.local_slices()] = p.data
    for name, p in truth.items():
        assert torch.equal(assembled[name], p), name


def test_depends_on_seed_and_name_alone():
    first, again, other = started(Mesh()), started(Mesh()), started(Mesh(), seed=1)
    torch.manual_seed(123)  # torch's generator plays no part
    for (name, p), q, r in zip(first.named_parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name
        assert torch.equal(p, r) == (note_of(p).std is None), name
    assert len({key_of(seed, name) for seed in range(20) for name in ("a", "b", "layers.1.x", "layers.11.x")}) == 80


def test_distribution_is_the_normal_of_the_note():
    x = torch.empty(400_000)
    draw_normal_(x, WeightNote((400_000,)), key_of(0, "x"))
    n = len(x)
    assert abs(x.mean()) < 5 / n**0.5
    assert abs(x.var() - 1) < 5 * (2 / n) ** 0.5
    assert abs((x**3).mean()) < 5 * (15 / n) ** 0.5
    assert abs((x**4).mean() - 3) < 5 * (96 / n) ** 0.5
    ranks = torch.arange(1, n + 1) / n  # Kolmogorov-Smirnov against the normal's distribution function
    distance = (torch.special.ndtr(x.sort().values.double()) - ranks).abs().max()
    assert distance < 2.2 / n**0.5
    for name, p in started(Mesh()).named_parameters():
        if note_of(p).std is None:
            assert torch.equal(p, torch.ones_like(p)) and "norm" in name
        else:
            assert abs(p.std() / 0.05 - 1) < 5 / (2 * p.numel()) ** 0.5, name


def correlation(a: Tensor, b: Tensor) -> float:
    return abs(float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])) * a.numel() ** 0.5


def test_neighbours_are_not_correlated():
    """The streams are windows of one hash: parameters, rows, experts and seeds must look independent. In sigmas."""
    parts = {}
    for name in ("layers.0.q", "layers.1.q", "layers.2.q", "layers.0.k"):
        parts[name] = torch.empty(4, 64, 128)
        draw_normal_(parts[name], WeightNote((4, 64, 128)), key_of(0, name))
    for a, b in itertools.combinations(parts.values(), 2):
        assert correlation(a, b) < 5
    x = parts["layers.0.q"]
    assert max(correlation(x[i], x[j]) for i, j in itertools.combinations(range(4), 2)) < 5  # experts
    for lag in (1, 2, 64, 128, 4096):
        flat = x.flatten()
        assert correlation(flat[:-lag], flat[lag:]) < 5, lag
    reseeded = torch.empty_like(x)
    draw_normal_(reseeded, WeightNote((4, 64, 128)), key_of(1, "layers.0.q"))
    assert correlation(x, reseeded) < 5


@pytest.mark.parametrize("chunk", [1, 7, 96, 10**9])
def test_draw_does_not_depend_on_the_chunk(chunk: int, monkeypatch: pytest.MonkeyPatch):
    note = WeightNote((5, 3, 8), {0: Axis("ep", 5, 2), 2: Axis("tp", 2, 1)})
    whole, part, chunked = torch.empty(5, 3, 8), torch.empty(1, 3, 4), torch.empty(5, 3, 8)
    draw_normal_(whole, WeightNote(note.shape), 77)
    monkeypatch.setattr(weight_file, "CHUNK", chunk)
    draw_normal_(chunked, WeightNote(note.shape), 77)
    draw_normal_(part, note, 77)
    assert torch.equal(chunked, whole)
    assert torch.equal(part, whole[2:3, :, 4:])


def test_tied_weight_is_one_weight_under_its_first_name():
    tied = Transformer(CONFIG.model_copy(update={"tie_word_embeddings": True}), Mesh())
    initialise(tied, 0)
    assert tied.head.weight is tied.embedding.weight
    assert "head.weight" not in dict(tied.named_parameters())
    assert torch.equal(tied.embedding.weight, started(Mesh()).embedding.weight)


def test_note_says_who_owns_what():
    ep, tp = Axis("ep", 2, 1), Axis("tp", 2, 1)
    expert = weight((4, 2, 6, 8), cut={0: ep, 2: tp}, std=0.1)
    assert expert.shape == (2, 2, 3, 8) and note_of(expert).expert and note_of(expert).tensor_parallel
    assert note_of(expert).local_slices() == (slice(2, 4), slice(0, 2), slice(3, 6), slice(0, 8))
    dense = weight((4, 8), cut={1: tp})
    assert not note_of(dense).expert and note_of(dense).tensor_parallel
    assert not note_of(weight((4,))).tensor_parallel
