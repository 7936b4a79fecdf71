"""Settings that cannot work, that changed since the checkpoint, or that are misspelt.

E1    random layouts: refused exactly when ranks, experts, heads, vocabulary, tokens or sequences, dealt out one by one,
      leave somebody with more than the others; each value that a message calls valid is then tried
E2    every field of every section, changed between the checkpoint and the run that resumes from it
E3    one-edit typos of flags and keys, in the three places where a key is written
"""

import itertools
import re
import string
import time
from pathlib import Path
from random import Random
from typing import Any, NamedTuple, get_args

import torch

from moe_engine.config import Domain, RopeScaling, Run
from moe_engine.config.command_line import build_parser, load
from moe_engine.config.messages import KEYS, SECTIONS, problem_lines
from moe_engine.data.corpus import open_corpus
from moe_engine.errors import ConfigError
from moe_engine.parallel.mesh import Mesh
from moe_engine.train.begin import begin
from moe_engine.train.saving import Saving
from moe_engine.train.session import Session, build
from moe_engine.train.signals import Asked
from tests.faults.arena import Arena, Fault, Injections
from tests.faults.numbers import Listener, on_ranks
from tests.faults.ranks import run_of

SECONDS = 2.0  # within which a layout is refused


def refusal(argv: list[str], world: int) -> list[str]:
    """The problems of a command line; none when it is accepted."""
    try:
        load(argv, world)
    except ConfigError as error:
        return problem_lines(error)
    return []


# --- E1


class Wish(NamedTuple):
    """What a user asks for. None: left out."""

    world: int
    ep: int
    tp: int
    dp: int | None
    experts: int
    moe_layers: str
    heads: int
    kv_heads: int
    vocab: int
    top_k: int
    ffn: int
    expert_ffn: int
    length: int
    micro_batch: int
    batch: int | None
    zero: int

    def argv(self) -> list[str]:
        model = {
            "num_hidden_layers": 3, "hidden_size": 8 * self.heads, "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads, "vocab_size": self.vocab, "num_local_experts": self.experts,
            "moe_layers": self.moe_layers, "num_experts_per_tok": self.top_k, "intermediate_size": self.ffn,
            "moe_intermediate_size": self.expert_ffn,
        }  # fmt: skip
        flags = {
            "--ep": self.ep, "--tp": self.tp, "--dp": self.dp, "--zero": self.zero, "--seq-length": self.length,
            "--micro-batch": self.micro_batch, "--global-batch": self.batch,
        }  # fmt: skip
        return [
            *(word for key, value in model.items() for word in ("--set", f"model.{key}={value}")),
            *(word for flag, value in flags.items() if value is not None for word in (flag, str(value))),
        ]


ODD = {"vocab": 251, "ffn": 37, "expert_ffn": 37, "length": 61, "kv_heads": 1, "experts": 13, "world": 14}


def random_wish(draw: Random) -> Wish:
    """A third has sizes that divide well, a third all but one of these, a third any sizes."""
    kind = draw.choice(["even", "but one", "any"])
    even = kind != "any"
    kv_heads = draw.choice([4, 8, 12] if even else [1, 2, 3, 4, 6])
    heads = kv_heads * draw.choice([1, 2, 3]) if even or draw.random() < 0.9 else draw.randrange(1, 13)
    experts = draw.choice([8, 16, 24] if even else [0, 1, 2, 3, 4, 6, 12])
    ep, tp, dp = draw.choice([1, 2, 4, 8, 3]), draw.choice([1, 2, 2, 4, 3]), draw.choice([1, 2, 3, 4])
    micro_batch = draw.choice([1, 2, 3])
    unit = micro_batch * dp * ep
    wish = Wish(
        world=dp * ep * tp if even or draw.random() < 0.6 else draw.choice([1, 2, 4, 6, 8, 12, 16, 24]),
        ep=ep,
        tp=tp,
        dp=dp if draw.random() < 0.5 else None,
        experts=experts,
        moe_layers=draw.choice(["all", "all", "[0, 2]"] if even else ["all", "[0, 2]", "[]"]),
        heads=heads,
        kv_heads=kv_heads,
        vocab=draw.choice([264, 1536] if even else [96, 250, 99]),
        top_k=draw.randint(1, max(1, experts)) if draw.random() < 0.95 else experts + 1,
        ffn=draw.choice([480, 96] if even else [48, 100, 33]),
        expert_ffn=draw.choice([96, 480] if even else [24, 27, 96]),
        length=96 if even else draw.choice([15, 96]),
        micro_batch=micro_batch,
        batch=draw.choice([None, unit * draw.randint(1, 4), unit * draw.randint(1, 4), draw.randint(1, 64)]),
        zero=draw.choice([1, 2, 2, 2, 2, 3]),
    )
    if kind == "but one":
        name = draw.choice(list(ODD))
        wish = wish._replace(**{name: ODD[name]})
    return wish


def dealt(pieces: int, hands: int) -> bool:
    """Whether pieces dealt out one by one leave all hands with equally many, and none with nothing."""
    held = [0] * hands
    for piece in range(pieces):
        held[piece % hands] += 1
    return held[0] > 0 and len(set(held)) == 1


def faults_of(wish: Wish) -> set[str]:
    """The keys of a wish that cannot be granted: docs/parallelism.md, by counting."""
    moe = range(3) if wish.moe_layers == "all" else [int(layer) for layer in re.findall(r"\d", wish.moe_layers)]
    experts = wish.experts if moe else 0
    cut = [wish.world, wish.heads, wish.kv_heads, wish.vocab, wish.micro_batch * wish.length]
    cut += [wish.expert_ffn] * (experts > 0) + [wish.ffn] * (experts == 0 or len(moe) < 3)
    dp = wish.dp or max(1, wish.world // (wish.ep * wish.tp))
    ranks = list(itertools.product(range(dp), range(wish.ep), range(wish.tp)))
    rules = {
        "model.num_key_value_heads": dealt(wish.heads, wish.kv_heads),
        "model.num_experts_per_tok": wish.experts == 0 or wish.top_k in range(1, wish.experts + 1),
        "parallel.ep": dealt(experts or 1, wish.ep) and dealt(wish.world, wish.ep),
        "parallel.tp": all(dealt(size, wish.tp) for size in cut),
        "parallel.dp": len(ranks) == wish.world,
        "parallel.zero": wish.zero < 3 or wish.ep == 1,
        "train.global_batch": wish.batch is None or dealt(wish.batch, wish.micro_batch * dp * wish.ep),
    }
    return {key for key, holds in rules.items() if not holds}


def layouts_are_drawn(arena: Arena, count: int) -> Injections:
    """E1: load says what the counting says, quickly, and its advice is good."""
    for _ in range(count):
        wish = random_wish(arena.draw)
        found = judged(wish)
        yield found and f"{wish}: {found}"


def judged(wish: Wish) -> str | None:
    """None, or where load and the counting disagree."""
    began = time.perf_counter()
    lines = refusal(wish.argv(), wish.world)
    seconds = time.perf_counter() - began
    wrong = faults_of(wish)
    if bool(lines) != bool(wrong):
        return f"{'refused' if lines else 'accepted'}, but wrong is {sorted(wrong) or 'nothing'}: {lines}"
    if seconds > SECONDS:
        return f"answered after {seconds:.1f} s"
    return next(filter(None, (advice(wish, line, wrong) for line in lines)), None)


def advice(wish: Wish, line: str, wrong: set[str]) -> str | None:
    """None if a problem line names a key that is wrong, and each value that it calls valid mends it."""
    key = re.split(r"[: ]", line)[0]
    if key not in wrong:
        return f"wrong is {sorted(wrong)}, but load says {line}"
    remedies = remedies_of(line)
    if not remedies:
        return f"no valid value in: {line}"
    for remedy in remedies:
        mended = wish._replace(**remedy)
        if key in faults_of(mended) or any(key in other for other in refusal(mended.argv(), mended.world)):
            return f"{remedy} is as wrong, in spite of: {line}"
    axis = key.partition(".")[2]
    if axis in ("ep", "tp") and "(with a valid" not in line:
        listed = {remedy[axis] for remedy in remedies}
        grid = {"parallel.ep", "parallel.tp", "parallel.dp"}
        works = {n for n in range(1, wish.world + 1) if not grid & faults_of(wish._replace(**{axis: n, "dp": None}))}
        if listed != works:
            return f"valid are {sorted(works)}, but load says {line}"
    return None


def remedies_of(line: str) -> list[dict[str, Any]]:
    """The changes to a wish that a problem line offers."""

    def each(name: str, text: str) -> list[dict[str, Any]]:
        return [{name: int(number)} for number in re.findall(r"\d+", text)]

    if found := re.search(r"valid (ep|tp) .*: ([\d, ]+)$", line):
        return each(*found.groups())
    if found := re.search(r"valid dp with ep \d+ and tp \d+ is (\d+)", line):
        return each("dp", found[1])
    if found := re.search(r"valid ep x tp are ([\dx, ]+)", line):
        return [{"ep": int(e), "tp": int(t), "dp": None} for e, t in re.findall(r"(\d+) x (\d+)", found[1])]
    if found := re.search(r"nearest valid values are ([\d, ]+)$", line):
        return each("batch", found[1])
    if found := re.search(r"^parallel.zero: .* expected ([\d, or]+):", line):
        return each("zero", found[1])
    if found := re.search(r"^model.num_experts_per_tok .*: valid are 1 to (\d+)$", line):
        return each("top_k", " ".join(map(str, range(1, int(found[1]) + 1))))
    found = re.search(r"^model.num_key_value_heads .*: valid are ([\d, ]+)$", line)
    return each("kv_heads", found[1]) if found else []


# --- E2

VERDICT = {"model": "fatal", **dict.fromkeys(("optimizer", "train", "data", "supervision"), "warn")}
VERDICT |= dict.fromkeys(("parallel", "samples"), "allowed")
ALLOWED = {  # in spite of their sections: where things lie, how often they are done, what costs time or memory alone
    *("data.tokenizer", "data.domains.path", "train.out", "train.resume", "train.save_every", "train.async_save"),
    *("train.keep_last", "train.keep_every", "train.on_save_error", "train.step_timeout", "train.recompute"),
    *("train.eval_every", "train.eval_batches", "train.log_every", "train.init_from", "train.export_hf"),
    *("train.hf_version", "data.allow_other_tokenizer", "data.packing"),
}
WARNED = {  # of the model, what weighs in training alone
    *("model.router_aux_loss", "model.router_aux_loss_coef", "model.router_z_loss_coef", "model.router_jitter_noise"),
    "model.capacity_factor",
}
FIELDS = [*(f"{section}.{key}" for section, keys in KEYS.items() for key in keys), "data.domains.path"]


def fields_are_changed(arena: Arena, count: int) -> Injections:
    """E2: one checkpoint, from which a run that differs in one field resumes, field by field."""
    out = arena.folder("changed")
    answers = on_ranks(resume_changed, 1, run_of(arena.corpus(), out, (1, 1, 1)), FIELDS[:count])
    yield from [answers] if isinstance(answers, str) else answers[0]


def resume_changed(_: int, run: Run, fields: list[str]) -> list[str | None]:
    """What is wrong with the answer to each change, None where nothing is."""
    log = Listener(Path(run.train.out), True, run.train.steps)
    session = build(run, Mesh(), torch.device("cpu"), *open_corpus(run), log)
    saving = Saving(run, session.mesh, session.engine, session.loader, session.saver, log)
    saving.after_step(1, 0, Asked(save=True), last=True)
    return [answer_to(dotted, session) for dotted in fields]


def answer_to(dotted: str, session: Session) -> str | None:
    """Resume with one field changed, and compare what happens with the table above."""
    section, key, *rest = dotted.split(".")
    was = getattr(getattr(session.run, section), key)
    now = changed(session.run, section, key, rest)
    moved = {"resume": str(session.saver.root / "step-00000001")} if dotted == "train.out" else {}
    part = getattr(session.run, section).model_copy(update={key: now} | moved)
    log = Listener(Path(session.run.train.out), False, session.run.train.steps)
    expected = "allowed" if dotted in ALLOWED else "warn" if dotted in WARNED else VERDICT[section]
    found, lines = "allowed", log.said
    try:
        changed_run = session.run.model_copy(update={section: part})
        begin(changed_run, session.mesh, session.engine, session.loader, log, session.heartbeat)
    except ConfigError as error:
        found, lines = "fatal", [str(error)]
    found = "warn" if found == "allowed" and lines else found
    if found != expected:
        return f"{dotted}, {was} -> {now}: {found}, expected {expected}: {lines}"
    if len(lines) > 1 or not all(shows(line, f"{section}.{key}", was, now) for line in lines):
        return f"{dotted}: the key, {was} and {now} are not what is said: {lines}"
    return None


def changed(run: Run, section: str, key: str, rest: list[str]) -> Any:
    """Another value of the same type."""
    value = getattr(getattr(run, section), key)
    words = [word for word in get_args(SECTIONS[section].model_fields[key].annotation) if isinstance(word, str)]
    others = {
        "rope_scaling": RopeScaling(
            factor=8, low_freq_factor=1, high_freq_factor=4, original_max_position_embeddings=512
        ),
        "resume": str(Path(run.train.out) / "checkpoints" / "step-00000001"),
        "moe_layers": (0,),
        "attention_moe_layers": (0,),
        "init_from": "another-folder",
        "export_hf": "another-folder",
        "hf_version": 4,
        "capacity_factor": 1.25,
        "tokenizer": "bytes",
        "files": ("rows.json",),
        "labels": ("a",),
        "unknown_label_as": "a",
        "map": "map.yaml",
        "mixture": "mixture.yaml",
        "format": "alpaca",
        "columns": (("prompt", "question"),),
        **dict.fromkeys(("max_prompt", "max_response", "max_samples"), 7),
    }
    match value:
        case _ if key in others:
            return others[key]
        case bool():
            return not value
        case int() | float():
            return value + 1
        case str():
            return next((word for word in words if word != value), value + "-moved")
        case (first, *more):
            change = {"path": first.path + "-moved"} if rest else {"weight": first.weight + 4}
            return (first.model_copy(update=change), *more)
    raise AssertionError(f"{section}.{key}: no other value of {value!r} is known")


def shows(line: str, key: str, was: Any, now: Any) -> bool:
    """Whether a line names the key, then the old value, then the new one."""

    def words(value: Any) -> list[str]:
        if isinstance(value, Domain):
            return [value.name, str(value.weight)]
        if isinstance(value, RopeScaling):
            return [str(number) for number in value.model_dump().values()]
        return [word for item in value for word in words(item)] if isinstance(value, tuple) else [str(value)]

    at = 0
    for word in (key, *words(was), *words(now)):
        at = line.find(word, at) + len(word)
        if at < len(word):
            return False
    return True


# --- E3


def keys_are_misspelt(arena: Arena, count: int) -> Injections:
    """E3: all are refused, and of a hundred ninety-five are answered with the right key first."""
    places = [as_flag, as_assignment, as_yaml]
    spare = count // 20
    for i in range(count):
        argv, right = places[i % len(places)](arena)
        lines = refusal(argv, 1)
        guess = re.search(r"did you mean ([\w.-]+)\?", lines[0]) if lines else None
        missed = not lines or not guess or guess[1] != right
        spare -= missed and bool(lines)
        told = f"{' '.join(argv)}, meant was {right}: {' '.join(lines) or 'accepted'}"
        yield told if not lines or (missed and spare < 0) else None


def as_flag(arena: Arena) -> tuple[list[str], str]:
    """A misspelt flag with a value, and the flag."""
    flags = [word for action in build_parser()._actions for word in action.option_strings if word.startswith("--")]
    right = arena.draw.choice(flags)
    return [misspelt(right, arena.draw, flags), "1"], right


def as_assignment(arena: Arena) -> tuple[list[str], str]:
    """--set with a misspelt section.key, and the right one."""
    section = arena.draw.choice(list(KEYS))
    right = f"{section}.{arena.draw.choice(KEYS[section])}"
    return ["--set", f"{misspelt(right, arena.draw, FIELDS)}=1"], right


def as_yaml(arena: Arena) -> tuple[list[str], str]:
    """A file with a misspelt key, and the right one."""
    section = arena.draw.choice(list(KEYS))
    key = arena.draw.choice(KEYS[section])
    folder = arena.folder("misspelt")
    base = "model: tiny\n" if section != "model" else ""
    preset = "  preset: tiny\n" if section == "model" else ""
    wrong = misspelt(key, arena.draw, KEYS[section])
    (folder / "run.yaml").write_text(f"{base}{section}:\n{preset}  {wrong}: 1\n")
    return ["--config", str(folder / "run.yaml")], f"{section}.{key}"


def misspelt(word: str, draw: Random, valid: list[str]) -> str:
    """A word one edit away that is none of the valid ones: a letter inserted, deleted or replaced, or two swapped."""
    while True:
        at, letter = draw.randrange(len(word)), draw.choice(string.ascii_lowercase + "_-")
        wrong = draw.choice(
            [
                word[:at] + letter + word[at:],
                word[:at] + word[at + 1 :],
                word[:at] + letter + word[at + 1 :],
                word[:at] + word[at + 1 : at + 2] + word[at] + word[at + 2 :],
            ]
        )
        if wrong and wrong != word and wrong not in valid:
            return wrong


SETTINGS: dict[str, Fault] = {
    "E1": Fault("a random layout, against counting", layouts_are_drawn, ci=200, nightly=500),
    "E2": Fault("one setting changed since the checkpoint", fields_are_changed, ci=len(FIELDS), nightly=len(FIELDS)),
    "E3": Fault("a flag or key with one typo", keys_are_misspelt, ci=100, nightly=100),
}
