"""Whole samples in windows: every sample once an epoch, none sees another, the mask is what is trained."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from moe_engine.data.loader import Loader, OpenDomain, eval_batches, open_domains
from moe_engine.data.packing import best_fit
from moe_engine.data.shards import ShardWriter, TokenDataset, token_dtype, write_data_manifest
from moe_engine.errors import ConfigError, DataError
from moe_engine.host.atomic_folder import atomic_folder

S = 16
MakeSamples = Callable[..., Path]
Sample = tuple[list[int], list[int], int]  # tokens, which are trained, expert label


def random_samples(count: int, seed: int = 0, first: int = 0) -> list[Sample]:
    """No token occurs twice, so that a token tells the sample; every third has no expert label."""
    draw, samples = np.random.default_rng(seed), []
    for i in range(count):
        n = int(draw.integers(2, S + 2))
        trained = (draw.random(n) < 0.5).astype(int)
        trained[-1] = 1
        samples.append((list(range(first, first + n)), trained.tolist(), i % 3 - 1))
        first += n
    return samples


@pytest.fixture
def make_samples(tmp_path: Path) -> MakeSamples:
    def make(name: str, domains: dict[str, Sequence[Sample]], shard_tokens: int = 100) -> Path:
        dtype, entries = token_dtype(60_000), {}
        with atomic_folder(tmp_path / name) as folder:
            for domain, samples in domains.items():
                splits = {}
                for split, chosen in (("train", samples), ("eval", samples[:7])):
                    writer = ShardWriter(folder, f"{domain}-{split}", dtype, shard_tokens)
                    for tokens, trained, label in chosen:
                        columns = {"expert_label": np.array([label])}
                        writer.add(np.array(tokens), np.array([len(tokens)]), np.array(trained, bool), columns)
                    counts = {"documents": len(chosen), "tokens": writer.tokens, "max_id": 59_999}
                    splits[split] = {**counts, "shards": writer.close()}
                labels = ["b", "a"]
                kind = {"samples": True, "columns": ["expert_label"], "expert_labels": labels}
                entries[domain] = {"splits": splits, **kind}
            sizes = {"dtype": dtype.str, "vocab_size": 60_000, "eos_id": 59_999}
            tokenizer = {"spec": "made up", "kind": "test", "fingerprint": "f" * 64}
            write_data_manifest(folder, {"key": "", **sizes, "tokenizer": tokenizer, "domains": entries})
        return tmp_path / name

    return make


def opened(folder: Path, *names: str) -> list[OpenDomain]:
    return open_domains([(name, str(folder), 1.0) for name in names], "train")


def loader(domains: list[OpenDomain], **options: object) -> Loader:
    return Loader(domains, **{"seed": 3, "seq_length": S, "micro_batch": 2, "packing": "samples"} | options)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [1, 7, 64])
def test_best_fit_holds_every_length_once(size: int) -> None:
    draw = np.random.default_rng(size)
    lengths = draw.integers(1, size + 1, 500).tolist()
    windows = best_fit(lengths, size)
    assert sorted(i for window in windows for i in window) == list(range(500))
    fill = [sum(lengths[i] for i in window) for window in windows]
    assert max(fill) <= size and len(windows) <= 1.25 * sum(lengths) / size + 1
    spare = sorted(size - total for total in fill)
    smallest = min(lengths[i] for window in windows for i in window)
    assert len([s for s in spare if s >= smallest]) <= 1 or smallest == 1  # nothing that is open could be filled


def test_best_fit_leaves_the_least_space() -> None:
    assert best_fit([6, 5, 4, 3, 2], 10) == [[0, 2], [1, 3, 4]]
    assert best_fit([], 4) == [] and best_fit([4, 4], 4) == [[0], [1]]


def test_masks_and_columns_come_back(make_samples: MakeSamples) -> None:
    samples = random_samples(50)
    dataset = TokenDataset(make_samples("d", {"a": samples}), "a", "train")
    assert len(dataset.shards) > 3
    for i, (tokens, trained, label) in enumerate(samples):
        assert dataset.read(i, 0, len(tokens)).tolist() == tokens
        assert dataset.trained(i, len(tokens)).astype(int).tolist() == trained
        assert dataset.trained(i, 1).astype(int).tolist() == trained[:1]
        assert dataset.columns["expert_label"][i] == label


def test_a_cut_mask_is_found(make_samples: MakeSamples) -> None:
    folder = make_samples("d", {"a": random_samples(20)})
    (folder / "a-train-00000.mask").write_bytes(b"")
    with pytest.raises(DataError, match=r"a-train-00000\.mask: has 0 bytes"):
        TokenDataset(folder, "a", "train")


@pytest.mark.parametrize("packing", ["samples", "none"])
def test_rows_hold_whole_samples(make_samples: MakeSamples, packing: str) -> None:
    samples = {s[0][0]: s for s in random_samples(60)}
    domains = opened(make_samples("d", {"a": list(samples.values())}), "a")
    found = Counter[int]()
    ours = loader(domains, packing=packing, epochs=True)
    for _ in range(ours.draws.steps(1, ours.global_batch)):  # type: ignore[union-attr]
        (batch,) = ours.next_step()
        for tokens, labels, positions, names in zip(
            batch.tokens_BS.tolist(), batch.labels_BS.tolist(), batch.positions_BS.tolist(), batch.expert_label_BS
        ):
            starts = [i for i in range(S) if positions[i] == 0]
            if packing == "none":
                assert len(starts) <= 2  # the sample, and what is filled up
            for start, stop in zip(starts, [*starts[1:], S]):
                assert positions[start:stop] == list(range(stop - start))
                if (tokens[start:stop] == [0] * (stop - start)) and start:  # filled up
                    assert labels[start:stop] == [-100] * (stop - start)
                    continue
                if set(labels[start:stop]) == {-100}:
                    continue  # an empty row
                whole, trained, label = samples[tokens[start]]
                assert tokens[start:stop] == whole[:-1]
                assert labels[start:stop] == [t if on else -100 for t, on in zip(whole[1:], trained[1:])]
                assert names[start:stop].tolist() == [{-1: -1, 0: 1, 1: 0}[label]] * (stop - start)  # sorted: a, b
                found[whole[0]] += 1
    assert set(found.values()) == {1} and len(found) == len(samples)


@pytest.mark.parametrize("data_size", [1, 2, 4])
def test_each_sample_once_an_epoch_on_every_layout(make_samples: MakeSamples, data_size: int) -> None:
    domains = opened(make_samples("d", {"a": random_samples(40), "b": random_samples(31, 1, 5000)}), "a", "b")
    options = {"epochs": True, "micro_batch": 4 // data_size, "accumulation": 2, "data_size": data_size}
    ranks = [loader(domains, data_rank=rank, **options) for rank in range(data_size)]
    per_epoch = ranks[0].draws.steps(1, 8)  # type: ignore[union-attr]
    seen, orders = Counter[int](), []
    for _ in range(2):
        order = []
        for _ in range(per_epoch):
            step = [rank.next_step() for rank in ranks]
            for a in range(2):
                for batches in step:
                    order += batches[a].tokens_BS[batches[a].positions_BS == 0].tolist()
        seen.update(order)
        orders.append([token for token in order if token])
    assert {count for token, count in seen.items() if token} == {2}
    assert sorted(orders[0]) == sorted(orders[1]) and orders[0] != orders[1]
    whole = loader(domains, epochs=True, micro_batch=8)
    alone = [whole.next_step()[0] for _ in range(per_epoch)]
    assert [t for b in alone for t in b.tokens_BS[b.positions_BS == 0].tolist() if t] == orders[0]


@pytest.mark.parametrize("epochs", [True, False])
def test_goes_on_where_it_stopped(make_samples: MakeSamples, epochs: bool) -> None:
    domains = opened(make_samples("d", {"a": random_samples(40), "b": random_samples(31, 1, 5000)}), "a", "b")
    straight = loader(domains, epochs=epochs)
    expected = [straight.next_step()[0].tokens_BS for _ in range(30)]
    for at in (1, 13, 17):
        first, second = loader(domains, epochs=epochs), loader(domains, epochs=epochs)
        for _ in range(at):
            first.next_step()
        second.load_state(json.loads(json.dumps(first.state())))
        assert second.step == at
        for step in range(at, 30):
            assert second.next_step()[0].tokens_BS.equal(expected[step])


def test_another_way_of_packing_or_counting_is_refused(make_samples: MakeSamples) -> None:
    domains = opened(make_samples("d", {"a": random_samples(40)}), "a")
    saved = loader(domains, epochs=True).state()
    for options, message in (
        ({"epochs": True, "packing": "none"}, "data.packing: found none, and samples"),
        ({"epochs": False}, "what the run counts: found steps, and epochs"),
        ({"epochs": True, "micro_batch": 3}, "train.global_batch: found 3, and 2"),
    ):
        with pytest.raises(ConfigError, match=message):
            loader(domains, **options).load_state(saved)


def test_long_samples_are_cut_and_samples_without_a_label_left_out(make_samples: MakeSamples) -> None:
    long = (list(range(100, 140)), [0] * 5 + [1] * 35, 0)
    late = (list(range(200, 240)), [0] * (S + 1) + [1] * 23, 0)  # its labels lie behind the cut
    domains = opened(make_samples("d", {"a": [long, late, *random_samples(10)]}), "a")
    order = loader(domains).orders[0]
    assert order.cut == 2 and order.samples == 11  # type: ignore[union-attr]
    (row,) = [order.in_order(i) for i in range(order.per_epoch) if 100 in order.in_order(i).tokens]
    assert row.tokens.tolist() == list(range(100, 100 + S)) and row.labels[-1] == 100 + S
    nothing = opened(make_samples("n", {"a": [late] * 8}), "a")
    with pytest.raises(DataError, match="none of its 8 samples has a label among its first 16 tokens"):
        loader(nothing)


def test_held_out_samples_come_once_in_order(make_samples: MakeSamples) -> None:
    folder = make_samples("d", {"a": random_samples(40), "b": random_samples(31, 1, 5000)})
    domains = open_domains([("a", str(folder), 1.0), ("b", str(folder), 1.0)], "eval")
    first = list(eval_batches(domains, seq_length=S, micro_batch=2, packing="samples"))
    again = list(eval_batches(domains, seq_length=S, micro_batch=2, packing="samples"))
    assert all(a.tokens_BS.equal(b.tokens_BS) for a, b in zip(first, again, strict=True))
    starts = [t for batch in first for t in batch.tokens_BS[batch.positions_BS == 0].tolist() if t]
    expected = [s[0][0] for s in random_samples(40)[:7] + random_samples(31, 1, 5000)[:7]]
    assert sorted(starts) == sorted(t for t in expected if t)
