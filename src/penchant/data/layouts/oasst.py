"""OpenAssistant: message trees, nested or as flat rows of messages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from penchant.data.layouts import fields
from penchant.data.layouts.fields import LeftOut, RowError
from penchant.data.layouts.layout import Fields, Group, layout
from penchant.types import Completion, Message, PromptTree

_NAMES = {"prompter": "user", "assistant": "assistant"}


def fold(rows: Sequence[Fields]) -> Fields:
    """Nest the flat messages of one tree."""
    nodes: dict[str, dict[str, Any]] = {}
    for row in rows:
        message_id = fields.as_text(row.get("message_id"), '"message_id"')
        if message_id in nodes:
            raise RowError(f"the message {fields.shown(message_id)} is listed twice", "drop one of them")
        nodes[message_id] = {**row, "replies": []}
    roots = []
    for node in nodes.values():
        parent = node.get("parent_id")
        if parent is None or parent == "":
            roots.append(node)
        elif isinstance(parent, str) and parent in nodes:
            nodes[parent]["replies"].append(node)
        else:
            raise RowError(f"the parent {fields.shown(parent)} of a message is not in its tree", "give the whole tree")
    if len(roots) != 1:
        raise RowError(f"the tree has {len(roots)} messages without a parent", "there must be one")
    return {"message_tree_id": rows[0].get("message_tree_id"), "prompt": roots[0]}


def _key(row: Fields) -> str:
    return fields.as_text(row.get("message_tree_id"), '"message_tree_id"')


@layout("oasst_flat", group=Group(_key, fold, ("rank", "deleted")))
@layout("oasst", check=lambda row: isinstance(row["prompt"], Mapping))
def oasst(row: Fields, options: Fields) -> tuple[PromptTree, ...]:
    """A prompt tree for each prompt of a message tree that has the answers that `use` asks for."""
    trees = tuple(
        tree
        for path, replies in _prompts_with_replies(fields.mapping(row, "prompt"))
        for tree in _USES[options["use"]](path, replies)
    )
    if not trees:
        raise LeftOut(_NOTHING[options["use"]], f"{fields.NOTHING_WRONG}; choose another data.layout_options.use")
    return trees


def _prompts_with_replies(root: Mapping[str, Any]) -> Iterator[tuple[tuple[Message, ...], list[Mapping[str, Any]]]]:
    """Each prompt of a tree: the messages up to it, and the replies to it that are not deleted. Iterative, for deep trees."""
    stack: list[tuple[tuple[Message, ...], Mapping[str, Any]]] = [((), root)]
    while stack:
        before, node = stack.pop()
        if node.get("deleted") is True:
            continue
        path = (*before, _message(node))
        replies = [r for r in _replies(node) if r.get("deleted") is not True]
        if path[-1].role == "user" and replies:
            for reply in replies:
                _message(reply)
            yield path, replies
        stack += [(path, r) for r in reversed(replies)]


def _message(node: Mapping[str, Any]) -> Message:
    role = node.get("role")
    if not isinstance(role, str) or role not in _NAMES:
        raise RowError(f"a message has the role {fields.shown(role)!r}", "it must be prompter or assistant")
    return Message(_NAMES[role], fields.as_text(node.get("text"), "a message"))


def _replies(node: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    replies = node.get("replies")
    if not replies:
        return []
    if not isinstance(replies, list) or not all(isinstance(r, Mapping) for r in replies):
        raise RowError('"replies" is not a list of messages', "write [{...}, ...]")
    return replies


def _ranked(replies: Sequence[Mapping[str, Any]]) -> list[tuple[float, str]]:
    """(rank, text) of the ranked answers, best first; rank 0 is the best."""
    answers = [(fields.finite(r.get("rank")), r["text"]) for r in replies if r.get("role") == "assistant"]
    return sorted(((rank, text) for rank, text in answers if rank is not None), key=lambda r: r[0])


def _pair(path: tuple[Message, ...], better: tuple[float, str], worse: tuple[float, str]) -> PromptTree:
    return PromptTree(path, (Completion(better[1], True), Completion(worse[1], False)))


def _best_worst(path: tuple[Message, ...], replies: Sequence[Mapping[str, Any]]) -> list[PromptTree]:
    ranked = _ranked(replies)
    return [_pair(path, ranked[0], ranked[-1])] if ranked and ranked[0][0] < ranked[-1][0] else []


def _adjacent_pairs(path: tuple[Message, ...], replies: Sequence[Mapping[str, Any]]) -> list[PromptTree]:
    return [_pair(path, a, b) for a, b in pairwise(_ranked(replies)) if a[0] < b[0]]


def _scored(path: tuple[Message, ...], replies: Sequence[Mapping[str, Any]]) -> list[PromptTree]:
    ranked = _ranked(replies)
    if len(ranked) < 2:
        return []
    return [PromptTree(path, tuple(Completion(text, score=0.0 - rank) for rank, text in ranked))]


def _best(path: tuple[Message, ...], replies: Sequence[Mapping[str, Any]]) -> list[PromptTree]:
    answers = [r["text"] for r in replies if r.get("role") == "assistant"]
    ranked = _ranked(replies)
    best = ranked[0][1] if ranked else answers[0] if len(answers) == 1 else None
    return [PromptTree(path, (Completion(best),))] if best is not None else []


_USES: dict[str, Any] = {"pairs": _best_worst, "neighbours": _adjacent_pairs, "scored": _scored, "sft": _best}
_UNRANKED = "a message tree without two ranked answers to one prompt"
_NOTHING = {"pairs": _UNRANKED, "neighbours": _UNRANKED, "scored": _UNRANKED, "sft": "a message tree without an answer"}
