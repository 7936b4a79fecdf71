"""How a wrong setting is reported: one line a problem, all problems in one ConfigError.

A line names the key (and where it was written), what was found, what is allowed and, for an unknown key, the nearest
valid one. Values are shown escaped and cut, so that a file cannot smuggle control characters into a terminal.
"""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from pydantic import ValidationError

from moe_engine.config import Domain, RopeScaling, Run, Section
from moe_engine.errors import ConfigError
from moe_engine.text import printable

BULLET = "\n  - "

SECTIONS: dict[str, type[Section]] = {
    name: field.annotation
    for name, field in Run.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
}
KEYS: dict[str, list[str]] = {name: list(section.model_fields) for name, section in SECTIONS.items()}

# pydantic's words for what YAML calls otherwise.
PLAIN = {"tuple_type": "expected a list", "model_type": "expected a mapping", "bool_parsing": "expected true or false"}
PLAIN |= {"string_pattern_mismatch": "expected letters, digits and . _ + - (a weight after a path is a number)"}


def nearest(word: str, valid: Iterable[str]) -> str | None:
    """The member of `valid` that `word` most likely meant, or None when nothing is close.

    Fewest one-letter edits first (insert, delete, replace, swap of neighbours), then difflib's ratio, then the order
    of `valid`.
    """
    candidates = list(valid)
    if not candidates:
        return None
    plain = word.lower().replace("-", "_")

    def distance(candidate: str) -> tuple[int, float]:
        """(edits, -ratio), the least is the nearest; case, and - for _, make no difference."""
        other = candidate.lower().replace("-", "_")
        return edits(plain, other), -difflib.SequenceMatcher(None, plain, other).ratio()

    best = min(candidates, key=distance)
    close = distance(best)[0] <= max(1, len(plain) // 4) or bool(difflib.get_close_matches(word, [best], cutoff=0.6))
    return best if close else None


def edits(a: str, b: str) -> int:
    """Optimal string alignment distance: inserted, deleted, replaced or swapped neighbouring letters."""
    before: list[int] = []
    last = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row = [i]
        for j, y in enumerate(b, 1):
            cost = min(last[j] + 1, row[j - 1] + 1, last[j - 1] + (x != y))
            if i > 1 and j > 1 and x == b[j - 2] and a[i - 2] == y:
                cost = min(cost, before[j - 2] + 1)
            row.append(cost)
        before, last = last, row
    return last[-1]


def shown(value: Any) -> str:
    """`value` as it appears in a message: escaped, at most 80 characters."""
    text = repr(value)
    text = text.encode("unicode_escape").decode() if not text.isprintable() else text
    return text if len(text) <= 80 else text[:77] + "..."


def unknown_key(key: str, valid: Iterable[str], place: str = "") -> str:
    """The problem line for a key that does not exist; `place` says where it was written."""
    names = list(valid)
    guess = nearest(key, names)
    remedy = f"did you mean {guess}?" if guess else f"valid keys are {', '.join(names)}"
    return f"{shown(key)[1:-1]}{place}: unknown key, {remedy}"


def unknown_setting(section: str, key: str, place: str = "") -> str:
    """The problem line for an unknown `section.key` of a run; a key of another section, or a near one, is found too."""
    written = shown(f"{section}.{key}" if key else section)[1:-1]
    what = "unknown key" if section in KEYS else "unknown section"
    # Where each key lives; when two sections share a name, the one that was written, or nearly, wins.
    own = KEYS.get(section) or KEYS.get(nearest(section, KEYS) or "", [])
    home = {name: f"{other}.{name}" for other in reversed(KEYS) for name in KEYS[other]}
    home |= {name: f"{other}.{name}" for other, names in KEYS.items() if names is own for name in names}
    word = key or section
    guess = word if word in home else next((n for n in [nearest(word, own)] if n and edits(word, n) <= 1), None)
    guess = guess or nearest(word, [*own, *home, *KEYS])
    if not guess:
        remedy = f"valid keys are {', '.join(KEYS[section])}" if section in KEYS else f"sections are {', '.join(KEYS)}"
        return f"{written}{place}: {what}, {remedy}"
    return f"{written}{place}: {what}, did you mean {home.get(guess, guess)}?"


def validation_problems(error: ValidationError, origin: Mapping[str, str], section: str = "") -> dict[str, list[str]]:
    """Problem lines of a pydantic error, by dotted key (`section.key`, or `section` for a check of several keys).

    `origin` maps a dotted key to where its value was written; `section` names the section when the error is of one
    section alone instead of a Run.
    """
    problems: dict[str, list[str]] = {}
    for item in error.errors():
        where = [section] * bool(section) + [str(part) for part in item["loc"]]
        if item["type"] == "default_factory_not_called":
            continue
        key = ".".join(where[:2])
        place = f" ({origin[key]})" if key in origin else ""
        lines = problems.setdefault(key, [])
        if item["type"] == "missing":
            lines.append(f"{'.'.join(where)}{place}: not given and has no default")
        elif item["type"] == "extra_forbidden":
            lines.append(unknown_key(".".join(where), nested_keys(where), place))
        elif item["type"] == "value_error" and not isinstance(item["input"], bool):
            lines += [f"{'.'.join(where)}.{text}{place}" for text in str(item.get("ctx", {}).get("error")).split("\n")]
        else:
            allowed = item["msg"].removeprefix("Value error, ").replace("Input should", "expected to", 1)
            allowed = PLAIN.get(item["type"], allowed.replace("expected to be ", "expected ", 1))
            if len(where) > 2 and not nested_keys(where) and lines:  # a second alternative of the same key
                lines[-1] += f" or {allowed.removeprefix('expected ')}"
            else:
                name = ".".join(where) if nested_keys(where) else key
                lines.append(f"{name}{place}: found {shown(item['input'])}, {allowed}")
    return problems


def nested_keys(where: list[str]) -> list[str]:
    """Valid dotted keys beside `where`, also inside a section's own sections (model.rope_scaling, data.domains)."""
    inner = {"rope_scaling": RopeScaling, "domains": Domain}.get(where[1]) if len(where) > 2 else SECTIONS.get(where[0])
    return [".".join([*where[:-1], key]) for key in inner.model_fields] if inner else []


def refuse(problems: Iterable[str]) -> NoReturn:
    """Raise one ConfigError that lists every problem, each on a line of its own, whatever it quotes."""
    lines = [printable(problem) for problem in problems]
    if len(lines) == 1:
        raise ConfigError(lines[0])
    raise ConfigError(BULLET.join([f"{len(lines)} problems in the configuration", *lines]))


def problem_lines(error: ConfigError) -> list[str]:
    """The problems of a ConfigError, to be collected with others; one that `refuse` did not make is one problem."""
    first, *rest = str(error).split(BULLET)
    return rest if first == f"{len(rest)} problems in the configuration" else [str(error)]
