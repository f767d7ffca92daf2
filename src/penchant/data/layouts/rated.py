"""Answers with ratings: UltraFeedback, HelpSteer, distilabel and Argilla."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from penchant.data.layouts import fields
from penchant.data.layouts.fields import LeftOut, RowError
from penchant.data.layouts.layout import Fields, layout
from penchant.data.layouts.plain import CHOSEN_SCORES, from_pairs, pair, scored_pair
from penchant.types import Completion, Message, Prompt, PromptTree

ASPECTS = ("helpfulness", "honesty", "instruction_following", "truthfulness")
ATTRIBUTES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
_SPLIT = re.compile(r"\s*<extra_id_1>(User|Assistant)\n")
_GENERATION = re.compile(r"generations-(\d+)")
RATE = "rate it, or drop the row"


def ranked_tree(prompt: Prompt, answers: Sequence[tuple[str, float]]) -> PromptTree:
    """One prompt with all its answers, best first, so that SFT learns the best one."""
    best_first = sorted(answers, key=lambda a: -a[1])
    return PromptTree(prompt, tuple(Completion(text, score=score) for text, score in best_first))


# ---- UltraFeedback ----


@layout("ultrafeedback", check=lambda row: fields.holds_list(row, "completions", "response"))
def ultrafeedback(row: Fields, options: Fields) -> PromptTree:
    """One tree with all answers of an instruction, each with its score."""
    answers = []
    for i, answer in enumerate(fields.items(row, "completions")):
        place = f'"completions"[{i}]'
        if not isinstance(answer, Mapping):
            raise RowError(f"{place} is not an object", 'write {"response": "...", "annotations": {...}}')
        text = fields.as_text(answer.get("response"), f'the "response" of {place}')
        answers.append((text, _rating(answer, options, place)))
    return ranked_tree((Message("user", fields.text(row, "instruction")),), answers)


def _rating(answer: Mapping[str, Any], options: Fields, what: str) -> float:
    score = _RATINGS[options["score"]](answer)
    if score is None:
        how = f"choose another data.layout_options.score, or {RATE}"
        raise RowError(f"{what} has no rating ({options['score']})", how)
    return score


def _aspect(name: str) -> Any:
    def read(answer: Mapping[str, Any]) -> float | None:
        annotations = answer.get("annotations")
        annotation = annotations.get(name) if isinstance(annotations, Mapping) else None
        if isinstance(annotation, list):  # the published JSON wraps some of them in a list of one
            annotation = annotation[0] if annotation else None
        return fields.finite(annotation.get("Rating")) if isinstance(annotation, Mapping) else None

    return read


def _fine_grained_score(answer: Mapping[str, Any]) -> float | None:
    score = fields.finite(answer.get("fine-grained_score"))
    if score is not None:
        return score
    ratings = [r for r in (_aspect(a)(answer) for a in ASPECTS) if r is not None]
    return sum(ratings) / len(ratings) if ratings else None


_RATINGS: dict[str, Any] = {
    "fine": _fine_grained_score,
    "overall": lambda answer: fields.finite(answer.get("overall_score")),
    **{a: _aspect(a) for a in ASPECTS},
}


@layout("ultrafeedback_binarized")
def binarized(row: Fields, options: Fields) -> PromptTree:
    """A pair, or the conversation of the messages column (option `use`)."""
    if options["use"] == "pairs":
        return from_pairs(row)
    return fields.last_answer_tree(fields.messages(row, "messages"), "messages")


# ---- HelpSteer ----


def helpsteer_prompt(text: str) -> tuple[Message, ...]:
    """A HelpSteer prompt: later turns follow <extra_id_1>Assistant and <extra_id_1>User lines."""
    parts = _SPLIT.split(text)
    names = ["User", *parts[1::2]]
    turns = tuple(
        Message(name.lower(), fields.as_text(content, f"turn {i + 1} of the prompt").strip())
        for i, (name, content) in enumerate(zip(names, parts[::2], strict=True))
    )
    if turns[-1].role != "user":
        raise RowError('"prompt" does not end with a user turn', "drop the row")
    return turns


@layout("helpsteer")
def helpsteer(row: Fields, options: Fields) -> PromptTree:
    """An answer with one attribute, or a weighted mean of all, as its score."""
    if options["attribute"] == "mean":
        weights = {a: options[f"weight_{a}"] for a in ATTRIBUTES}
        total = sum(abs(w) for w in weights.values())
        if not total:
            raise RowError("all weights are 0", "give data.layout_options one that is not")
        score = sum(w * fields.number(row, a) for a, w in weights.items() if w) / total
    else:
        score = fields.number(row, options["attribute"])
    prompt = helpsteer_prompt(fields.text(row, "prompt"))
    return PromptTree(prompt, (Completion(fields.text(row, "response"), score=score),))


@layout("helpsteer2_pairs")
def helpsteer2_pairs(row: Fields, options: Fields) -> PromptTree:
    """Two answers and how much better one is, from -3 (the first) to 3 (the second)."""
    prompt = helpsteer_prompt(fields.text(row, "prompt"))
    answers = fields.text(row, "response_1"), fields.text(row, "response_2")
    return _by_strength(prompt, answers, fields.number(row, "preference_strength"), options)


@layout("helpsteer3_pairs")
def helpsteer3_pairs(row: Fields, options: Fields) -> PromptTree:
    """A conversation, two answers and how much better one is."""
    answers = fields.text(row, "response1"), fields.text(row, "response2")
    strength = fields.number(row, "overall_preference")
    return _by_strength(fields.messages(row, "context"), answers, strength, options)


def _by_strength(prompt: Prompt, answers: tuple[str, str], strength: float, options: Fields) -> PromptTree:
    if strength == 0:
        raise LeftOut("neither answer is preferred", f"{fields.NOTHING_WRONG}; it has no better answer")
    if abs(strength) < options["min_strength"]:
        raise LeftOut(f"a preference weaker than {options['min_strength']:g}", "lower data.layout_options.min_strength")
    chosen, rejected = answers if strength < 0 else answers[::-1]
    return scored_pair(prompt, chosen, rejected, None, None)


# ---- Distilabel and Argilla ----


@layout("distilabel", check=lambda row: ("instruction" in row or "messages" in row) and "chosen" not in row)
def distilabel(row: Fields) -> PromptTree:
    """An instruction with generations and their ratings."""
    generations, ratings = fields.items(row, "generations"), fields.items(row, "ratings")
    if len(generations) != len(ratings):
        raise RowError(f"{len(generations)} generations have {len(ratings)} ratings", "give each generation one")
    answers = []
    for i, (text, rating) in enumerate(zip(generations, ratings, strict=True)):
        score = fields.finite(rating)
        if score is None:
            raise RowError(f'"ratings"[{i}] is {fields.shown(rating)!r}', RATE)
        answers.append((fields.as_text(text, f'"generations"[{i}]'), score))
    if fields.holds_list(row, "messages", "role"):
        return ranked_tree(fields.messages(row, "messages"), answers)
    return ranked_tree(fields.as_user_turn(fields.text(row, "instruction")), answers)


@layout("ranked", check=lambda row: any(isinstance(row.get(n), list) for n in ("scores", "ranks")))
def from_ranked(row: Fields) -> PromptTree:
    """A prompt with a list of completions, and a list of their scores (higher is better) or ranks (1 is best)."""
    name = "scores" if row.get("scores") is not None else "ranks"
    answers, values = fields.items(row, "completions"), fields.items(row, name)
    if len(answers) != len(values):
        raise RowError(f"{len(answers)} completions have {len(values)} {name}", "give each completion one")
    scores = [fields.finite(value) for value in values]
    for i, score in enumerate(scores):
        if score is None:
            raise RowError(f'"{name}"[{i}] is {fields.shown(values[i])!r}', RATE)
    texts = [fields.as_text(text, f'"completions"[{i}]') for i, text in enumerate(answers)]
    sign = 1.0 if name == "scores" else -1.0
    return ranked_tree(fields.prompt(row), [(t, sign * s) for t, s in zip(texts, scores, strict=True) if s is not None])


@layout("argilla_ratings")
def argilla_ratings(row: Fields, options: Fields) -> PromptTree:
    """A record with generations-0, generations-1, ... and their ratings by people or a model."""
    names = sorted((n for n in row if _GENERATION.fullmatch(n) and row[n]), key=lambda n: int(n.split("-")[1]))
    answers = [(fields.text(row, n), _argilla_rating(row, f"{n}-rating", options["rated_by"])) for n in names]
    return ranked_tree(fields.as_user_turn(fields.text(row, "instruction")), answers)


def _argilla_rating(row: Fields, question: str, rated_by: str) -> float:
    people = _mean_submitted(row, question)
    model = fields.finite(row.get(f"{question}.suggestion"))
    rating = {"people": people, "model": model, "either": people if people is not None else model}[rated_by]
    if rating is None:
        raise RowError(f'"{question}" has no {_RATED_BY[rated_by]}', "choose data.layout_options.rated_by, or " + RATE)
    return rating


_RATED_BY = {"people": "submitted response", "model": "suggestion", "either": "response and no suggestion"}


def _mean_submitted(row: Fields, question: str) -> float | None:
    """The mean of the submitted responses; drafts and discarded ones do not count."""
    values, status = row.get(f"{question}.responses"), row.get(f"{question}.responses.status")
    if not isinstance(values, list):
        return None
    states = status if isinstance(status, list) and len(status) == len(values) else ["submitted"] * len(values)
    ratings = [fields.finite(v) for v, s in zip(values, states, strict=True) if s == "submitted"]
    valid = [r for r in ratings if r is not None]
    return sum(valid) / len(valid) if valid else None


@layout("argilla_pairs", check=lambda row: {"chosen_response", "rejected_response"} <= row.keys() or _has_rating(row))
def argilla_pairs(row: Fields) -> PromptTree:
    """A better and a worse answer with their ratings, under any of the names that Argilla's data sets use."""
    if "chosen_response" in row:
        question = fields.text(row, "instruction" if "instruction" in row else "prompt")
        chosen, rejected = fields.text(row, "chosen_response"), fields.text(row, "rejected_response")
        return pair(fields.as_user_turn(question), chosen, rejected, row)
    return from_pairs(row)


def _has_question(row: Fields) -> bool:
    has_question = "question" in row or "input" in row
    return has_question and not {"prompt", "instruction"} & row.keys() and isinstance(row["chosen"], str)


@layout("orca_pairs", check=_has_question)
def orca_pairs(row: Fields, options: Fields) -> PromptTree:
    """A question with a system prompt, a better and a worse answer."""
    if row.get("status") == "tie" and options["ties"] == "leave_out":
        raise LeftOut("a tie", f"{fields.NOTHING_WRONG}; keep it with data.layout_options.ties=keep")
    question = fields.text(row, "question" if "question" in row else "input")
    return pair(fields.as_user_turn(question), fields.text(row, "chosen"), fields.text(row, "rejected"), row)


def _has_rating(row: Fields) -> bool:
    return {"chosen", "rejected"} <= row.keys() and bool(set(CHOSEN_SCORES[2:]) & row.keys())
