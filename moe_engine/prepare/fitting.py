"""Samples cut to a length: the prompt gives way first, and a reply keeps at least a quarter of the room (S0.9).

    longer than max_length     the prompt is cut to at most 3/4 of it, or to max_prompt; the reply fills the rest
    max_prompt, max_response   hold whatever the length is (S1.8: 64 and 32)

A prompt is cut at the end of what its longest user turn says, so that the template around it stays whole.
"""

from typing import NamedTuple

from moe_engine.prepare.sample_formats import Message, Sample
from moe_engine.prepare.template import Rendered, Template, TrainOn

ROUNDS = 4  # tokens of a cut text are not exactly those that were kept


class Limits(NamedTuple):
    """In tokens; None: no limit."""

    length: int | None = None
    prompt: int | None = None
    response: int | None = None


def fitted(template: Template, sample: Sample, train_on: TrainOn, limits: Limits) -> list[Rendered]:
    """The sample as tokens within the limits; of a pair, the chosen half and the rejected one, whose last responses are
    trained. DataError as Template.render has it."""
    halves = [sample.messages]
    if sample.rejected is not None:
        halves.append(sample.messages[: sample.shared] + sample.rejected)
        train_on = "last-response"
    for _ in range(ROUNDS):
        made = [template.render(half, sample.tools, train_on) for half in halves]
        excess = max(_excess(rendered, limits) for rendered in made)
        turn = _longest_prompt(halves[0], train_on, len(halves[0]) if sample.rejected is None else sample.shared)
        if excess <= 0 or turn is None:
            break
        ids = template.tokenizer.encode([halves[0][turn]["content"]])[0]
        shorter = template.tokenizer.decode(ids[: max(len(ids) - excess, 0)]).rstrip("\ufffd")
        halves = [[*half[:turn], {**half[turn], "content": shorter}, *half[turn + 1 :]] for half in halves]
    return [_clipped(rendered, limits) for rendered in made]


def _excess(rendered: Rendered, limits: Limits) -> int:
    """Tokens by which the prompt is too long."""
    caps = [] if limits.prompt is None else [limits.prompt]
    if limits.length is not None and len(rendered.ids) > limits.length:
        caps.append(limits.length * 3 // 4)
    return rendered.prompt - min(caps) if caps else 0


def _longest_prompt(messages: list[Message], train_on: TrainOn, stop: int) -> int | None:
    """The longest user turn of what is read before the first trained reply; None when none says anything."""
    replies = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    end = min(replies[-1] if train_on == "last-response" else replies[0], stop)
    turns = [i for i in range(end) if messages[i]["role"] == "user" and messages[i]["content"]]
    return max(turns, key=lambda i: len(messages[i]["content"]), default=None)


def _clipped(rendered: Rendered, limits: Limits) -> Rendered:
    """At most so many tokens in all, and in the last response."""
    stop = len(rendered.ids) if limits.length is None else limits.length
    if limits.response is not None and rendered.trained.any():
        last = len(rendered.trained) - int(rendered.trained[::-1].argmax())
        untrained = (~rendered.trained[:last]).nonzero()[0]
        start = int(untrained[-1]) + 1 if len(untrained) else 0
        stop = min(stop, start + limits.response)
    return Rendered(rendered.ids[:stop], rendered.trained[:stop])
