"""Odd but valid rows in every kind of file: their meaning, known before they are written, must equal the training data.

`PENCHANT_SEED` selects other rows.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny import tiny_tokenizer

from penchant.data.load import load_preferences
from penchant.data.tokenize import tokenize

SEED = int(os.environ.get("PENCHANT_SEED", "0"))
ODD = [
    "a", "0", "-1", "1e309", "true", "nan", "None", "null", "[]", "{}", " x", "x ", "\nline", "line\n\n", "é", "e\u0301", "漢字かな", "👩‍👩‍👧‍👦",
    "\u202eabc", "\u200b.", "\ufeffx", "a\u2028b", "a\x85b", "a\tb", "a\r\nb", "a\rb", "\x1b[31mred", "'single'", '"double"', "a;b,c|d",
    "<think>\nhm\n</think>\n\nyes", "Human: hi", "\n\nAssistant: yo", "{{ 7*7 }}", "{% if %}", "=SUM(A1)", "\\n", "\\", "assistant:", "[{'a': 1}]",
    "\u00a0b\u00a0", "ﬁ", "word " * 400, "🇨🇭", "\U0010ffff", "```py\n1\n```", "$x^2$",
]  # fmt: skip
MISSING = {"nan", "None", "null"}  # words that a table uses for missing values
TURN = "{{ '<s>' + m.role + ':' + m.content + '</s>\n' }}"
TAIL = "{% if add_generation_prompt %}{{ '<s>assistant:' }}{% endif %}"
TEMPLATES = [
    "{% for m in messages %}" + TURN + "{% endfor %}" + TAIL,
    "{% for m in messages %}" + TURN.replace("m.content", "m.content|trim") + "{% endfor %}" + TAIL,
    "{% for m in messages %}{{ '<s>' + m.role + ':\n' + m.content + '\n' }}{% endfor %}" + TAIL.replace(":'", ":\n'"),
    "{% set ns = namespace(sys='') %}{% for m in messages %}{% if m.role == 'system' %}{% set ns.sys = m.content + '\n\n' %}"
    "{% elif m.role == 'user' %}{{ '<s>[INST] ' + (ns.sys if loop.index0 < 2 else '') + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' </s>' }}{% endif %}{% endfor %}",
]

Turn = dict[str, Any]
Meant = tuple[dict[str, Any], list[Turn] | str, list[str]]  # (row, its prompt, its answers)


def _text(r: random.Random) -> str:
    if r.random() < 0.6:
        return r.choice(ODD)
    return "".join(r.choice(ODD) for _ in range(r.randint(2, 3)))


def _turn(role: str, content: str) -> Turn:
    return {"role": role, "content": content}


def _asked(r: random.Random) -> list[Turn]:
    """A conversation that ends with a question."""
    turns = [_turn("system", _text(r))] if r.random() < 0.4 else []
    for _ in range(r.choice([0, 0, 1, 6])):
        turns += [_turn("user", _text(r)), _turn("assistant", _text(r))]
    return [*turns, _turn("user", _text(r))]


def _sharegpt(turns: list[Turn]) -> list[Turn]:
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return [{"from": names[t["role"]], "value": t["content"]} for t in turns]


def _meant(r: random.Random, kind: str) -> Meant:
    asked, text, a, b = _asked(r), _text(r), _text(r), _text(r)
    while a.strip() == b.strip():
        b = _text(r)
    good, bad = _turn("assistant", a), _turn("assistant", b)
    made: dict[str, Meant] = {
        "pairs": ({"prompt": text, "chosen": a, "rejected": b}, text, [a, b]),
        "turns": ({"prompt": asked, "chosen": [good], "rejected": [bad]}, asked, [a, b]),
        "whole": ({"chosen": [*asked, good], "rejected": [*asked, bad]}, asked, [a, b]),
        "sft": ({"prompt": text, "completion": a}, text, [a]),
        "messages": ({"messages": [*asked, good]}, asked, [a]),
        "sharegpt": ({"conversations": _sharegpt([*asked, good])}, asked, [a]),
        "alpaca": ({"instruction": text, "input": b, "output": a}, f"{text}\n\n{b}", [a]),
        "unpaired": ({"prompt": text, "completion": a, "label": r.random() < 0.5}, text, [a]),
        "scored": ({"prompt": text, "completion": a, "score": r.choice([0, 1e-9, -5, 1e12, 3.5])}, text, [a]),
        "prompts": ({"prompt": text}, text, []),
    }
    row, prompt, answers = made[kind]
    if r.random() < 0.3 and (isinstance(prompt, str) or prompt[0]["role"] != "system"):
        row["system"] = _text(r)
        prompt = [_turn("system", row["system"]), *([_turn("user", prompt)] if isinstance(prompt, str) else prompt)]
    return row, prompt, answers


KINDS = ["pairs", "turns", "whole", "sft", "messages", "sharegpt", "alpaca", "unpaired", "scored", "prompts"]


def _write(r: random.Random, rows: list[dict[str, Any]], folder: Path) -> Path:
    flat = not any(isinstance(v, list) for row in rows for v in row.values())
    path = folder / f"rows.{r.choice(['jsonl', 'json', 'jsonl.gz', 'parquet', *(['csv', 'tsv'] if flat else [])])}"
    mark, columns = r.choice(["", "\ufeff"]), list(dict.fromkeys(name for row in rows for name in row))
    if path.suffix == ".parquet":
        pq.write_table(pa.table({c: [row.get(c) for row in rows] for c in columns}), path)
    elif path.suffix == ".json":
        path.write_bytes((mark + json.dumps(rows, indent=r.choice([None, 1]), ensure_ascii=False)).encode())
    elif path.suffix in (".csv", ".tsv"):
        out, delimiter = io.StringIO(newline=""), "\t" if path.suffix == ".tsv" else r.choice(",;|")
        writer = csv.writer(out, delimiter=delimiter, lineterminator=r.choice(["\n", "\r\n"]), quoting=csv.QUOTE_ALL)
        writer.writerows([columns, *([row.get(c, "") for c in columns] for row in rows)])
        path.write_bytes((mark + out.getvalue()).encode())
    else:
        end = r.choice(["\n", "\r\n", "\n\n"])
        data = (mark + "".join(json.dumps(row, ensure_ascii=r.random() < 0.5) + end for row in rows)).encode()
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def _without_missing(row: dict[str, Any], words: set[str]) -> bool:
    return not any(isinstance(v, str) and v.strip() in words for v in row.values())


def _one_file(seed: int, folder: Path) -> int:
    """Write a file of rows, read it, compare, and return the number of compared texts."""
    r = random.Random(seed)
    kind = r.choice(KINDS)
    meant = [_meant(r, kind) for _ in range(r.choice([1, 2, 12]))]
    meant += meant[:1] * (r.random() < 0.3)
    weights = [r.choice([1, 1e-9, 1e9, 0.5]) for _ in meant] if r.random() < 0.3 else []
    rows = [{**row, **({"w": weights[i]} if weights else {})} for i, (row, _, _) in enumerate(meant)]
    path = _write(r, rows, folder)
    words = {".csv": MISSING, ".tsv": MISSING, ".parquet": {"nan"}}.get(path.suffix, set())
    kept = [i for i, row in enumerate(rows) if _without_missing(row, words)]
    if len(kept) < len(rows):
        path = _write(r, rows := [rows[i] for i in kept], folder) if kept else path
    if not kept:
        return 0
    words = {".csv": MISSING, ".tsv": MISSING, ".parquet": {"nan"}}.get(path.suffix, set())
    if not all(_without_missing(row, words) for row in rows):  # written again, as another kind of file
        return 0
    data = load_preferences(str(path), weight="w" if weights else None)
    assert data.total == data.accepted == len(rows) and not data.quarantined
    for tree, i in zip(data.trees, kept, strict=True):
        _, prompt, answers = meant[i]
        found = tree.prompt if isinstance(tree.prompt, str) else [_turn(m.role, m.content) for m in tree.prompt]
        assert (found, [c.text for c in tree.completions]) == (prompt, answers)
        assert tree.weight == (weights[i] if weights else 1.0)
    if any(isinstance(p, list) and [m["role"] for m in p].count("system") > 1 for _, p, _ in meant):
        return 0
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = r.choice(TEMPLATES)
    compared = 0
    for made, i in zip(tokenize(data, tokenizer, max_length=1 << 20).trees, kept, strict=True):
        _, prompt, answers = meant[i]
        turns = [_turn("user", prompt)] if isinstance(prompt, str) else prompt
        for answer, ids in zip(answers, made.completion_ids, strict=True):
            own = tokenizer.apply_chat_template([*turns, _turn("assistant", answer)], tokenize=False)
            got = tokenizer.decode([*made.prompt_ids, *ids])
            own = own.rstrip() if own.rstrip().endswith("</s>") else f"{own}</s>"
            assert (
                got == own
                or got == f"<s>{own}"
                or got.removesuffix("</s>").rstrip() == own.removesuffix("</s>").rstrip()
            )
            assert list(ids).count(tokenizer.eos_token_id) == 1 and ids[-1] == tokenizer.eos_token_id
            assert list(made.prompt_ids[:2]) != [tokenizer.bos_token_id] * 2
            compared += 1
    return compared


def test_odd_rows_are_trained_as_they_were_meant(tmp_path: Path) -> None:
    assert sum(_one_file(SEED + n, tmp_path) for n in range(25)) > 40


@pytest.mark.slow
def test_many_odd_rows_are_trained_as_they_were_meant(tmp_path: Path) -> None:
    assert sum(_one_file(SEED + n, tmp_path) for n in range(25, 1500)) > 3000
