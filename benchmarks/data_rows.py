"""Synthetic rows for `data_scale.py`: seeded random words with planted defects, as lmsys-chat-1m conversations or as pairs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

REFUSAL = "I'm sorry, but I can't help with that. "
NEAR_FROM = 100  # characters; one extra word makes a near-duplicate of a longer text, but maybe not of a shorter one
MODERATION = (
    *("harassment", "harassment/threatening", "hate", "hate/threatening", "self-harm", "self-harm/instructions"),
    *("self-harm/intent", "sexual", "sexual/minors", "violence", "violence/graphic"),
)

Row = dict[str, Any]


@dataclass(slots=True)
class Words:
    """Generates texts of random words and keeps earlier rows to copy."""

    rng: np.random.Generator
    vocabulary: list[str]
    scale: float
    earlier: list[Row]

    def text(self, mean: int) -> str:
        length = max(8 if self.scale == 1 else 2, int(self.rng.lognormal(np.log(mean * self.scale), 0.6)))
        return " ".join([self.vocabulary[j] for j in self.rng.integers(0, len(self.vocabulary), length).tolist()])

    def earlier_row(self) -> Row:
        """Remove and return a random earlier row. Each is copied at most once, so every copy is one finding."""
        return self.earlier.pop(int(self.rng.integers(len(self.earlier))))


@dataclass(frozen=True, slots=True)
class Kind:
    """How to make the rows of a layout, and the defects to plant (finding -> share of rows)."""

    row: Callable[[Words, int], Row]
    answers: Callable[[Row], list[list[dict[str, str]]]]  # conversations ending in a completion, chosen first
    planted: Mapping[str, float]
    numbered: Callable[[int], Row]  # the columns that are unique to each row


# ---------------------------------------------------------------------------------------------------------------------
# layouts


def _lmsys_row(words: Words, number: int) -> Row:
    turns = min(4, int(words.rng.geometric(0.6)))
    conversation = []
    for _ in range(turns):
        conversation.append({"role": "user", "content": words.text(30)})
        conversation.append({"role": "assistant", "content": words.text(100)})
    verdict = {
        "categories": dict.fromkeys(MODERATION, False),
        "category_scores": {name: 1.25e-06 * i for i, name in enumerate(MODERATION, 1)},
        "flagged": False,
    }
    return {
        **_lmsys_number(number),
        "model": f"model-{number % 25}",
        "conversation": conversation,
        "turn": turns,
        "language": "English",
        "openai_moderation": [verdict] * len(conversation),
        "redacted": False,
    }


def _lmsys_number(number: int) -> Row:
    return {"conversation_id": f"{number:032x}"}


def _pair_row(words: Words, number: int) -> Row:
    prompt = [{"role": "user", "content": words.text(30)}]
    first = bool(words.rng.random() < 0.55)
    return {
        "conversation_id": f"{number:08x}",
        "model_a": "one",
        "model_b": "two",
        "winner_model_a": int(first),
        "winner_model_b": int(not first),
        "language": "English",
        "chosen": [*prompt, {"role": "assistant", "content": words.text(100)}],
        "rejected": [*prompt, {"role": "assistant", "content": words.text(90)}],
    }


COPIES = {"duplicates": 0.02, "near_duplicates": 0.02}
SENSITIVE = {"pii_email": 0.01, "secrets_api_key": 0.005}
KINDS = {
    "lmsys": Kind(
        _lmsys_row, lambda row: [row["conversation"]], {**COPIES, **SENSITIVE, "refusals": 0.01}, _lmsys_number
    ),
    "pairs": Kind(
        _pair_row,
        lambda row: [row["chosen"], row["rejected"]],
        {**COPIES, "contradictions": 0.01, **SENSITIVE, "refusals_chosen": 0.01},
        lambda number: {"conversation_id": f"{number:08x}"},
    ),
}


# ---------------------------------------------------------------------------------------------------------------------
# planted defects


def _near(kind: Kind, row: Row, words: Words) -> Row | None:
    old = json.loads(json.dumps(words.earlier_row()))
    answers = [conversation[-1] for conversation in kind.answers(old)]
    if any(len(a["content"]) <= NEAR_FROM for a in answers):
        return None
    for answer in answers:
        answer["content"] += " indeed"
    return old


def _swapped(kind: Kind, row: Row, words: Words) -> Row:
    old = words.earlier_row()
    return old | {"chosen": old["rejected"], "rejected": old["chosen"]}


def _prefixed(row: Row, kind: Kind, prefix: str) -> Row:
    answer = kind.answers(row)[0][-1]
    answer["content"] = f"{prefix} {answer['content']}"
    return row


def _secret(kind: Kind, row: Row, words: Words) -> Row:
    return _prefixed(row, kind, "use AKIA" + "".join(words.rng.choice(list("ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"), 16)))


def _email(kind: Kind, row: Row, words: Words) -> Row:
    return _prefixed(row, kind, f"write to {words.vocabulary[int(words.rng.integers(99))]}@mail.example")


MAKERS: dict[str, Callable[[Kind, Row, Words], Row | None]] = {
    "duplicates": lambda kind, row, words: words.earlier_row(),
    "near_duplicates": _near,
    "contradictions": _swapped,
    "pii_email": _email,
    "secrets_api_key": _secret,
    "refusals": lambda kind, row, words: _prefixed(row, kind, REFUSAL),
    "refusals_chosen": lambda kind, row, words: _prefixed(row, kind, REFUSAL),
}


def small(path: Path, n: int, seed: int, layout: str = "small") -> dict[str, int]:
    """Write `n` short rows quickly, to measure the cost of a row: demonstrations, or pairs if `layout` is "short".

    The last two rows of every 100 are copies. Returns the number of duplicates.
    """
    rng = np.random.default_rng(seed)
    letters = np.array(list("etaoinshrdlucmfwypvbgkqjxz"))
    words = ["".join(letters[rng.integers(0, 20, rng.integers(3, 9))]) for _ in range(20_000)]
    row = {
        "small": '{{"prompt": "{} {} {}?", "completion": "{} {} {} {} {} {}"}}\n',
        "short": '{{"prompt": "{} {} {}?", "chosen": "{} {} {} {} {} {}", "rejected": "{} {} {} {} {} {}"}}\n',
    }[layout]
    copies = 0
    with path.open("w") as out:
        for start in range(0, n, 100):
            drawn = rng.integers(0, len(words), (min(100, n - start), row.count("{}"))).tolist()
            block = [row.format(*map(words.__getitem__, which)) for which in drawn]
            if len(block) == 100:
                block[98:] = block[:2]
                copies += 2
            out.write("".join(block))
    return {"duplicates": copies}


def generate(path: Path, n: int, seed: int, layout: str, scale: float = 1.0) -> dict[str, int]:
    """Write `n` rows with texts `scale` times the usual length. Returns the number of planted defects of each kind."""
    if layout in ("small", "short"):
        return small(path, n, seed, layout)
    rng, kind = np.random.default_rng(seed), KINDS[layout]
    letters = np.array(list("etaoinshrdlucmfwypvbgkqjxz"))
    vocabulary = ["".join(letters[rng.integers(0, 20, rng.integers(2, 10))]) for _ in range(20_000)]
    words = Words(rng, vocabulary, scale, [])
    names = [*kind.planted, ""]
    bounds = np.cumsum(list(kind.planted.values()))
    planted = dict.fromkeys(kind.planted, 0)
    with path.open("w") as out:
        for i in range(n):
            name = names[int(np.searchsorted(bounds, rng.random(), side="right"))]
            row = kind.row(words, i)
            defective = MAKERS[name](kind, row, words) if name and words.earlier else None
            if defective is not None:
                planted[name] += 1
            elif len(words.earlier) < 50_000:
                words.earlier.append(row)
            out.write(json.dumps((defective or row) | kind.numbered(i)) + "\n")
    return planted
