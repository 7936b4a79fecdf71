"""The first samples as a model will see them: special tokens visible, what has no label dimmed."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from moe_engine.prepare.template import Rendered, Template
from moe_engine.text import printable

BOLD, DIM, RESET = "\033[1m", "\033[2m", "\033[0m"
OPEN, CLOSE = "\u00ab", "\u00bb"  # around what is trained, where there are no colours


class Preview(NamedTuple):
    """One sample. where: file and row. halves: of a pair, the chosen and the rejected one."""

    where: str
    halves: Sequence[Rendered]
    expert_label: str | None


def as_json(template: Template, preview: Preview) -> dict[str, Any]:
    """A sample for scripts: text, ids, labels (-100 where there is none), counts."""
    halves = [
        {
            "text": decoded(template, half.ids),
            "ids": half.ids.tolist(),
            "labels": [int(i) if on else -100 for i, on in zip(half.ids, half.trained)],
            "tokens": len(half.ids),
            "trained": int(half.trained.sum()),
        }
        for half in preview.halves
    ]
    pair = {"rejected": halves[1]} if len(halves) == 2 else {}
    return {"where": preview.where, "expert_label": preview.expert_label, **halves[0], **pair}


def lines_of(template: Template, preview: Preview, colours: bool) -> list[str]:
    """A sample for people."""
    label = f", expert label {preview.expert_label}" if preview.expert_label else ""
    lines = [printable(f"--- {preview.where}{label}")]
    for name, half in zip(("chosen", "rejected") if len(preview.halves) == 2 else ("",), preview.halves):
        lines += [f"{name}:"] * bool(name)
        lines += _painted(template, half, colours).split("\n")
        lines.append(f"({len(half.ids)} tokens, {int(half.trained.sum())} trained)")
    return lines


def decoded(template: Template, ids: Any) -> str:
    """Text of token ids, special tokens as they are spelled."""
    return template.tokenizer.decode(ids)


def _painted(template: Template, half: Rendered, colours: bool) -> str:
    """The text; runs of tokens with a label stand out."""
    out, start = [], 0
    for stop in range(1, len(half.ids) + 1):
        if stop < len(half.ids) and half.trained[stop] == half.trained[start]:
            continue
        text = "\n".join(printable(line) for line in decoded(template, half.ids[start:stop]).split("\n"))
        if colours:
            out.append(f"{BOLD if half.trained[start] else DIM}{text}{RESET}")
        else:
            out.append(f"{OPEN}{text}{CLOSE}" if half.trained[start] else text)
        start = stop
    return "".join(out)
