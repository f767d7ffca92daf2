"""The plain layouts: pairs, labeled and scored answers, demonstrations, messages, prompts, text."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from penchant.data.layouts import fields
from penchant.data.layouts.fields import LeftOut, RowError
from penchant.data.layouts.layout import Fields, layout
from penchant.types import Completion, Message, Prompt, PromptTree

# columns that show that a row has answers, so it is not just a prompt or text
ANSWERS = {
    "chosen", "rejected", "completion", "completions", "response", "output", "answer", "messages", "conversations",
    "response_0", "response_1", "response_2", "response_a", "response_b", "response1", "chosen_response", "generations",
}  # fmt: skip
# names of a pair's two scores in published files
CHOSEN_SCORES = ["chosen_score", "score_chosen", "chosen_rating", "chosen-rating", "rating_chosen", "chosen_avg_rating"]
REJECTED_SCORES = [n.replace("chosen", "rejected") for n in CHOSEN_SCORES]


def _is_pair(row: Fields) -> bool:
    return "prompt" in row or fields.holds_list(row, "chosen", "role")


@layout("pairs", check=_is_pair)
def from_pairs(row: Fields) -> PromptTree:
    """prompt/chosen/rejected, each as text or as chat messages; messages may hold the whole conversation."""
    if isinstance(row.get("chosen"), str):
        return pair(fields.prompt(row), fields.text(row, "chosen"), fields.text(row, "rejected"), row)
    if not isinstance(row.get("chosen"), list):
        fields.text(row, "chosen")  # raises a RowError that says what is wrong
    sides = fields.messages(row, "chosen"), fields.messages(row, "rejected")
    before_chosen, chosen = fields.split_last_answer(sides[0], "chosen")
    before_rejected, rejected = fields.split_last_answer(sides[1], "rejected")
    fields.reject_consecutive_answers(before_chosen, "chosen")
    fields.reject_consecutive_answers(before_rejected, "rejected")
    if before_chosen != before_rejected:
        return _multi_turn_pair(row, sides)
    return pair(fields.join_prompt(row, before_chosen), chosen, rejected, row)


def _multi_turn_pair(row: Fields, sides: tuple[tuple[Message, ...], tuple[Message, ...]]) -> PromptTree:
    """A pair of conversations that differ in several turns; all answers are trained on from the first that differs."""
    first_difference = next(i for i, (a, b) in enumerate(itertools.zip_longest(*sides)) if a != b)
    differing = [turns[first_difference] if first_difference < len(turns) else None for turns in sides]
    if any(m is None or m.role != "assistant" for m in differing):
        what = "the conversations before the two answers differ, first in what is said to the assistant"
        raise RowError(what, "both must answer the same prompt")
    prompt = fields.join_prompt(row, sides[0][:first_difference]) if first_difference else fields.prompt(row)
    tree = pair(prompt, sides[0][first_difference], sides[1][first_difference], row)
    completions = []
    for name, answer, turns in zip(("chosen", "rejected"), tree.completions, sides, strict=True):
        raw_turns = fields.raw_turns(row, name)
        trained = [m.role == "assistant" and fields.is_trained(raw) for m, raw in zip(turns, raw_turns, strict=True)]
        if not (trained[first_difference] and trained[-1]):
            raise LeftOut(f'an answer of "{name}" that is compared has weight 0', fields.NOTHING_WRONG)
        more = tuple(replace(m, trained=is_learned) for m, is_learned in zip(turns, trained, strict=True))[
            first_difference + 1 :
        ]
        completions.append(replace(answer, more=more))
    return replace(tree, completions=tuple(completions))


def are_transcripts(row: Fields) -> bool:
    """Whether a row holds two whole transcripts as in hh-rlhf (see `hh`)."""
    chosen = row["chosen"]
    return "prompt" not in row and isinstance(chosen, str) and chosen.lstrip().startswith("Human:")


def _shares_start(row: Fields) -> bool:
    prompt_columns = {"prompt", "instruction", "question", "input", "conversations", "messages"}
    return (
        not prompt_columns & row.keys()
        and isinstance(row["chosen"], str)
        and not are_transcripts(row)
        and not any(_may_be_prompt(name, value) for name, value in row.items())
    )


# names of metadata columns, which are not part of the text
_ABOUT = re.compile(
    r"chosen.*|rejected.*|.*_(chosen|rejected)|.*_?id|source|origin|dataset|language|lang|split|subset|category|domain|topic|"
    r"task|type|model|.*_model|url|link|license|date|.*time(stamp)?|system|system_prompt",
    re.IGNORECASE,
)


def _may_be_prompt(name: str, value: object) -> bool:
    """Whether a column beside two answers may be their prompt: any text that is neither a number nor metadata."""
    is_text = isinstance(value, str) and bool(value.strip()) and fields.finite(value) is None
    return is_text and not _ABOUT.fullmatch(name)


@layout("implicit_pairs", check=_shares_start)
def from_implicit_pairs(row: Fields) -> PromptTree:
    """chosen/rejected texts with a common prefix: the prompt is that prefix up to its last white space."""
    chosen, rejected = fields.text(row, "chosen"), fields.text(row, "rejected")
    if chosen == rejected:
        raise RowError('"chosen" equals "rejected"', "drop the row")
    shorter = min(len(chosen), len(rejected))
    shared = chosen[: next((i for i in range(shorter) if chosen[i] != rejected[i]), shorter)]
    word = "" if not shared or shared[-1].isspace() else shared.split()[-1]  # the shared start of a word
    prompt = shared[: len(shared) - len(word)].rstrip()  # the space belongs to the answer
    if not prompt:
        raise RowError('"chosen" and "rejected" share no start that could be the prompt', 'give a "prompt" column')
    good = fields.as_text(chosen[len(prompt) :], "the chosen answer")
    return pair(prompt, good, fields.as_text(rejected[len(prompt) :], "the rejected answer"), row)


def answer_field(row: Fields, name: str) -> fields.Answer:
    """An answer: text, or one assistant message."""
    if not isinstance(row.get(name), Mapping):
        return fields.text(row, name)
    message = fields.as_message(row[name], f'"{name}"')
    if message.role != "assistant":
        raise RowError(f'"{name}" is a turn of the {message.role}', "the answer must be an assistant turn")
    return message


@layout("sft", check=lambda row: not {"label", "score"} & row.keys())
def from_sft(row: Fields) -> PromptTree:
    """prompt/completion, as text or as messages; or instruction (+ input) with output."""
    if "instruction" in row and "prompt" not in row:
        return from_alpaca(row)
    if isinstance(row.get("completion"), list):
        before, answer = fields.split_last_answer(fields.messages(row, "completion"), "completion")
        return PromptTree(fields.join_prompt(row, before), (fields.completion(answer),))
    return PromptTree(fields.prompt(row), (Completion(fields.text(row, "completion")),))


def from_alpaca(row: Fields) -> PromptTree:
    """instruction (+ input, system, history) with output."""
    return PromptTree(instruction_prompt(row), (Completion(fields.text(row, "output")),))


@layout("messages", check=lambda row: not {"chosen", "rejected", "rejected_response", "kto_tag", "label"} & row.keys())
def messages(row: Fields, options: Fields) -> tuple[PromptTree, ...]:
    """One conversation as its last answer, all its answers in one tree, or a tree for each answer (option `turns`)."""
    turns = conversation(row)
    # also checks that the conversation ends with an answer
    last = fields.last_answer_tree(turns, conversation_name(row))
    if options["turns"] == "last":
        return (last,)
    raw_turns = fields.raw_turns(row, conversation_name(row))
    offset = len(turns) - len(raw_turns)  # the system prompt of a column
    for turn in raw_turns:
        if fields.as_message(turn, "a turn").role == "assistant":
            fields.reject_rated(turn, " of a turn")
    trees = tuple(t for t in every_answer(turns) if fields.is_trained(raw_turns[len(t.prompt) - offset]))
    if not trees:
        raise LeftOut("all its answers have weight 0: they are not to be learned", fields.NOTHING_WRONG)
    return trees if options["turns"] == "every" else (all_answers(turns, [len(t.prompt) for t in trees]),)


def conversation_name(row: Fields) -> str:
    """The name of the column with the conversation."""
    return "messages" if "messages" in row else "conversations"


def conversation(row: Fields) -> tuple[Message, ...]:
    """All turns of a row's conversation, starting with its system prompt."""
    return fields.with_system(row, fields.messages(row, conversation_name(row)))


def all_answers(messages: tuple[Message, ...], answer_indices: Sequence[int]) -> PromptTree:
    """One tree that trains on the answers of a conversation at `answer_indices` (ascending)."""
    first, last = answer_indices[0], answer_indices[-1]
    more = tuple(replace(m, trained=i in answer_indices) for i, m in enumerate(messages[: last + 1]))[first + 1 :]
    return PromptTree(messages[:first], (replace(fields.completion(messages[first]), more=more),))


def every_answer(messages: tuple[Message, ...]) -> tuple[PromptTree, ...]:
    """One tree per assistant turn that follows a user or tool turn."""
    return tuple(
        PromptTree(messages[:i], (fields.completion(turn),))
        for i, turn in enumerate(messages)
        if i and turn.role == "assistant" and messages[i - 1].role in ("user", "tool")
    )


_SEVERAL = re.compile(
    r"(answer|response|completion|reply|replie|candidate|output|generation)(s|s?[-_ ]?(\d+|[a-z]))|ranking|rankings",
    re.I,
)


def has_several_answers(row: Fields) -> bool:
    """Whether a row of no known layout has a prompt and several answers to it, or a ranking of them."""
    return "prompt" in row and any(_SEVERAL.fullmatch(n) and v not in (None, "", []) for n, v in row.items())


def _is_prompt_only(row: Fields) -> bool:
    return not ANSWERS & row.keys() and isinstance(row["prompt"], (str, list)) and not has_several_answers(row)


@layout("prompts", check=_is_prompt_only)
def from_prompts(row: Fields) -> PromptTree:
    """A prompt alone, for online methods that sample their own completions."""
    return PromptTree(fields.prompt(row), ())


@layout("text", check=lambda row: not (ANSWERS | {"prompt", "instruction", "message_id"}) & row.keys())
def from_text(row: Fields) -> PromptTree:
    """Plain text: an empty prompt, the document as completion."""
    return PromptTree("", (Completion(fields.text(row, "text")),))


def instruction_prompt(row: Fields) -> Prompt:
    """instruction (+ input) as text, or as messages if there is a history of [question, answer] pairs."""
    instruction = fields.text(row, "instruction")
    extra = row.get("input")
    question = f"{instruction}\n\n{extra}" if isinstance(extra, str) and not fields.is_missing(extra) else instruction
    turns = _history(row)
    return (*turns, Message("user", question)) if turns else question


def _history(row: Fields) -> tuple[Message, ...]:
    if not row.get("history"):
        return ()
    turns: list[Message] = []
    for i, exchange in enumerate(fields.items(row, "history")):
        if not isinstance(exchange, (list, tuple)) or len(exchange) != 2:
            raise RowError(f'"history"[{i}] is not a question with its answer', 'write [["question", "answer"], ...]')
        turns.append(Message("user", fields.as_text(exchange[0], f'the question of "history"[{i}]')))
        turns.append(Message("assistant", fields.as_text(exchange[1], f'the answer of "history"[{i}]')))
    return tuple(turns)


@layout("unpaired")
def from_unpaired(row: Fields) -> PromptTree:
    """prompt/completion with a label: one answer, good or bad."""
    return with_feedback(from_sft(row), label=fields.label(row, "label"))


@layout("scored")
def from_scored(row: Fields) -> PromptTree:
    """prompt/completion with a score: one answer and a number, higher is better."""
    if row.get("score") is None:
        raise RowError('"score" is missing', "give a number, higher is better")
    score = fields.number(row, "score")
    return with_feedback(from_sft(row), score=score)


def with_feedback(tree: PromptTree, label: bool | None = None, score: float | None = None) -> PromptTree:
    """A tree of one answer with its label and score set."""
    return replace(tree, completions=(replace(tree.completions[0], label=label, score=score),))


def pair(prompt: Prompt, chosen: fields.Answer, rejected: fields.Answer, row: Fields) -> PromptTree:
    """A pair, with its scores if the row has both (chosen_score and rejected_score, or another of the known names)."""
    good, bad = fields.score(row, *CHOSEN_SCORES), fields.score(row, *REJECTED_SCORES)
    return scored_pair(prompt, chosen, rejected, good, bad)


def scored_pair(
    prompt: Prompt,
    chosen: fields.Answer,
    rejected: fields.Answer,
    chosen_score: float | None,
    rejected_score: float | None,
) -> PromptTree:
    """A pair with both scores, or with neither if one is missing."""
    if chosen_score is None or rejected_score is None:
        chosen_score = rejected_score = None
    return PromptTree(
        prompt, (fields.completion(chosen, True, chosen_score), fields.completion(rejected, False, rejected_score))
    )
