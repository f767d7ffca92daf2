"""The data audit: what is wrong or lopsided, counted, with line numbers."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from penchant.data.converting import is_identical
from penchant.data.load import IDENTICAL, Dataset, layout_line, prompt_text, summary
from penchant.data.split import first_text, prompt_key
from penchant.data.tokenise import TokenisedDataset

SHOWN = 20  # places listed a finding


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was counted: how many, out of how many, where."""

    title: str
    count: int
    of: int
    where: tuple[str, ...] = ()
    note: str = ""

    @property
    def share(self) -> float:
        return self.count / self.of if self.of else 0.0


@dataclass(frozen=True, slots=True)
class Audit:
    """All findings, and figures that are no defects (lengths)."""

    summary: str
    findings: Mapping[str, Finding]
    lengths: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    layout: str = ""

    def to_json(self) -> dict[str, Any]:
        """JSON-able: ``{"layout", "summary", "findings": {name: {title, count, of, share, where, note}}, "lengths"}``."""
        found = {
            name: {
                "title": f.title,
                "count": f.count,
                "of": f.of,
                "share": f.share,
                "where": list(f.where[:SHOWN]),
                "note": f.note,
            }
            for name, f in self.findings.items()
        }
        lengths = {k: dict(v) for k, v in self.lengths.items()}
        return {"layout": self.layout, "summary": self.summary, "findings": found, "lengths": lengths}

    def to_text(self) -> str:
        """A readable table."""
        lines = [*filter(None, (self.layout, self.summary)), ""]
        for f in self.findings.values():
            share = f"({f.share:.1%})" if f.of else ""
            lines.append(f"{f.title:<58} {f.count:>7,} of {f.of:>7,} {share:>8}  {f.note}".rstrip())
            if f.where:
                more = f" and {len(f.where) - SHOWN:,} more" if len(f.where) > SHOWN else ""
                lines.append("    " + ", ".join(f.where[:SHOWN]) + more)
        if self.lengths:
            names = list(next(iter(self.lengths.values())))
            lines += ["", f"{'tokens':<24}" + "".join(f"{n:>9}" for n in names)]
            lines += [f"{what:<24}" + "".join(f"{v:>9,.0f}" for v in q.values()) for what, q in self.lengths.items()]
        return "\n".join(lines)


def audit(
    dataset: Dataset,
    tokenised: TokenisedDataset | None = None,
    splits: Mapping[str, Dataset] | None = None,
    path: str | Sequence[str] | None = None,
) -> Audit:
    """Count what a person should know before training on this data.

    Args:
        dataset: as loaded; rows that were kept aside count too.
        tokenised: adds truncation and token lengths.
        splits: by name; adds prompts that stand in more than one. path: of the data; adds the layout that was found, and why.
    """
    rows = dataset.total
    aside = dataset.quarantined
    findings = {
        "bad_rows": Finding("rows kept aside, all reasons", len(aside), rows, tuple(q.where for q in aside)),
        "identical_pairs": _identical(dataset),
        "empty_completions": Finding(
            "empty completions or prompts",
            len(
                empty := [
                    q.where
                    for q in aside
                    if "is empty" in q.what or "empty answer" in q.what or "has no content" in q.what
                ]
            ),
            rows,
            tuple(empty),
        ),
        "duplicates": _duplicates(dataset),
    }
    if dataset.kind == "pairs":
        findings["contradictions"] = _contradictions(dataset)
        findings["length_bias"] = _length_bias(dataset)
    if dataset.kind == "unpaired":
        findings |= _labels(dataset)
    if dataset.kind == "scored":
        findings["scores"] = _scores(dataset)
    for name, finding in _leakage(splits or {}).items():
        findings[name] = finding
    lengths: dict[str, dict[str, float]] = {}
    if tokenised is not None:
        findings |= _truncation(tokenised)
        lengths = _token_lengths(tokenised)
    return Audit(summary(dataset), findings, lengths, "" if path is None else layout_line(dataset, path))


def _identical(dataset: Dataset) -> Finding:
    where = [q.where for q in dataset.quarantined if q.what.startswith(IDENTICAL)]
    where += [t.source for t in dataset.trees if is_identical(t)]
    return Finding('"chosen" equals "rejected"', len(where), dataset.total, tuple(where))


def _key(*texts: str) -> bytes:
    return hashlib.blake2b("\0".join(texts).encode(), digest_size=16).digest()


def _duplicates(dataset: Dataset) -> Finding:
    seen: dict[bytes, str] = {}
    where = []
    for t in dataset.trees:
        # an answer with another label is no duplicate: it is a contradiction
        key = _key(prompt_text(t.prompt), *(f"{c.text}\0{c.label}\0{c.score}" for c in t.completions))
        if key in seen:
            where.append(f"{t.source} (as {seen[key]})")
        else:
            seen[key] = t.source
    return Finding("exact duplicates of an earlier row", len(where), len(dataset.trees), tuple(where))


def _contradictions(dataset: Dataset) -> Finding:
    seen: dict[bytes, str] = {}
    where = []
    for t in dataset.trees:
        prompt, (a, b) = prompt_text(t.prompt), (t.completions[0].text, t.completions[1].text)
        other = seen.get(_key(prompt, b, a))
        if other is not None and a != b:
            where.append(f"{t.source} (against {other})")
        seen.setdefault(_key(prompt, a, b), t.source)
    return Finding("contradictions: the same pair the other way round", len(where), len(dataset.trees), tuple(where))


def _labels(dataset: Dataset) -> dict[str, Finding]:
    """The share of good answers, and answers that are called both good and bad."""
    seen: dict[bytes, tuple[bool | None, str]] = {}
    where = []
    answers = [(t, answer) for t in dataset.trees for answer in t.completions]
    for t, answer in answers:
        key = _key(prompt_text(t.prompt), answer.text)
        label, other = seen.setdefault(key, (answer.label, t.source))
        if label != answer.label:
            where.append(f"{t.source} (against {other})")
    good = sum(bool(answer.label) for _, answer in answers)
    return {
        "good_answers": Finding("answers labelled good", good, len(answers), ()),
        "contradictions": Finding(
            "contradictions: one answer labelled good and bad", len(where), len(answers), tuple(where)
        ),
    }


def _scores(dataset: Dataset) -> Finding:
    """What to choose data.score_threshold from."""
    scores = np.array([c.score for t in dataset.trees for c in t.completions if c.score is not None])
    low, mid, high = np.quantile(scores, [0.25, 0.5, 0.75])
    note = f"quartiles {low:g}, {mid:g}, {high:g}"
    return Finding("answers at or above the median score", int((scores >= mid).sum()), len(scores), (), note)


def _length_bias(dataset: Dataset) -> Finding:
    longer = [len(t.completions[0].text) - len(t.completions[1].text) for t in dataset.trees]
    differing = [d for d in longer if d]
    if not differing:
        return Finding("length bias: the longer answer is the chosen one", 0, 0, (), "all lengths are equal")
    count = sum(d > 0 for d in differing)
    low, high = wilson_interval(count, len(differing))
    note = f"95% interval [{low:.1%}, {high:.1%}]" + (
        f", {len(longer) - len(differing):,} ties apart" if len(longer) > len(differing) else ""
    )
    return Finding("length bias: the longer answer is the chosen one", count, len(differing), (), note)


def wilson_interval(successes: int, n: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson's 95% score interval of a proportion: ``(p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)``."""
    p = successes / n
    centre = p + z * z / (2 * n)
    half = z * float(np.sqrt(p * (1 - p) / n + z * z / (4 * n * n)))
    return (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)


def _leakage(splits: Mapping[str, Dataset]) -> dict[str, Finding]:
    found = {}
    names = list(splits)
    for i, a in enumerate(names):
        prompts: dict[str, str] = {prompt_key(t.prompt, first_text(t)): t.source for t in splits[a].trees}
        for b in names[i + 1 :]:
            where = [
                f"{t.source} (as {prompts[key]})"
                for t in splits[b].trees
                if (key := prompt_key(t.prompt, first_text(t))) in prompts
            ]
            title = f"leakage: prompts of {b} that also stand in {a}"
            found[f"leakage_{a}_{b}".replace(" ", "_")] = Finding(title, len(where), len(splits[b].trees), tuple(where))
    return found


def _truncation(tokenised: TokenisedDataset) -> dict[str, Finding]:
    became = [q.where for q in tokenised.quarantined if q.what.startswith(IDENTICAL)]
    n = tokenised.total
    return {
        "cut_prompts": Finding(
            "prompts that lost their start to max_length", len(tokenised.cut_prompts), n, tokenised.cut_prompts
        ),
        "cut_completions": Finding(
            "rows with a cut completion (its EOS is gone)", len(tokenised.cut_completions), n, tokenised.cut_completions
        ),
        "identical_after_cut": Finding("pairs that became equal in tokens", len(became), n, tuple(became)),
        "bad_after_tokenising": Finding(
            "rows kept aside when tokenising",
            len(tokenised.quarantined),
            n,
            tuple(q.where for q in tokenised.quarantined),
        ),
    }


def _token_lengths(tokenised: TokenisedDataset) -> dict[str, dict[str, float]]:
    columns: dict[str, list[int]] = defaultdict(list)
    for t in tokenised.trees:
        columns["prompt"].append(len(t.prompt_ids))
        names: Sequence[str] = (
            ("chosen", "rejected") if len(t.completion_ids) == 2 else ("completion",) * len(t.completion_ids)
        )
        for name, ids in zip(names, t.completion_ids, strict=True):
            columns[name].append(len(ids))
    return {
        name: {
            "mean": float(np.mean(values)),
            **{f"p{q}": float(np.percentile(values, q)) for q in (5, 50, 95, 99)},
            "max": float(max(values)),
        }
        for name, values in columns.items()
    }
