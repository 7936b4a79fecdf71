"""OASST: trees of messages, flat (one row a message) or nested (one row a tree), to conversations.

A tree gives one sample: from its root along the best reply of each turn, rank 0 first (unranked replies last, then the
order of the file), to the last assistant's message. Deleted messages, those that failed review and those whose parent
is not there are left out, with all that follows them, and counted.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from moe_engine.prepare.sample_formats import ROLES, LeftOut, Malformed, Message, Sample, ending_with_assistant, said

FLAT = ("message_id", "parent_id", "text", "role")
NESTED = ("prompt", "message_tree_id")


def tree(row: Mapping[str, Any]) -> Sample:
    """A row that holds a whole tree; messages that are left out of it are not rows, and are not counted."""
    root = row["prompt"]
    if not isinstance(root, Mapping):
        raise Malformed(f"field 'prompt' is {type(root).__name__}; expected a message with its replies")
    turns: list[Message] = []
    node: Mapping[str, Any] | None = root
    while node is not None:
        if reason := unusable(node):
            break
        turns.append(message_of(node))
        replies = [reply for reply in node.get("replies") or [] if isinstance(reply, Mapping) and not unusable(reply)]
        node = min(replies, key=rank_of, default=None)
    if not turns:
        raise LeftOut(reason or "empty tree")
    return Sample(ending_with_assistant(turns))


def flat(rows: Iterable[Mapping[str, Any]]) -> tuple[list[Sample], Counter[str]]:
    """The samples of all trees, in the order of their roots, and why messages are in none of them.

    Every message counts once: those of the samples as "in a sample".
    """
    nodes, children, reasons = {}, dict[Any, list[Mapping[str, Any]]](), Counter[str]()
    for row in rows:
        if reason := unusable(row):
            reasons[reason] += 1
        else:
            nodes[row["message_id"]] = row
            children.setdefault(row.get("parent_id"), []).append(row)
    samples, reached = [], 0
    for root in children.get(None, []):
        reached += sum(1 for _ in _below(root, children))
        turns, node = [], root
        while node is not None:
            turns.append(message_of(node))
            node = min(children.get(node["message_id"], []), key=rank_of, default=None)
        try:
            sample = Sample(ending_with_assistant(turns))
        except LeftOut as reason:
            reasons[str(reason)] += len(turns)
        else:
            samples.append(sample)
            reasons["in a sample"] += len(sample.messages)
            reasons["after the last answer"] += len(turns) - len(sample.messages)
        reasons["another reply is better"] += sum(1 for _ in _below(root, children)) - len(turns)
    reasons["its parent is not there"] += len(nodes) - reached
    return samples, +reasons


def _below(node: Mapping[str, Any], children: Mapping[Any, list[Mapping[str, Any]]]) -> Iterator[Mapping[str, Any]]:
    """A message and all that follow it."""
    todo = [node]
    while todo:
        yield (first := todo.pop())
        todo += children.get(first["message_id"], [])


def unusable(node: Mapping[str, Any]) -> str | None:
    """Why a message may not be used."""
    if node.get("deleted"):
        return "deleted"
    if node.get("review_result") is False:
        return "failed review"
    return None if isinstance(node.get("text"), str) and node["text"].strip() else "empty"


def rank_of(node: Mapping[str, Any]) -> float:
    """Of replies to one message, the lowest is the best; the first of equals wins."""
    rank = node.get("rank")
    return float(rank) if isinstance(rank, int | float) else float("inf")


def message_of(node: Mapping[str, Any]) -> Message:
    """One message; Malformed for an unknown role."""
    role = ROLES.get(str(node.get("role")))
    if role is None:
        raise Malformed(f"role {node.get('role')!r}; expected prompter or assistant")
    return said(role, node["text"])
