"""Completions side by side: the same prompts answered by every model, readable without the script that filters and searches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from penchant.base.text import counted
from penchant.report.data import ReportData
from penchant.report.html import Element, Node, el, muted, user_text
from penchant.report.svg import number
from penchant.runfolder.read import START, start_names
from penchant.runfolder.values import mapping, mappings, num, text

MAX_OPEN = 20  # number of cards that start unfolded
MAX_BYTES = 800_000  # maximum bytes of texts and markup on one page
MAX_CHARACTERS = 4_000  # maximum characters of a text; longer ones are cut with a note
SYSTEM = "system"


@dataclass(frozen=True, slots=True)
class Answer:
    """One model's completion.

    Args:
        model: index into the models of the section; reward, tokens: None if unknown; ended: whether it ended with EOS, None if unknown.
    """

    model: int
    text: str
    reward: float | None = None
    tokens: int | None = None
    ended: bool | None = None

    @property
    def length(self) -> int:
        """Length in tokens if known, else in characters."""
        return self.tokens if self.tokens is not None else len(self.text)


@dataclass(frozen=True, slots=True)
class Card:
    """A prompt and its answers; `times`: how many identical cards there are; `turns`: (role, text) of a conversation."""

    prompt: str
    answers: tuple[Answer, ...]
    times: int = 1
    turns: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class CardSet:
    """All cards of the section: `models` are names, `keys` their letters ("" if they have none)."""

    models: tuple[str, ...]
    keys: tuple[str, ...]
    cards: tuple[Card, ...]

    @property
    def judged(self) -> bool:
        return any(a.reward is not None for c in self.cards for a in c.answers)

    @property
    def in_tokens(self) -> bool:
        return all(a.tokens is not None for c in self.cards for a in c.answers)


def collect_cards(data: ReportData) -> CardSet:
    """The first comparison's completions if there are any, else the runs' own samples."""
    compared = [c for c in data.comparisons if c.rows]
    return _cards_from_rows(data, compared[0].rows) if compared else cards_from_runs(data)


def _cards_from_rows(data: ReportData, rows: Sequence[object]) -> CardSet:
    names: dict[str, int] = {}
    cards = []
    for row in map(mapping, rows):
        answers = []
        for name, value in mapping(row.get("completions")).items():
            completion, model = mapping(value), names.setdefault(name, len(names))
            tokens, ended = num(completion, "tokens"), completion.get("ended")
            length = None if tokens is None else int(tokens)
            finished = ended if isinstance(ended, bool) else None
            answers.append(Answer(model, text(completion.get("text")), num(completion, "reward"), length, finished))
        if answers:
            cards.append(Card(text(row.get("prompt")), tuple(answers), turns=_turns(row)))
    settings = [data.find_setting(n) if n != START else None for n in names]
    return CardSet(tuple(names), tuple(s.key if s else "" for s in settings), tuple(cards))


def cards_from_runs(data: ReportData) -> CardSet:
    """Samples of all runs, one card per prompt; an initial model's answer is shown once, from the first run that has it."""
    starts = start_names({run.name: run for run in data.runs})
    names = list(dict.fromkeys(starts.values()))
    keys = [""] * len(names)
    alone = len(data.runs) == 1
    by_prompt: dict[tuple[str, int], list[Answer]] = {}
    turns: dict[str, tuple[tuple[str, str], ...]] = {}
    for run in data.runs:
        model, start = len(names), names.index(starts[run.name])
        seen: Counter[str] = Counter()
        for row in run.samples:
            prompt = text(row.get("prompt"))
            seen[prompt] += 1
            turns[prompt] = turns.get(prompt) or _turns(row)
            answers = by_prompt.setdefault((prompt, seen[prompt]), [])
            if "before" in row and not any(a.model == start for a in answers):
                answers.append(Answer(start, text(row.get("before")), num(row, "reward_before")))
            if "after" in row:
                answers.append(Answer(model, text(row.get("after")), num(row, "reward_after")))
        if any("after" in row for row in run.samples):
            names.append("after training" if alone else run.name)
            keys.append("" if alone else data.setting_of(run).key)
    counts = Counter((prompt, tuple(answers)) for (prompt, _), answers in by_prompt.items() if answers)
    cards = tuple(Card(prompt, answers, times, turns[prompt]) for (prompt, answers), times in counts.items())
    return CardSet(tuple(names), tuple(keys), cards)


def _turns(row: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """(role, text) of each turn if the prompt is a conversation, else empty."""
    return tuple((text(m.get("role")), text(m.get("content"))) for m in mappings(row.get("messages")))


def samples(data: ReportData) -> Element | None:
    """Build the section; None if there are no completions."""
    card_set = collect_cards(data)
    if not card_set.cards:
        return None
    elements: list[Element] = []
    size = 0
    for i, card in enumerate(card_set.cards):
        element = _card(card, card_set, i)
        size += len(str(element).encode())
        if size > MAX_BYTES and elements:
            break
        elements.append(element)
    remaining = len(card_set.cards) - len(elements)
    more = f"{remaining:,} more are in samples.jsonl and comparison.jsonl: this page has room for {len(elements):,}."
    return el(
        "div",
        _controls(card_set),
        el("p", f"{counted(len(elements), 'prompt')}.", class_="soft count", aria_live="polite"),
        el("div", elements, class_="cards-of-text"),
        muted(more) if remaining else None,
        id="samples-of",
        class_="shelf",
        data_unit="tokens" if card_set.in_tokens else "characters",
    )


def _card(card: Card, card_set: CardSet, i: int) -> Element:
    system = [words for role, words in card.turns if role == SYSTEM and len(card.turns) > 1]
    return el(
        "details",
        el(
            "summary",
            _prompt(card),
            el("small", f"{card.times} times") if card.times > 1 else None,
            el("small", class_="diff"),
        ),
        [
            el("details", el("summary", "system prompt"), user_text(_truncate(s), tag="p"), class_="system")
            for s in system
        ],
        el("div", [_answer(a, card_set) for a in card.answers], class_="answers"),
        class_="sample",
        open=i < MAX_OPEN,
    )


def _prompt(card: Card) -> Element:
    """The prompt: plain text as it is, a conversation turn by turn with roles. The system prompt is folded below."""
    if not card.turns:
        return user_text(_truncate(card.prompt), tag="span", class_="prompt")
    visible = [t for t in card.turns if t[0] != SYSTEM] or card.turns
    turns = [
        el("span", el("b", user_text(role)), ": ", user_text(_truncate(words)), el("br")) for role, words in visible
    ]
    return el("span", turns, class_="prompt")


def _answer(a: Answer, card_set: CardSet) -> Element:
    facts = [f"reward {number(a.reward)}"] if a.reward is not None else []
    facts += [f"{a.tokens} tokens"] if a.tokens is not None else []
    facts += ["cut off"] if a.ended is False else []
    key = card_set.keys[a.model]
    return el(
        "div",
        el(
            "h4",
            el("b", key, class_="key") if key else None,
            user_text(card_set.models[a.model]),
            el("small", " " + " \u00b7 ".join(facts)) if facts else None,
        ),
        user_text(_truncate(a.text.removeprefix(" ")), tag="p") if a.text else muted("(empty)"),
        data_m=a.model,
        data_r=None if a.reward is None else f"{a.reward:.6g}",
        data_n=a.length,
    )


def _truncate(value: str) -> str:
    if len(value) <= MAX_CHARACTERS:
        return value
    return f"{value[:MAX_CHARACTERS]} \u2026 [{len(value) - MAX_CHARACTERS:,} more characters]"


def _controls(card_set: CardSet) -> Element:
    """Filter and sort controls: hidden until the script that implements them shows them."""
    names = [f"{k} {n}".strip() for k, n in zip(card_set.keys, card_set.models, strict=True)]
    used = {a.model for c in card_set.cards for a in c.answers}
    options = [(str(i), n) for i, n in enumerate(names) if i in used]
    everyone = [("all", "all")] if len(options) > 2 else []
    others = options[1:] + options[:1]
    winner = [("", "anyone"), ("right", "the right one"), ("left", "the left one"), ("tie", "neither: a tie")]
    length = [("", "any"), ("right", "right is longer"), ("left", "left is longer")]
    length += [("short", "shortest third"), ("long", "longest third")]
    gains = [("gain", "right gains most"), ("loss", "right loses most")] if card_set.judged else []
    sort = [("", "as written"), *gains, ("long", "right is longest")]
    attributes = {"placeholder": "in prompts and completions", "autocomplete": "off", "spellcheck": "false"}
    return el(
        "div",
        el("label", "Search", el("input", type="search", data_f="text", **attributes)),
        _select("Left", "left", options),
        _select("Right", "right", everyone + others if not everyone else others + everyone),
        _select("Winner", "won", winner) if card_set.judged else None,
        _select("Length", "length", length),
        _select("Order", "sort", sort),
        el("button", "Open all", type="button", data_f="open"),
        class_="controls",
        hidden=True,
        role="group",
        aria_label="filter the completions",
    )


def _select(label: str, name: str, options: Iterable[tuple[str, str]]) -> Node:
    choices = [el("option", words, value=value) for value, words in options]
    return el("label", label, el("select", choices, data_f=name)) if choices else None
