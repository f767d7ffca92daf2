"""Rows with one example of everything that an audit counts."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

Row = dict[str, Any]
WORDS = ["".join(random.Random(i).choice("abcdefghijklmnop") for _ in range(3 + i % 6)) for i in range(900)]


def text(seed: int, length: int = 40) -> str:
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) for _ in range(length))


def edited(words: str) -> str:
    parts = words.split()
    parts[len(parts) // 2] = "other"
    return " ".join(parts)


def pair(seed: int) -> Row:
    return {"prompt": text(3 * seed), "chosen": text(3 * seed + 1), "rejected": text(3 * seed + 2)}


def planted() -> list[Row]:
    rows = [pair(i) for i in range(8)]  # 1 to 8
    one, two = rows[0], rows[1]
    # 12: nearly swapped
    rows += [
        dict(one),  # 9: a copy
        {k: edited(v) for k, v in one.items()},  # 10: a near copy
        {"prompt": two["prompt"], "chosen": two["rejected"], "rejected": two["chosen"]},  # 11: swapped
        {"prompt": edited(two["prompt"]), "chosen": two["rejected"], "rejected": edited(two["chosen"])},
        {"prompt": text(900), "chosen": text(901), "rejected": edited(text(901))},  # 13: nearly equal answers
        {"prompt": text(910), "chosen": text(911), "rejected": text(912)},  # 14 to 16: a cycle
        {"prompt": text(910), "chosen": text(912), "rejected": text(913)},
        {"prompt": text(910), "chosen": text(913), "rejected": text(911)},
        {"prompt": text(920), "chosen": "I'm sorry, but I can\u2019t help with that.", "rejected": text(921)},  # 17
        {"prompt": "mail a@b.co", "chosen": "AKIAABCDEFGHIJKLMNOP", "rejected": text(930)},  # 18
        {"prompt": "p", "chosen": "same", "rejected": "same "},  # 19: identical
        {"prompt": "p", "chosen": "", "rejected": "x"},  # 20: empty
    ]
    return rows


def write(path: Path, rows: list[Row]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path
