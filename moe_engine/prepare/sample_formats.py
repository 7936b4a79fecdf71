"""Rows of instruction, conversation and preference data, one reader a format.

A reader takes a row and gives a Sample; it raises LeftOut for a row that holds nothing to learn from, and Malformed for
one that is not of its format. Messages are OpenAI's: {"role": system | user | assistant | tool, "content": text}.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

Row = Mapping[str, Any]
Message = dict[str, Any]

ROLES = {
    "system": "system", "developer": "system", "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "bing": "assistant", "chatgpt": "assistant", "model": "assistant",
    "function_call": "assistant", "tool": "tool", "observation": "tool", "function": "tool", "ipython": "tool",
}  # fmt: skip
SPEAKERS = re.compile(r"\n\n(Human|Assistant):")


class Sample(NamedTuple):
    """One conversation, which ends with an assistant's turn.

    label: the expert label of the row. rejected: of a pair, what stands in the other half in place of the messages from
    `shared` on. where: file and row.
    """

    messages: list[Message]
    tools: list[Any] | None = None
    label: str | None = None
    rejected: list[Message] | None = None
    shared: int = 0
    where: str = ""


class LeftOut(Exception):
    """A row that is sound and gives no sample; the argument says why, and is counted."""


class Malformed(Exception):
    """A row that is not of the format; the argument says what was found and expected."""


class Format(NamedTuple):
    """needs: columns that a row has, each one of several names. read: a row to a sample."""

    needs: tuple[tuple[str, ...], ...]
    read: Callable[[Row], Sample]

    def fits(self, row: Row) -> bool:
        """Whether a row has the columns."""
        return all(any(name in row for name in names) for names in self.needs)


def text(row: Row, *names: str, optional: bool = False) -> str:
    """The first of the columns that is there; "" for null. Malformed unless it is a string."""
    name = next((name for name in names if row.get(name) is not None), None)
    if name is None:
        if not optional and not any(name in row for name in names):
            raise Malformed(f"no field {' or '.join(map(repr, names))}")
        return ""
    if not isinstance(row[name], str):
        raise Malformed(f"field {name!r} is {type(row[name]).__name__}; expected a string")
    return row[name]


def filled(content: str, what: str) -> str:
    """The text; LeftOut when it is blank."""
    if not content.strip():
        raise LeftOut(f"empty {what}")
    return content


def said(role: str, content: str) -> Message:
    """One message."""
    return {"role": role, "content": content}


def expert_label(row: Row) -> str | None:
    """The column expert_label, if the row has it."""
    label = row.get("expert_label")
    return None if label is None or label == "" else str(label)


def alpaca(row: Row) -> Sample:
    """instruction, input, output or response; system and history as LLaMA-Factory has them (S0: "Input: " is added)."""
    instruction = filled(text(row, "instruction"), "instruction")
    given = text(row, "input", optional=True)
    answer = filled(text(row, "output", "response"), "response")
    system, history = text(row, "system", optional=True), row.get("history") or []
    turns = [said("system", system)] if system.strip() else []
    for pair in history:
        if not (isinstance(pair, Sequence) and len(pair) == 2 and all(isinstance(part, str) for part in pair)):
            raise Malformed("field 'history': expected a list of [prompt, answer]")
        turns += [said("user", pair[0]), said("assistant", pair[1])]
    prompt = f"{instruction}\n\nInput: {given}" if given.strip() else instruction
    return Sample([*turns, said("user", prompt), said("assistant", answer)], label=expert_label(row))


def sharegpt(row: Row) -> Sample:
    """conversations: [{from, value}]; a function_call is an assistant's tool call, an observation the tool's answer."""
    turns = messages_of(row["conversations"], "conversations", system=text(row, "system", optional=True))
    return Sample(ending_with_assistant(turns), tools_of(row), expert_label(row))


def messages(row: Row) -> Sample:
    """OpenAI's messages, with tools. A row that says label: false, as KTO has it, is no example to follow."""
    if row.get("label") is False:
        raise LeftOut("labelled false")
    return Sample(ending_with_assistant(messages_of(row["messages"], "messages")), tools_of(row), expert_label(row))


def question_answer(row: Row) -> Sample:
    """question and answer: a string, a list that is joined, a mapping with text (S1.34), or the number of one of
    `choices`. GSM8K and NQ are such."""
    answer, choices = row["answer"], row.get("choices")
    if isinstance(answer, int) and isinstance(choices, list) and 0 <= answer < len(choices):
        answer = choices[answer]
    if isinstance(answer, Mapping):
        answer = answer.get("text", answer.get("value"))
    if isinstance(answer, str | int | float):
        answer = str(answer)
    elif isinstance(answer, Sequence) and all(isinstance(part, str) for part in answer):
        answer = ", ".join(answer)
    else:
        raise Malformed(f"field 'answer' is {type(answer).__name__}; expected a string, a list or a mapping with text")
    question = filled(text(row, "question"), "question")
    return Sample([said("user", question), said("assistant", filled(answer, "answer"))], label=expert_label(row))


def prompt_completion(row: Row) -> Sample:
    """prompt and completion or response, each a string or a list of messages."""
    prompt = prompt_of(row)
    turns = [*prompt, *answer_of(row, "completion" if "completion" in row else "response")]
    return Sample(ending_with_assistant(turns), tools_of(row), expert_label(row))


def preference(row: Row) -> Sample:
    """prompt, chosen, rejected: strings or messages."""
    return pair(prompt_of(row), answer_of(row, "chosen"), answer_of(row, "rejected"), row)


def preference_sharegpt(row: Row) -> Sample:
    """conversations, and chosen and rejected turns."""
    system = text(row, "system", optional=True)
    prompt = messages_of(row["conversations"], "conversations", system=system)
    return pair(prompt, answer_of(row, "chosen"), answer_of(row, "rejected"), row)


def preference_orca(row: Row) -> Sample:
    """input: {messages}, preferred_output, non_preferred_output."""
    given = row["input"]
    prompt = messages_of(given.get("messages") if isinstance(given, Mapping) else given, "input")
    return pair(prompt, answer_of(row, "preferred_output"), answer_of(row, "non_preferred_output"), row)


def preference_hh(row: Row) -> Sample:
    """chosen and rejected: whole transcripts; the turns that they share are the prompt."""
    chosen, rejected = transcript(text(row, "chosen")), transcript(text(row, "rejected"))
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    return pair(chosen[:shared], chosen[shared:], rejected[shared:], row)


def pair(prompt: list[Message], chosen: list[Message], rejected: list[Message], row: Row) -> Sample:
    """A chosen and a rejected ending of one prompt; LeftOut when they are the same or one is empty."""
    endings = [ending_with_assistant([*prompt, *ending])[len(prompt) :] for ending in (chosen, rejected)]
    if not all(endings):
        raise LeftOut("no answer in one half of the pair")
    if not any(message["role"] == "user" for message in prompt):
        raise LeftOut("no prompt")
    if endings[0] == endings[1]:
        raise LeftOut("chosen and rejected are the same")
    return Sample([*prompt, *endings[0]], tools_of(row), expert_label(row), endings[1], len(prompt))


def prompt_of(row: Row) -> list[Message]:
    """The column prompt as messages, after system if there is one."""
    system = text(row, "system", optional=True)
    turns = [said("system", system)] if system.strip() else []
    if isinstance(row["prompt"], str):
        return [*turns, said("user", filled(row["prompt"], "prompt"))]
    return turns + messages_of(row["prompt"], "prompt")


def answer_of(row: Row, name: str) -> list[Message]:
    """A column that holds an answer as messages: a string, one turn, or a list of turns."""
    if name not in row:
        raise Malformed(f"no field {name!r}")
    given = row[name]
    if isinstance(given, str):
        return [said("assistant", filled(given, name))]
    return messages_of([given] if isinstance(given, Mapping) else given, name)


def messages_of(given: Any, name: str, system: str = "") -> list[Message]:
    """Turns of either spelling as messages. Malformed for what is none."""
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise Malformed(f"field {name!r} is {type(given).__name__}; expected a list of turns")
    turns = [said("system", system)] if system.strip() else []
    for number, turn in enumerate(given, 1):
        if not isinstance(turn, Mapping):
            raise Malformed(f"field {name!r}, turn {number} is {type(turn).__name__}; expected an object")
        speaker = turn.get("role", turn.get("from"))
        role = ROLES.get(str(speaker).lower())
        if role is None:
            raise Malformed(f"field {name!r}, turn {number}: role {speaker!r}; expected {', '.join(ROLES)}")
        turns.append(_message(turn, role, speaker == "function_call", f"field {name!r}, turn {number}"))
    return turns


def _message(turn: Row, role: str, is_call: bool, where: str) -> Message:
    content = turn.get("content", turn.get("value"))
    if isinstance(content, Sequence) and not isinstance(content, str):  # parts, as multimodal messages have them
        parts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
        texts = [part for part in parts if isinstance(part, str)]
        if len(texts) < len(parts):
            raise Malformed(f"{where}: a part that is no text")
        content = "".join(texts)
    calls = turn.get("tool_calls") or []
    if is_call:
        try:
            found = json.loads(content or "")
        except ValueError:
            raise Malformed(f"{where}: a function_call that is no JSON") from None
        calls = [{"type": "function", "function": call} for call in (found if isinstance(found, list) else [found])]
        content = ""
    if content is None and calls:
        content = ""
    if not isinstance(content, str):
        raise Malformed(f"{where}: content is {type(content).__name__}; expected a string")
    rest = {key: turn[key] for key in ("name", "tool_call_id", "reasoning_content") if turn.get(key) is not None}
    return said(role, content) | ({"tool_calls": calls} if calls else {}) | rest


def tools_of(row: Row) -> list[Any] | None:
    """The column tools, which may be JSON in a string; None when there are none."""
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools or "[]")
        except ValueError:
            raise Malformed("field 'tools' is a string that is no JSON") from None
    if tools is not None and not isinstance(tools, list):
        raise Malformed(f"field 'tools' is {type(tools).__name__}; expected a list")
    return tools or None


def ending_with_assistant(turns: list[Message]) -> list[Message]:
    """The turns up to the last of an assistant; LeftOut when none has one that says something after a user's."""
    last = max((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), default=-1)
    kept = turns[: last + 1]
    if not any(turn["content"].strip() or turn.get("tool_calls") for turn in kept if turn["role"] == "assistant"):
        raise LeftOut("no assistant turn")
    if not any(turn["role"] in ("user", "tool") and turn["content"].strip() for turn in kept):
        raise LeftOut("no user turn")
    return kept


def transcript(whole: str) -> list[Message]:
    """A conversation written as "\\n\\nHuman: ...\\n\\nAssistant: ..."."""
    parts = SPEAKERS.split("\n\n" + whole.lstrip())
    if len(parts) < 3 or parts[0].strip():
        raise Malformed("no transcript of Human: and Assistant: turns")
    names = {"Human": "user", "Assistant": "assistant"}
    return [said(names[name], content.strip()) for name, content in zip(parts[1::2], parts[2::2])]


FORMATS: dict[str, Format] = {
    "alpaca": Format((("instruction",), ("output", "response")), alpaca),
    "preference-orca": Format((("input",), ("preferred_output",), ("non_preferred_output",)), preference_orca),
    "preference-sharegpt": Format((("conversations",), ("chosen",), ("rejected",)), preference_sharegpt),
    "preference": Format((("prompt",), ("chosen",), ("rejected",)), preference),
    "preference-hh": Format((("chosen",), ("rejected",)), preference_hh),
    "sharegpt": Format((("conversations",),), sharegpt),
    "messages": Format((("messages",),), messages),
    "question-answer": Format((("question",), ("answer",)), question_answer),
    "prompt-completion": Format((("prompt",), ("completion", "response")), prompt_completion),
}
