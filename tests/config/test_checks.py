"""Layouts against a brute-force oracle, and typos against the key they came from."""

import random
import re
import string

import pytest

from moe_engine.config import Model, Parallel, Run, Train
from moe_engine.config.checks import check_layout, derive, layout_problems
from moe_engine.config.command_line import build_parser, load, load_run
from moe_engine.config.messages import KEYS, unknown_setting
from moe_engine.errors import ConfigError


def oracle(model: Model, parallel: Parallel, train: Train, world: int) -> bool:
    """Whether a layout works, by counting whole pieces on every rank instead of by divisibility rules."""
    dp, ep, tp = parallel.dp, parallel.ep, parallel.tp
    ranks = {(d, e, t) for d in range(dp) for e in range(ep) for t in range(tp)}
    if len(ranks) != world:
        return False

    def cuts(size: int, parts: int) -> bool:
        held = [len(range(part, size, parts)) for part in range(parts)]
        return len(set(held)) == 1 and held[0] > 0

    expert_layers = [i for i in range(model.num_hidden_layers) if model.is_moe(i)]
    routed = [i for i in range(model.num_hidden_layers) if model.is_attention_moe(i)]
    to_cut = [model.num_local_experts] if expert_layers else []
    to_cut += [model.num_attention_experts] if routed and not parallel.replicate_attention_experts else []
    if not all(cuts(experts, ep) for experts in to_cut or [1]):
        return False
    sizes = [model.vocab_size]
    if len(routed) < model.num_hidden_layers:
        sizes += [model.num_attention_heads, model.num_key_value_heads]
    sizes += [model.num_attention_heads // model.num_attention_experts] if routed else []
    sizes += [train.micro_batch * train.seq_length]
    sizes += [model.moe_intermediate_size] if expert_layers else []
    if model.shared_intermediate_size and expert_layers:
        sizes.append(model.shared_intermediate_size)
    sizes += [model.intermediate_size] if len(expert_layers) < model.num_hidden_layers else []
    return all(cuts(size, tp) for size in sizes)


def random_case(rng: random.Random) -> tuple[Run, int]:
    """A run and a number of ranks; half of the draws come from sizes that divide well."""
    even = rng.random() < 0.5
    kv_heads = rng.choice([4, 8] if even else [1, 2, 3, 4, 6])
    heads = kv_heads * rng.choice([1, 2, 3, 4])
    experts = rng.choice([8, 16, 24] if even else [0, 1, 2, 3, 4, 6, 12])
    routed = rng.random() < 0.3
    model = Model(
        num_attention_experts=rng.choice(
            [n for n in range(1, heads + 1) if heads % n == n % kv_heads == 0] * routed or [0]
        ),
        num_attention_experts_per_tok=1,
        attention_moe_layers=rng.choice(["all", (1,), ()]),
        vocab_size=rng.choice([264, 32000, 128256] if even else [96, 250, 99]),
        hidden_size=heads * 8,
        intermediate_size=rng.choice([256, 14336] if even else [48, 100, 33]),
        num_hidden_layers=3,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        num_local_experts=experts,
        num_experts_per_tok=rng.randint(1, max(1, experts)),
        moe_intermediate_size=rng.choice([96, 1376] if even else [24, 27, 96]),
        shared_intermediate_size=rng.choice([0, 0, 96] if even else [0, 0, 24, 27]),
        moe_layers=rng.choice(["all", "all", (0, 2)] if even else ["all", (0, 2), ()]),
    )
    ep, tp = rng.choice([1, 2, 4, 8, 3]), rng.choice([1, 1, 2, 4, 3])
    dp = rng.choice([1, 2, 3, 4])
    world = dp * ep * tp if rng.random() < 0.8 else rng.choice([1, 2, 4, 6, 8, 12, 16, 24])
    train = Train(micro_batch=rng.choice([1, 2, 3]), seq_length=rng.choice([64, 128, 96] if even else [15, 96]))
    parallel = Parallel(dp=dp, ep=ep, tp=tp, replicate_attention_experts=rng.random() < 0.5)
    return Run(model=model, parallel=parallel, train=train), world


def with_parallel(run: Run, world: int, **change: int) -> Run:
    kept = run.parallel.model_dump(include={"ep", "tp", "replicate_attention_experts"})
    parallel = Parallel.model_validate(kept | change)
    return derive(Run(model=run.model, parallel=parallel, train=run.train), world)[0]


def test_layouts_agree_with_a_brute_force_oracle() -> None:
    rng = random.Random(0)
    verdicts, listed = [], 0
    for _ in range(600):
        run, world = random_case(rng)
        run = derive(run, world)[0]
        problems = layout_problems(run, world)
        expected = oracle(run.model, run.parallel, run.train, world)
        assert (not problems) is expected, (run, world, problems)
        verdicts.append(expected)
        if len(problems) != 1:
            continue
        found = re.search(r"valid (ep|tp) with \w+ \d+: ([\d, ]+)$", problems[0])
        if found:  # the only fault is this axis: every listed value works, every other one does not
            valid = {int(value) for value in found[2].split(",")}
            for value in range(1, world + 1):
                works = with_parallel(run, world, **{found[1]: value})
                assert oracle(works.model, works.parallel, works.train, world) is (value in valid)
            listed += 1
    assert 150 < sum(verdicts) < 450 and listed > 50, (sum(verdicts), listed)


@pytest.mark.parametrize(
    ("gpus", "ep", "dp", "local"), [(8, 2, 4, 4), (8, 4, 2, 2), (8, 8, 1, 1), (4, 4, 1, 2), (4, 2, 2, 4), (2, 2, 1, 4)]
)
def test_published_layouts_of_mixtral(gpus: int, ep: int, dp: int, local: int) -> None:
    run = load_run(["--model", "mixtral-8x7b", "--ep", str(ep)], gpus)
    assert run.parallel.dp == dp and run.model.num_local_experts // ep == local


@pytest.mark.parametrize(
    ("world", "argv", "words"),
    [
        (8, ["--ep", "3"], "valid ep with tp 1: 1, 2, 4, 8"),
        (6, ["--ep", "4"], "valid ep with tp 1: 1, 2"),
        (8, ["--ep", "8", "--tp", "2"], "valid ep x tp are 1 x 1, 1 x 2, 2 x 1, 2 x 2, 4 x 1, 4 x 2, 8 x 1"),
        (8, ["--tp", "4"], "does not divide num_key_value_heads 2: valid tp with ep 1: 1, 2"),
        (8, ["--tp", "3"], "valid tp with ep 1: 1, 2"),
        (8, ["--dp", "2", "--ep", "2"], "valid dp with ep 2 and tp 1 is 4"),
        (2, ["--model", "llama-3.2-1b", "--ep", "2"], "expected a divisor of 1 (no layer has experts)"),
        (2, ["--tp", "2", "--micro-batch", "1", "--seq-length", "65"], "does not divide micro_batch * seq_length 65"),
        (8, ["--zero", "3", "--ep", "2"], "ZeRO-3 works with ep 1 only"),
        (8, ["--zero", "0", "--offload-optimizer"], "expected zero 1, 2 or 3"),
        (8, ["--zero", "4"], "less than or equal to 3"),
        (8, ["--ep", "0"], "greater than or equal to 1"),
    ],
)
def test_refused_layouts_list_what_is_valid(world: int, argv: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(argv, world)
    assert words in str(caught.value)


def test_attention_experts_number_their_tokens_exactly() -> None:
    argv = ["--seq-length", "65536", "--set", "model.max_position_embeddings=65536", "--micro-batch"]
    routed = ["--set", "model.num_attention_experts=4"]
    load([*argv, "255", *routed], 1)
    load([*argv, "256"], 1)
    with pytest.raises(ConfigError, match=r"less than 2\^24 with attention experts"):
        load([*argv, "256", *routed], 1)


def test_check_layout_raises_for_another_world() -> None:
    run = load_run(["--ep", "2"], 8)
    check_layout(run, 8)
    with pytest.raises(ConfigError, match="expected the 4 ranks"):
        check_layout(run, 4)
    check_layout(load_run(["--zero", "3"], 8), 8)


def typo(word: str, rng: random.Random) -> str:
    """One edit: a letter inserted, deleted or replaced, or two neighbours swapped."""
    at, letter = rng.randrange(len(word)), rng.choice(string.ascii_lowercase)
    kind = rng.choice(["insert", "delete", "replace", "swap"])
    if kind == "insert":
        return word[:at] + letter + word[at:]
    if kind == "delete" and len(word) > 1:
        return word[:at] + word[at + 1 :]
    if kind == "swap" and at + 1 < len(word):
        return word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    return word[:at] + letter + word[at + 1 :]


def test_typos_of_keys_are_refused_with_the_right_key_first() -> None:
    rng = random.Random(1)
    total = right = 0
    for section, keys in KEYS.items():
        for key in keys:
            for wrong in {typo(key, rng) for _ in range(12)} - set(keys):
                total += 1
                right += f"did you mean {section}.{key}?" in unknown_setting(section, wrong)
    assert total > 400 and right / total >= 0.95, f"{right} of {total}"


def test_a_sample_of_typos_stops_the_run() -> None:
    rng = random.Random(2)
    keys = [(section, key) for section, names in KEYS.items() for key in names]
    right = 0
    for section, key in rng.sample(keys, 50):
        while (wrong := typo(key, rng)) in KEYS[section]:
            pass
        with pytest.raises(ConfigError) as caught:
            load(["--set", f"{section}.{wrong}=1"], 8)
        right += f"did you mean {section}.{key}?" in str(caught.value)
    assert right >= 47


def test_typos_of_sections_and_flags() -> None:
    rng = random.Random(3)
    total = right = 0
    flags = [word for action in build_parser()._actions for word in action.option_strings if word.startswith("--")]
    for name in [*KEYS, *flags] * 8:
        wrong = f"--{typo(name[2:], rng)}" if name.startswith("--") else typo(name, rng)
        if wrong in (*KEYS, *flags) or wrong == "--":
            continue
        argv = [wrong] if wrong.startswith("--") else ["--set", f"{wrong}.{KEYS[name][0]}=1"]
        with pytest.raises(ConfigError) as caught:
            load(argv, 1)
        total += 1
        guess = name if name.startswith("--") else f"{name}.{KEYS[name][0]}"
        right += f"did you mean {guess}?" in str(caught.value)
    assert total > 150 and right / total >= 0.95, f"{right} of {total}"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["-steps", "5"], "-steps: unknown flag, did you mean --steps?"),
        (["--seed", "1", "-xx-dry-run"], "'-xx-dry-run': not a flag"),  # two edits
        (["w--lr", "1"], "w--lr: unknown flag, did you mean --lr?"),
        (["--set", "parallelzero=1"], "expected section.key=value, did you mean parallel.zero?"),
        (["--set", "train-seed=1"], "expected section.key=value, did you mean train.seed?"),
        (["--set", "seed=1"], "expected section.key=value, such as --set optimizer.beta2=0.99"),
    ],
)
def test_a_dash_or_a_dot_that_is_missing(argv: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(argv, 1)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("size", "argv", "refused"),
    [
        (1537, ["--dp", "2"], True),
        (1, ["--ep", "2", "--zero", "1"], True),
        (7, ["--offload-optimizer"], True),
        (7, [], False),  # one data rank does without DeepSpeed
        (7, ["--dp", "2", "--zero", "3"], False),
        (7, ["--dp", "2", "--zero", "1", "--precision", "bf16"], False),  # another optimizer of DeepSpeed
        (7, ["--dp", "2", "--zero", "1", "--precision", "bf16", "--offload-optimizer"], True),
        (1536, ["--dp", "2"], False),
    ],
)
def test_case_14_a_bucket_that_deepspeed_cannot_use(size: int, argv: list[str], refused: bool) -> None:
    """tests/train/test_deepspeed_engine.py asks DeepSpeed itself."""
    argv = [*argv, "--set", f"parallel.allgather_bucket_size={size}", "--set", "parallel.reduce_bucket_size=7"]
    if not refused:
        loaded = load(argv, None)
        assert any("one data rank" in line for line in loaded.warnings) == (loaded.run.data_ranks == 1)
        return
    with pytest.raises(ConfigError, match=f"allgather_bucket_size: found {size} .* an even number, such as") as caught:
        load(argv, None)
    assert str(size + 1) in str(caught.value) and "reduce_bucket_size" not in str(caught.value)
