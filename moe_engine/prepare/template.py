"""Conversations to token ids with a mask: which of them a model is trained to write.

    messages -> text by a chat template -> ids          one rendering, so that no piece is tokenised apart
             -> spans of the assistant's turns -> mask  by {% generation %} marks, or by rendering prefixes

The template is the tokenizer's own, `instruction` (S0's), or a file. transformers renders it in its sandbox. A template
without marks has to be consistent: the rendering of the first turns is the beginning of the rendering of all. A turn is
then trained from where the generation prompt ends to where the next turn begins, its end-of-turn token included. No
begin-of-text token is added to what a template writes. Text of a message that spells a special token stays text.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import numpy as np

from moe_engine.errors import ConfigError, DataError
from moe_engine.prepare.tokenizer.hugging_face import as_transformers, encoder_of
from moe_engine.prepare.tokenizer.identity import difference
from moe_engine.prepare.tokenizer.special import settings_of
from moe_engine.prepare.tokenizer.tokenizer import Tokenizer

INSTRUCTION = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}"
    "{% elif message['role'] == 'system' %}{{ message['content'] }}\n\n{% else %}"
    "### Instruction:\n{{ message['content'] }}\n\n### Response:\n{% endif %}{% endfor %}"
)
BUILT_IN = {"instruction": INSTRUCTION}
MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
DATE = "26 Jul 2024"  # what templates of Llama 3 fall back on: today's date would make other data of the same files
KEPT_APART = "\ue0f5"  # between the characters of a special token that a message spells

TrainOn = Literal["all", "responses", "last-response"]
Messages = Sequence[Mapping[str, Any]]
Span = tuple[int, int]


class Rendered(NamedTuple):
    """ids int32 [n]; trained bool [n], whether a token is a label."""

    ids: np.ndarray
    trained: np.ndarray

    @property
    def prompt(self) -> int:
        """Tokens before the first that is trained."""
        return int(self.trained.argmax()) if self.trained.any() else len(self.ids)


class Template:
    """A chat template and the tokenizer that it writes for. ConfigError when there is none, or it cannot be compiled.

    name: "auto" (the tokenizer's own), one of BUILT_IN, or a file.
    """

    def __init__(self, tokenizer: Tokenizer, name: str = "auto") -> None:
        files = tokenizer.kept()
        made = as_transformers(tokenizer.spec, files, settings_of(tokenizer.spec, files))
        self.tokenizer, self.name = tokenizer, name
        self.source = _source(name, made, tokenizer.spec)
        self.marked = MARKS.search(self.source) is not None
        self.variables = {**made.special_tokens_map, "date_string": DATE}
        if other := difference(tokenizer.encode_text, encoder_of(made)):
            raise ConfigError(
                f"tokenizer {tokenizer.spec}: transformers splits text differently ({other}), and chat templates are "
                "rendered with it; give a folder whose tokenizer.json agrees"
            )
        self.model = made.backend_tokenizer
        added = self.model.get_added_tokens_decoder()
        self.special = {i for i, token in added.items() if token.special} | {tokenizer.eos_id}
        spelled = sorted((token.content for token in added.values()), key=len, reverse=True)
        self.spelled = re.compile("|".join(map(re.escape, spelled))) if spelled else None
        try:
            self.render([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
        except DataError as error:
            raise ConfigError(f"--template {name}: {error}") from None

    def render(
        self, messages: Messages, tools: Sequence[Any] | None = None, train_on: TrainOn = "responses"
    ) -> Rendered:
        """A conversation as tokens. DataError, which names the turn, for one that the template refuses or does not
        render consistently."""
        text, spans = self._text([self._kept_apart(message) for message in messages], tools)
        text, spans, plain = _joined_again(text, spans)
        ids, offsets = self._encode(text, plain)
        if train_on == "all":
            trained = np.ones(len(ids), bool)
        else:
            starts, ends = offsets[:, 0], np.maximum(offsets[:, 1], offsets[:, 0] + 1)
            trained = np.zeros(len(ids), bool)
            for start, end in spans[-1:] if train_on == "last-response" else spans:
                trained |= (starts < end) & (ends > start)
        if spans and not self._ends(ids, offsets, spans[-1]):  # a template that says nothing of the end
            ids, trained = np.append(ids, np.int32(self.tokenizer.eos_id)), np.append(trained, True)
        return Rendered(ids, trained)

    def _ends(self, ids: np.ndarray, offsets: np.ndarray, last: Span) -> bool:
        """Whether the last response has an end-of-turn token."""
        inside = ids[(offsets[:, 0] < last[1]) & (offsets[:, 1] > last[0])]
        return any(int(i) in self.special for i in inside[-3:])

    def _text(self, messages: list[dict[str, Any]], tools: Sequence[Any] | None) -> tuple[str, list[Span]]:
        """The conversation as the template writes it, and where its assistant turns are."""
        if self.marked:
            return self._run(messages, tools, marked=True)
        whole, _ = self._run(messages, tools)
        spans: list[Span] = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before, _ = self._run(messages[:i], tools, prompt=True)
            upto, _ = self._run(messages[: i + 1], tools)
            if not upto.startswith(before) or not whole.startswith(upto):
                raise DataError(
                    f"turn {i + 1} of {len(messages)} (assistant): the template is not prefix-consistent: it writes "
                    "the turns up to this one differently when more follow; give one with {% generation %} marks, by "
                    "--template FILE, or train on single turns"
                )
            spans.append((len(before), len(upto)))
        return whole, spans

    def _run(
        self, messages: list[dict[str, Any]], tools: Sequence[Any] | None, prompt: bool = False, marked: bool = False
    ) -> tuple[str, list[Span]]:
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            found = render_jinja_template(
                conversations=[messages],
                tools=list(tools) if tools else None,
                chat_template=self.source,
                return_assistant_tokens_mask=marked,
                add_generation_prompt=prompt,
                **self.variables,
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise DataError(f"the template refuses the conversation: {error}") from None
        texts, marks = cast(Any, found)  # it says that it returns a string
        return texts[0], [(start, end) for start, end in marks[0]] if marked else []

    def _kept_apart(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """The message with KEPT_APART inside each special token that its content spells; tool calls as JSON text where
        the template knows none."""
        content = message.get("content")
        if (calls := message.get("tool_calls")) and "tool_calls" not in self.source:
            content = "\n".join([content or "", *(json.dumps(call.get("function", call)) for call in calls)]).strip()
            message = {**message, "content": content}
        if self.spelled is None or not isinstance(content, str) or not self.spelled.search(content):
            return dict(message)
        apart = self.spelled.sub(lambda match: match[0][0] + KEPT_APART + match[0][1:] + KEPT_APART, content)
        return {**message, "content": apart}

    def _encode(self, text: str, plain: Sequence[Span]) -> tuple[np.ndarray, np.ndarray]:
        """ids int32 [n] and the characters [n, 2] that each stands for; what lies in `plain` is no special token."""
        ids: list[int] = []
        offsets: list[Span] = []
        at = 0
        for start, end in [*plain, (len(text), len(text))]:
            for first, stop, as_text in ((at, start, False), (start, end, True)):
                self.model.encode_special_tokens = as_text
                found = self.model.encode(text[first:stop], add_special_tokens=False)
                ids += found.ids
                offsets += [(first + a, first + b) for a, b in found.offsets]
            at = end
        self.model.encode_special_tokens = False
        return np.array(ids, np.int32), np.array(offsets, np.int64).reshape(-1, 2)


def _joined_again(text: str, spans: list[Span]) -> tuple[str, list[Span], list[Span]]:
    """Text and spans without the marks of `_kept_apart`, and where the tokens that they kept apart lie now."""
    marks = [match.start() for match in re.finditer(KEPT_APART, text)]
    if not marks:
        return text, spans, []
    moved = [position - number for number, position in enumerate(marks)]
    plain = [(first - 1, last) for first, last in zip(moved[::2], moved[1::2])]
    before = np.searchsorted(marks, [edge for span in spans for edge in span])
    edges = [edge - int(n) for edge, n in zip((edge for span in spans for edge in span), before)]
    return text.replace(KEPT_APART, ""), list(zip(edges[::2], edges[1::2])), plain


def _source(name: str, made: Any, spec: str) -> str:
    if name in BUILT_IN:
        return BUILT_IN[name]
    if name == "auto":
        own = made.chat_template
        if isinstance(own, dict):
            own = own.get("default")
        if not own:
            raise ConfigError(
                f"tokenizer {spec}: has no chat template; choose one with --template: {', '.join(BUILT_IN)}, or a file"
            )
        return own
    try:
        return Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--template {name}: cannot be read ({error}); expected auto, {', '.join(BUILT_IN)}, or a file of jinja"
        ) from None
