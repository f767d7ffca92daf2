"""Two answers that people compared: SHP, PKU-SafeRLHF, OpenAI's summaries, Chatbot Arena; and lmsys-chat-1m."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from penchant.data.layouts import fields
from penchant.data.layouts.fields import LeftOut, RowError
from penchant.data.layouts.layout import Fields, Group, layout
from penchant.data.layouts.plain import all_answers, every_answer, scored_pair
from penchant.types import Message, PromptTree


@layout("shp")
def shp(row: Fields, options: Fields) -> PromptTree:
    """A post with two comments; the preferred one was written later and still has more votes."""
    better = "A" if fields.index(row, "labels") == 1 else "B"
    worse = "B" if better == "A" else "A"
    ratio = fields.score(row, "score_ratio")
    if ratio is None and options["min_score_ratio"] > 1:
        raise RowError('"score_ratio" is missing', "set data.layout_options.min_score_ratio=1, or drop the row")
    if ratio is not None and ratio < options["min_score_ratio"]:
        reason = f"a score ratio below {options['min_score_ratio']:g}"
        raise LeftOut(reason, "lower data.layout_options.min_score_ratio")
    chosen, rejected = fields.text(row, f"human_ref_{better}"), fields.text(row, f"human_ref_{worse}")
    scores = fields.score(row, f"score_{better}"), fields.score(row, f"score_{worse}")
    return scored_pair(fields.as_user_turn(fields.text(row, "history")), chosen, rejected, *scores)


@layout("pku_saferlhf")
def pku(row: Fields, options: Fields) -> PromptTree:
    """Two answers, one of them more helpful and one of them safer."""
    best = fields.index(row, f"{options['prefer']}_response_id")
    if options["chosen"] == "safe" and not fields.label(row, f"is_response_{best}_safe"):
        raise LeftOut("the preferred answer is unsafe", "keep it with data.layout_options.chosen=any")
    chosen, rejected = fields.text(row, f"response_{best}"), fields.text(row, f"response_{1 - best}")
    return scored_pair(fields.as_user_turn(fields.text(row, "prompt")), chosen, rejected, None, None)


@layout("tldr_comparisons", check=lambda row: fields.holds_list(row, "summaries", "text"))
def tldr(row: Fields, options: Fields) -> PromptTree:
    """Two summaries of a post (or an article), one of which was chosen."""
    info, summaries = fields.mapping(row, "info"), fields.items(row, "summaries")
    if len(summaries) != 2:
        raise RowError(f"there are {len(summaries)} summaries", "there must be two")
    texts = [fields.as_text(s.get("text") if isinstance(s, dict) else None, "a summary") for s in summaries]
    best = fields.index(row, "choice")
    min_confidence, extra = options["min_confidence"], row.get("extra")
    confidence = fields.finite(extra.get("confidence")) if isinstance(extra, dict) else None
    if min_confidence > 0 and (confidence is None or confidence < min_confidence):
        reason = "no confidence" if confidence is None else f"a confidence below {min_confidence:g}"
        raise LeftOut(f"the choice has {reason}", "lower data.layout_options.min_confidence")
    # a space before the answer, once: the prompt ends with "TL;DR:"
    chosen, rejected = (f" {texts[i].lstrip()}" for i in (best, 1 - best))
    return scored_pair(_tldr_prompt(info), chosen, rejected, None, None)


def _tldr_prompt(info: Fields) -> str:
    if info.get("post") is None:
        return f"TITLE: {fields.text(info, 'title')}\n\nARTICLE: {fields.text(info, 'article').strip()}\n\nTL;DR:"
    subreddit, title = fields.text(info, "subreddit"), fields.text(info, "title")
    return f"SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {fields.text(info, 'post').strip()}\n\nTL;DR:"


# ---- the arena of penchant studio ----

_TAKEN_BACK = "undo"


def _judgment_id(row: Fields) -> str:
    return fields.text(row, "id")


def _fold_verdicts(rows: Sequence[Fields]) -> Fields:
    """The first record of a judgment, with the verdict "undo" if any record of its id takes it back."""
    taken_back = any(row.get("verdict") == _TAKEN_BACK for row in rows)
    return {**rows[0], **({"verdict": _TAKEN_BACK} if taken_back else {})}


_ABOUT = (
    "id", "prompt", "model_a", "model_b", "sha256_a", "sha256_b", "left", "seconds", "order", "gold", "repeat_of", "reasons", "edited",
    "time",
)  # fmt: skip


@layout("studio", group=Group(_judgment_id, _fold_verdicts, _ABOUT))
def studio(row: Fields, options: Fields) -> PromptTree:
    """One person's verdict on two answers."""
    verdict = row.get("verdict")
    verdict = verdict if isinstance(verdict, str) else ""
    reason = {"skip": "skipped", _TAKEN_BACK: "taken back"}.get(verdict)
    if row.get("gold") is not None:
        reason = reason or "a check with a known answer"
    elif row.get("repeat_of") is not None:
        reason = reason or "a repetition of an earlier pair"
    if reason is not None:
        raise LeftOut(reason, f"{fields.NOTHING_WRONG}; it is not a preference by itself")
    if verdict in ("tie", "both_bad"):
        raise _tie_error(verdict, options)
    if verdict not in ("a", "b"):
        raise RowError('"verdict" is none', "it must be one of a, b, tie, both_bad, skip, undo")
    better, worse = ("answer_a", "answer_b") if verdict == "a" else ("answer_b", "answer_a")
    edited = row.get("edited") if options["edited"] == "use" else None
    chosen = fields.as_text(edited, '"edited"') if edited is not None else fields.text(row, better)
    return scored_pair(fields.prompt(row), chosen, fields.text(row, worse), None, None)


# ---- Chatbot Arena and lmsys-chat-1m ----

WINNERS = {"model_a": 0, "model_b": 1}
TIES = frozenset({"tie", "tie (bothbad)", "both_bad"})


@layout("arena")
def arena(row: Fields, options: Fields) -> PromptTree:
    """Conversations with two models and the same user turns, one of which was voted better."""
    winner = row.get("winner")
    if isinstance(winner, str) and winner in TIES:
        raise _tie_error(winner, options)
    if not isinstance(winner, str) or winner not in WINNERS:
        raise RowError('"winner" names no model', f"it must be one of {', '.join((*WINNERS, *sorted(TIES)))}")
    sides = fields.messages(row, "conversation_a"), fields.messages(row, "conversation_b")
    return _arena_pair(sides, WINNERS[winner], options)


@layout("arena_55k")
def arena_55k(row: Fields, options: Fields) -> PromptTree:
    """Like `arena`, with prompts and answers as JSON lists in strings and the vote in three columns."""
    votes = [fields.index(row, f"winner_{n}") for n in ("model_a", "model_b", "tie")]
    if sum(votes) != 1:
        raise RowError("the three winner columns do not name one outcome", "one of them must be 1, the others 0")
    if votes[2]:
        raise _tie_error("tie", options)
    prompts, a, b = (_texts(row, n) for n in ("prompt", "response_a", "response_b"))
    if not len(prompts) == len(a) == len(b):
        raise RowError(
            f"{len(prompts)} prompts have {len(a)} and {len(b)} answers",
            "there must be one for each",
        )
    sides = tuple(
        tuple(m for q, r in zip(prompts, answers, strict=True) for m in (Message("user", q), Message("assistant", r)))
        for answers in (a, b)
    )
    return _arena_pair((sides[0], sides[1]), votes[1], options)


def _texts(row: Fields, name: str) -> list[str]:
    value = row.get(name)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise RowError(f'"{name}" is not a JSON list of texts', 'write ["...", "..."]') from error
    if not isinstance(value, list) or not value:
        raise RowError(f'"{name}" is not a list of texts', 'write ["...", "..."]')
    return [fields.as_text(v, f'"{name}"[{i}]') for i, v in enumerate(value)]


def _tie_error(winner: str, options: Fields) -> RowError:
    reason = "both are bad" if "bad" in winner else "a tie"
    if options["ties"] == "leave_out":
        return LeftOut(reason, f"{fields.NOTHING_WRONG}; it has no better answer")
    return RowError(reason, "leave it out with data.layout_options.ties=leave_out")


def _arena_pair(sides: tuple[tuple[Message, ...], tuple[Message, ...]], best: int, options: Fields) -> PromptTree:
    if options["turns"] == "first":
        sides = _up_to_first_answer(sides[0], "conversation_a"), _up_to_first_answer(sides[1], "conversation_b")
    a, b = fields.last_answer_tree(sides[0], "conversation_a"), fields.last_answer_tree(sides[1], "conversation_b")
    if a.prompt != b.prompt:
        how = "set data.layout_options.turns=first to compare their first answers"
        raise LeftOut("the two conversations differ before their last answer", how)
    return scored_pair(a.prompt, sides[best][-1], sides[1 - best][-1], None, None)


def _up_to_first_answer(messages: tuple[Message, ...], name: str) -> tuple[Message, ...]:
    """A conversation up to its first answer."""
    for i, turn in enumerate(messages):
        if turn.role == "assistant" and i:
            return messages[: i + 1]
    raise RowError(f'"{name}" holds no answer', "drop the row")


@layout("lmsys", check=lambda row: fields.holds_list(row, "conversation", "role"))
def lmsys(row: Fields, options: Fields) -> tuple[PromptTree, ...]:
    """A conversation with a model, used as one answer, every answer or a prompt (option `use`)."""
    messages = fields.messages(row, "conversation")
    trees = _USES[options["use"]](messages)
    if not trees:
        raise RowError('"conversation" holds no answer to a question', "drop the row")
    return trees


def _prompt_tree(messages: tuple[Message, ...], turn_index: int) -> tuple[PromptTree, ...]:
    user_turns = [i for i, m in enumerate(messages) if m.role == "user"]
    return (PromptTree(messages[: user_turns[turn_index] + 1], ()),) if user_turns else ()


_USES: dict[str, Any] = {
    "sft": lambda messages: (fields.last_answer_tree(messages, "conversation"),),
    "all_turns": lambda messages: tuple(
        all_answers(messages, [len(t.prompt) for t in trees]) for trees in [every_answer(messages)] if trees
    ),
    "every_turn": every_answer,
    "first_turn": lambda messages: every_answer(messages)[:1],
    "prompts": lambda messages: _prompt_tree(messages, -1),
    "first_prompt": lambda messages: _prompt_tree(messages, 0),
}
