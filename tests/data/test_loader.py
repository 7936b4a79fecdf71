"""The order of samples: one sequence for every layout, each token once an epoch, exact after any interruption."""

import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from moe_engine.data.loader import Batch, Loader, OpenDomain, eval_batches, open_domains
from moe_engine.errors import ConfigError, DataError

EOS = 49_999
S = 16


def open_train(folder: Path, *names: str, weights: tuple[float, ...] = ()) -> list[OpenDomain]:
    triples = [(name, str(folder), weight) for name, weight in zip(names, weights or [1.0] * len(names))]
    return open_domains(triples, "train")


def load(domains: list[OpenDomain], *, batch: tuple[int, int, int] = (1, 1, 1), rank: int = 0, **more) -> Loader:  # type: ignore[no-untyped-def]
    size, accumulation, micro = batch
    layout = {"data_size": size, "accumulation": accumulation, "micro_batch": micro, "data_rank": rank}
    return Loader(domains, **{"seed": 3, "seq_length": S, **layout, **more})


def rows(batch: Batch) -> Iterator[tuple[list[int], list[int], list[int], int]]:
    yield from zip(
        batch.tokens_BS.tolist(), batch.labels_BS.tolist(), batch.positions_BS.tolist(), batch.domain_B.tolist()
    )


def global_rows(domains: list[OpenDomain], batch: tuple[int, int, int], steps: int, **more) -> list:  # type: ignore[no-untyped-def]
    """All rows of all ranks, in the order of samples: a step, its micro-batches, the ranks of each, its rows."""
    size, accumulation, _ = batch
    ranks = [iter(load(domains, batch=batch, rank=rank, **more)) for rank in range(size)]
    found = []
    for _ in range(steps):
        step = [next(rank) for rank in ranks]
        for a, r in itertools.product(range(accumulation), range(size)):
            found += list(rows(step[r][a]))
    return found


def test_labels_and_positions_of_packed_documents(make_dataset) -> None:  # type: ignore[no-untyped-def]
    domains = open_train(make_dataset("d", {"a": [[10], [20, 21, 22, 23, 24, 25]]}), "a")
    (masked,) = load(domains, seq_length=8).next_step()
    (plain,) = load(domains, seq_length=8, document_mask=False).next_step()
    tokens = masked.tokens_BS[0].tolist()
    if tokens[0] == 10:
        assert tokens == [10, EOS, 20, 21, 22, 23, 24, 25]
        labels, positions = [EOS, -100, 21, 22, 23, 24, 25, EOS], [0, 1, 0, 1, 2, 3, 4, 5]
        shifted = [EOS, 20, 21, 22, 23, 24, 25, EOS]
    else:
        assert tokens == [20, 21, 22, 23, 24, 25, EOS, 10]
        labels, positions = [21, 22, 23, 24, 25, EOS, -100, EOS], [0, 1, 2, 3, 4, 5, 6, 0]
        shifted = [21, 22, 23, 24, 25, EOS, 10, EOS]
    assert masked.labels_BS[0].tolist() == labels and masked.positions_BS[0].tolist() == positions
    assert plain.tokens_BS[0].tolist() == tokens
    assert plain.labels_BS[0].tolist() == shifted and plain.positions_BS[0].tolist() == list(range(8))
    assert all(str(tensor.dtype) == "torch.int64" for tensor in masked)


def test_windows_hold_documents_as_they_are(make_dataset, unique_documents) -> None:  # type: ignore[no-untyped-def]
    documents = unique_documents(2000)
    begins = {document[0] for document in documents}
    following = {a: b for document in documents for a, b in zip(document, [*document[1:], EOS])}
    domains = open_train(make_dataset("d", {"a": documents}), "a")
    for tokens, labels, positions, _ in global_rows(domains, (1, 1, 4), 60):
        assert positions[0] == 0
        for i, (token, label) in enumerate(zip(tokens, labels)):
            assert label == (-100 if token == EOS else following[token])
            if i:
                assert (positions[i] == 0) == (token in begins and tokens[i - 1] == EOS)
                assert positions[i] in (0, positions[i - 1] + 1)
                assert tokens[i - 1] == EOS or token == following[tokens[i - 1]]


def test_each_token_once_an_epoch_and_epochs_differ(make_dataset, unique_documents) -> None:  # type: ignore[no-untyped-def]
    documents = unique_documents(1500)
    domains = open_train(make_dataset("d", {"a": documents}), "a")
    per_epoch = (domains[0].dataset.tokens - 1) // S
    orders = []
    for epoch in range(3):
        found = global_rows(domains, (1, 1, 1), per_epoch * (epoch + 1))[-per_epoch:]
        inputs = [token for tokens, *_ in found for token in tokens if token != EOS]
        targets = [label for _, labels, *_ in found for label in labels if label not in (EOS, -100)]
        assert len(set(inputs)) == len(inputs) and len(set(targets)) == len(targets)
        assert len(inputs) >= 1500 - S
        assert sum(token == EOS for tokens, *_ in found for token in tokens) <= len(documents)
        orders.append(inputs)
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert sorted(orders[0])[:50] != orders[0][:50]


LAYOUTS = [(d, a, 8 // (d * a)) for d in (1, 2, 4, 8) for a in (1, 2, 4, 8) if 8 % (d * a) == 0]


@pytest.mark.parametrize("batch", LAYOUTS, ids=str)
def test_every_layout_reads_the_same_sequence(make_dataset, unique_documents, batch) -> None:  # type: ignore[no-untyped-def]
    texts = {"a": unique_documents(1000), "b": unique_documents(700, 1, 1000), "c": unique_documents(900, 2, 1700)}
    domains = open_train(make_dataset("d", texts), "a", "b", "c", weights=(0.5, 0.2, 0.3))
    expected = global_rows(domains, (1, 1, 8), 30)
    found = global_rows(domains, batch, 30)
    assert found == expected


@pytest.mark.parametrize("size", [2, 4, 8])
def test_no_two_ranks_read_the_same_sample(make_dataset, unique_documents, size: int) -> None:  # type: ignore[no-untyped-def]
    domains = open_train(make_dataset("d", {"a": unique_documents(4000)}), "a")
    steps = (domains[0].dataset.tokens - 1) // S // (2 * 2 * size)  # one epoch
    seen: set[int] = set()
    for rank in range(size):
        for batches in itertools.islice(load(domains, batch=(size, 2, 2), rank=rank), steps):
            for batch in batches:
                mine = [token for token in batch.tokens_BS.flatten().tolist() if token != EOS]
                assert not seen.intersection(mine)
                seen.update(mine)
    assert len(seen) > 3000


def test_order_inside_a_domain_ignores_the_other_domains(make_dataset, unique_documents) -> None:  # type: ignore[no-untyped-def]
    folder = make_dataset("d", {"a": unique_documents(800), "b": unique_documents(800, 1, 800)})
    alone = [row[0] for row in global_rows(open_train(folder, "a"), (1, 1, 1), 60)]
    mixed = global_rows(open_train(folder, "b", "a", weights=(3, 1)), (2, 1, 2), 60)
    assert [tokens for tokens, _, _, domain in mixed if domain == 1] == alone[: sum(row[3] == 1 for row in mixed)]
    other = [row[0] for row in global_rows(open_train(folder, "a"), (1, 1, 1), 60, seed=4)]
    assert other != alone


@pytest.mark.parametrize("point", range(20))
def test_resume_at_any_point_on_another_layout(make_dataset, unique_documents, point: int) -> None:  # type: ignore[no-untyped-def]
    texts = {"a": unique_documents(600), "b": unique_documents(500, 1, 600)}
    domains = open_train(make_dataset("d", texts), "a", "b", weights=(0.7, 0.3))
    expected = global_rows(domains, (1, 1, 8), 60)  # several epochs of both
    generator = random.Random(point)
    first, second = generator.choice(LAYOUTS), generator.choice(LAYOUTS)
    step = generator.randrange(0, 50)
    loader = load(domains, batch=first, rank=generator.randrange(first[0]))
    for _ in range(step):
        loader.next_step()
    state = json.loads(json.dumps(loader.state()))
    found = []
    ranks = [load(domains, batch=second, rank=rank) for rank in range(second[0])]
    for rank in ranks:
        rank.load_state(state)
        assert rank.step == step
    for _ in range(10):
        taken = [rank.next_step() for rank in ranks]
        found += [row for a in range(second[1]) for r in range(second[0]) for row in rows(taken[r][a])]
    assert found == expected[8 * step : 8 * (step + 10)]
    begun = load(domains, batch=(1, 1, 8), start_step=step)
    assert list(rows(begun.next_step()[0])) == expected[8 * step : 8 * step + 8]


def test_state_of_other_data_is_refused(make_dataset, unique_documents) -> None:  # type: ignore[no-untyped-def]
    folder = make_dataset("d", {"a": unique_documents(600), "b": unique_documents(600, 1)})
    state = load(open_train(folder, "a")).state()
    for change in ({"seed": 9}, {"seq_length": 8}):
        with pytest.raises(ConfigError, match=next(iter(change))):
            load(open_train(folder, "a"), **change).load_state(state)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="domains"):
        load(open_train(folder, "a", "b")).load_state(state)
    other = make_dataset("e", {"a": unique_documents(600, 2)})
    with pytest.raises(DataError, match="not the tokens"):
        load(open_train(other, "a")).load_state(state)


def test_too_little_text_is_a_data_error(make_dataset, unique_documents) -> None:  # type: ignore[no-untyped-def]
    folder = make_dataset("d", {"a": unique_documents(200), "b": [[1, 2]]})
    with pytest.raises(DataError, match=r"domain b: 3 tokens do not fill one window of 16 \+ 1"):
        load(open_train(folder, "b"))
    with pytest.raises(DataError, match=r"domain a: has 1\d windows .* takes 64 of them"):
        load(open_train(folder, "a"), batch=(8, 4, 2))
    with pytest.raises(ConfigError, match="domain weights"):
        load(open_train(folder, "a", weights=(-1,)))


def test_token_outside_the_vocabulary_is_a_data_error(make_dataset, unique_documents) -> None:  # type: ignore[no-untyped-def]
    folder = make_dataset("d", {"a": unique_documents(600)})
    with pytest.raises(DataError, match=r"token id 49999 .* vocabulary of 49999; .* set model.vocab_size >= 50000"):
        open_domains([("a", str(folder), 1.0)], vocab_size=49_999)
    path = next(folder.glob("a-train-*.bin"))
    content = np.fromfile(path, "<u2")
    content[::5] = 60_000
    content.tofile(path)
    with pytest.raises(DataError, match=r"token id 60000 .* is outside the vocabulary of 50000"):
        load(open_train(folder, "a"), batch=(1, 4, 8)).next_step()


def test_open_domains_checks_names(make_dataset, unique_documents) -> None:  # type: ignore[no-untyped-def]
    texts = unique_documents(600)
    many = make_dataset("many", {"a": texts, "b": texts[: len(texts) // 2]})
    one = make_dataset("one", {"data": texts})
    opened = open_domains([("mine", str(one), 2.0), ("many", str(many), 1.0)])
    assert [domain.name for domain in opened] == ["mine", "a", "b"]
    assert opened[0].weight == 2.0 and opened[1].weight + opened[2].weight == pytest.approx(1.0)
    assert opened[1].weight / opened[2].weight == pytest.approx(opened[1].dataset.tokens / opened[2].dataset.tokens)
    assert len(open_domains([("b", str(many), 1.0)])) == 1
    with pytest.raises(ConfigError, match="the name a is used twice"):
        open_domains([("a", str(many), 1.0), ("a", str(one), 1.0)])
    assert open_domains([("a", str(many), 1.0)], vocab_size=50_000)


def test_mixed_shares_over_many_draws(make_dataset, unique_documents) -> None:  # type: ignore[no-untyped-def]
    texts = {name: unique_documents(400, i) for i, name in enumerate("abc")}
    domains = open_train(make_dataset("d", texts), *"abc", weights=(0.6, 0.3, 0.1))
    loader, counts = load(domains, seq_length=4, batch=(1, 1, 50)), np.zeros(3)
    for _ in range(400):
        counts += np.bincount(loader.next_step()[0].domain_B.numpy(), minlength=3)
    assert counts.sum() == 20_000
    assert np.abs(counts / 20_000 - [0.6, 0.3, 0.1]).max() < 0.015


@pytest.mark.parametrize(("size", "micro"), [(1, 1), (1, 3), (2, 4), (4, 1), (3, 2)])
def test_evaluation_reads_the_held_out_text_once(make_dataset, unique_documents, size: int, micro: int) -> None:  # type: ignore[no-untyped-def]
    held_out = unique_documents(300, 5)
    folder = make_dataset("d", {"a": [[1] * 50], "b": [[1] * 50]}, held_out)
    domains = open_domains([("all", str(folder), 1.0)], "eval")
    labels: list[tuple[int, int]] = []
    counts = set()
    for rank in range(size):
        batches = list(eval_batches(domains, seq_length=S, micro_batch=micro, data_rank=rank, data_size=size))
        counts.add(len(batches))
        assert all(batch.tokens_BS.shape == (micro, S) for batch in batches)
        labels += [(d, x) for batch in batches for _, row, _, d in rows(batch) for x in row if x not in (-100, EOS)]
    assert len(counts) == 1
    first_of_all = held_out[0][0]
    begins = {document[0] for document in held_out}
    expected = [(d, t) for d in (0, 1) for document in held_out for t in document if t not in begins]
    assert sorted(labels) == sorted(expected) and (0, first_of_all) not in labels


def test_evaluation_limit_covers_all_domains(make_dataset, unique_documents) -> None:  # type: ignore[no-untyped-def]
    folder = make_dataset("d", {"a": [[1] * 50], "b": [[1] * 50]}, unique_documents(600))
    domains = open_domains([("all", str(folder), 1.0)], "eval")
    batches = list(eval_batches(domains, seq_length=S, micro_batch=2, limit=3))
    assert [batch.domain_B.tolist() for batch in batches] == [[0, 1]] * 3
    again = list(eval_batches(domains, seq_length=S, micro_batch=2, limit=3))
    assert all((a.tokens_BS == b.tokens_BS).all() for a, b in zip(batches, again))
    plain = next(eval_batches(domains, seq_length=S, micro_batch=2, document_mask=False))
    assert plain.positions_BS.tolist() == [list(range(S))] * 2
    empty = make_dataset("e", {"a": [[1] * 50]}, [])
    assert list(eval_batches(open_domains([("a", str(empty), 1.0)], "eval"), seq_length=S, micro_batch=2)) == []


def test_shards_do_not_change_the_order(make_dataset, unique_documents) -> None:  # type: ignore[no-untyped-def]
    texts = {"a": unique_documents(900)}
    one = open_train(make_dataset("one", texts, shard_tokens=10_000), "a")
    many = open_train(make_dataset("many", texts, shard_tokens=50), "a")
    assert len(many[0].dataset.shards) > 10 and len(one[0].dataset.shards) == 1
    assert global_rows(one, (1, 1, 2), 40) == global_rows(many, (1, 1, 2), 40)
