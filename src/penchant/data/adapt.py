"""Convert data of one kind for a loss of another: pairs to labels, scores to labels or pairs by an explicit rule, or an error."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence, Set
from dataclasses import replace
from typing import Any

from penchant.base.text import counted
from penchant.data.load import Dataset, Quarantined, fingerprint
from penchant.data.options import DataConfig
from penchant.errors import DataError
from penchant.types import Completion, PromptTree

LABEL_HINT = 'add a "label" column (true or false), give pairs, or set loss.name=sft'


def setting(method: str) -> str:
    """The config setting that selects a method on given data."""
    return f"algorithm.name={method}" if method == "reward_model" else f"loss.name={method}"


def adapt(dataset: Dataset, loss: str, signal: str, needs: Set[str], options: DataConfig, name: str) -> Dataset:
    """Convert a data set to what a loss of this signal can use.

    Args:
        dataset: as loaded; loss, signal, needs: of the loss (see `LossSpec`); options: the `data` section; name: the file.

    Returns:
        For ``pairs``: pairs, with scores if the loss needs them (pairs without are kept aside or raise). For ``unpaired``: every
        completion labeled; a pair stays one tree with a good and a bad completion. For ``lists``: one tree per prompt with all its
        scored answers, best first (a pair is a list of two). For ``tokens``: unchanged, without answers labeled bad. For
        ``prompts``: a file of prompts as it is, other data with each prompt once.

    Raises:
        DataError: the rows cannot be used; it names the file, the field and the option.
    """
    for key, is_set, used_by in (
        ("score_threshold", options.score_threshold is not None, "unpaired"),
        ("pairs_from_scores", options.pairs_from_scores != "off", "pairs"),
    ):
        if is_set and (signal != used_by or dataset.kind != "scored"):
            what = f"data.{key} is set, but {setting(loss)} on rows that are {dataset.kind} does not use it"
            raise DataError(name, what, "leave it out")
    if signal == "pairs":
        dataset = _as_pairs(dataset, loss, options, name)
        return _with_scores(dataset, loss, needs, options, name) if "scores" in needs else dataset
    if signal == "unpaired":
        return _as_labeled(dataset, loss, options, name)
    if signal == "lists":
        return _as_lists(dataset, loss, name)
    if signal == "prompts":
        return _as_prompts(dataset, name)
    if dataset.kind == "prompts":
        how = "give completions, or take a method that writes answers itself (algorithm=grpo with a reward)"
        raise DataError(name, f"{setting(loss)} needs answers, but these rows are prompts alone", how)
    if dataset.kind == "unpaired":
        good = [t for t in dataset.trees if t.completions[0].label]
        how = "use kto, bco or pmpo"
        if not good:
            raise DataError(name, f'{setting(loss)} learns answers whose "label" is true, and there is none', how)
        bad = (t for t in dataset.trees if not t.completions[0].label)
        what = f"{setting(loss)} does not learn answers labeled bad"
        return _with_trees(dataset, good, [Quarantined(t.source, what, how, None) for t in bad])
    return dataset


def _with_trees(
    dataset: Dataset,
    trees: Sequence[PromptTree],
    quarantined_rows: Sequence[Quarantined] = (),
    n_used_rows: int | None = None,
    **more: Any,
) -> Dataset:
    """The data set with other trees, made from `n_used_rows` of its own (default: one from each).

    If each row gave one tree, `n_used_rows` is the number of accepted rows; otherwise an example counts as a row from here on.
    """
    adapted = dataset.with_trees(tuple(trees), fingerprint(trees))
    quarantined = (*dataset.quarantined, *quarantined_rows)
    rows = n_used_rows if n_used_rows is not None and dataset.accepted == len(dataset.trees) else len(trees)
    return replace(
        adapted, quarantined=quarantined, total=rows + len(quarantined), accepted=rows, columns=dataset.columns, **more
    )


def _as_prompts(dataset: Dataset, name: str) -> Dataset:
    """The prompts alone: a file of prompts as it is, with repeats; other data with each prompt once. Row counts do not change."""
    if dataset.kind == "text":
        raise DataError(name, "online methods need prompts, but these rows are plain text", "give a prompt column")
    if dataset.kind == "prompts":
        return dataset
    distinct = {_prompt_identity(t): replace(t, completions=()) for t in reversed(dataset.trees)}
    trees = tuple(reversed(distinct.values()))
    return replace(dataset, trees=trees, fingerprint=fingerprint(trees), kind="prompts")


def _prompt_identity(tree: PromptTree) -> tuple[object, ...]:
    """What makes prompts equal: their turns, tools and template options."""
    return tree.prompt, tree.tools, tree.template_options


def repeated_prompts(dataset: Dataset) -> str:
    """``60 rows: 44 distinct prompts`` for a method that samples its own answers; empty if no prompt repeats."""
    distinct = len({_prompt_identity(t) for t in dataset.trees})
    rows = max(dataset.accepted, len(dataset.trees))  # a row may give several prompts
    return f"{counted(rows, 'row')}: {counted(distinct, 'distinct prompt')}" if distinct < rows else ""


def _no_pairs_advice(loss: str, kind: str) -> str:
    if loss == "reward_model":  # nothing else trains a reward model
        return "give rows with prompt, chosen and rejected"
    if kind == "prompts":
        return "give preference data, or take a method that writes answers itself (algorithm=grpo with a reward)"
    return "give preference data, or set loss.name" + (" to kto, bco or pmpo" if kind == "unpaired" else "=sft")


def _as_pairs(dataset: Dataset, loss: str, options: DataConfig, name: str) -> Dataset:
    if dataset.kind == "pairs":
        return dataset
    if dataset.kind != "scored":
        what = f"{setting(loss)} needs pairs (chosen and rejected), but these rows are {dataset.kind}"
        raise DataError(name, what, _no_pairs_advice(loss, dataset.kind))
    if options.pairs_from_scores == "off":
        what = f'{setting(loss)} needs pairs (chosen and rejected), but these rows are single answers with a "score"'
        how = "set data.pairs_from_scores=best_worst to set the best against the worst answer of each prompt"
        raise DataError(name, what, how)
    # the answers between a prompt's best and its worst are not used, and are not bad rows
    trees: list[PromptTree] = []
    aside: list[Quarantined] = []
    for group, ranked in _group_by_prompt(dataset):
        best, worst = ranked[0], ranked[-1]
        if len(ranked) > 1 and best.score != worst.score and best.whole.strip() != worst.whole.strip():
            trees.append(replace(group[0], completions=(replace(best, label=True), replace(worst, label=False))))
        else:
            aside += _quarantine_tied(group, ranked)
    return _with_trees(dataset, _require_trees(trees, name), aside, len(dataset.trees) - len(aside), kind="pairs")


def _as_lists(dataset: Dataset, loss: str, name: str) -> Dataset:
    """All answers of a prompt as one tree, the best first; a pair is a list of two."""
    if dataset.kind == "pairs":
        pairs = tuple(replace(t, completions=_scored_answers(t)) for t in dataset.trees)
        return replace(dataset, trees=pairs, kind="scored", fingerprint=fingerprint(pairs))
    if dataset.kind != "scored":
        what = f"{setting(loss)} needs answers with scores, but these rows are {dataset.kind}"
        raise DataError(name, what, 'give several answers of each prompt with a "score", or pairs')
    trees: list[PromptTree] = []
    aside: list[Quarantined] = []
    for group, ranked in _group_by_prompt(dataset):
        if ranked[0].score == ranked[-1].score:
            aside += _quarantine_tied(group, ranked)
        else:
            trees.append(replace(group[0], completions=tuple(ranked)))
    return _with_trees(dataset, _require_trees(trees, name), aside, len(dataset.trees) - len(aside))


def _scored_answers(tree: PromptTree) -> tuple[Completion, ...]:
    """A pair's answers with their scores, or with 1 and 0 if those are missing or do not favor the chosen one."""
    chosen, rejected = tree.completions
    if chosen.score is not None and rejected.score is not None and chosen.score > rejected.score:
        return tree.completions
    return replace(chosen, score=1.0), replace(rejected, score=0.0)


def _group_by_prompt(dataset: Dataset) -> Iterator[tuple[list[PromptTree], list[Completion]]]:
    """For each distinct prompt of scored rows, its trees and all its answers, best first."""
    by_prompt: dict[object, list[PromptTree]] = defaultdict(list)
    for tree in dataset.trees:
        by_prompt[_prompt_identity(tree)].append(tree)
    for group in by_prompt.values():
        if other := next((t for t in group if t.weight != group[0].weight), None):
            what = f"counts {other.weight:g}, and another answer of its prompt ({group[0].source}) {group[0].weight:g}"
            raise DataError(other.source, what, "all answers of a prompt are one row here: give them one weight")
        yield group, sorted((c for t in group for c in t.completions), key=lambda c: -(c.score or 0.0))


def _quarantine_tied(group: Sequence[PromptTree], ranked: Sequence[Completion]) -> list[Quarantined]:
    what = f"no two different scores among the prompt's {counted(len(ranked), 'answer')}"
    return [Quarantined(t.source, what, "give it answers with different scores, or drop it", None) for t in group]


def _require_trees(trees: list[PromptTree], name: str) -> list[PromptTree]:
    if not trees:
        how = "give each prompt answers that differ in score"
        raise DataError(name, "no prompt has two answers with different scores", how)
    return trees


def _with_scores(dataset: Dataset, loss: str, required: Set[str], options: DataConfig, name: str) -> Dataset:
    """Pairs whose scores the loss can use; the others are bad rows."""
    trees: list[PromptTree] = []
    aside: list[Quarantined] = []
    for tree in dataset.trees:
        chosen_score, rejected_score = (c.score for c in tree.completions)
        if chosen_score is None or rejected_score is None:
            what = f'{setting(loss)} needs "chosen_score" and "rejected_score"'
            how = "add them, or choose another loss"
        elif "score_gap" in required and chosen_score <= rejected_score:
            what = f'"chosen_score" ({chosen_score:g}) is not above "rejected_score" ({rejected_score:g})'
            how = "drop the row, or choose a loss without scores"
        else:
            trees.append(tree)
            continue
        if options.on_bad_row == "error":
            raise DataError(tree.source, what, f"{how} (or set data.on_bad_row=skip to keep such rows aside)")
        aside.append(Quarantined(tree.source, what, how, None))
    if not trees:
        what = f"none of {counted(len(dataset.trees), 'pair')} has the scores that {setting(loss)} needs"
        raise DataError(name, what, aside[0].how)
    return _with_trees(dataset, trees, aside)


def _as_labeled(dataset: Dataset, loss: str, options: DataConfig, name: str) -> Dataset:
    if dataset.kind in ("pairs", "unpaired"):
        return dataset
    if dataset.kind != "scored":
        what = f"{setting(loss)} needs answers with a label, but these rows are {dataset.kind}"
        raise DataError(name, what, LABEL_HINT)
    threshold = options.score_threshold
    if threshold is None:
        scores = sorted(c.score or 0.0 for t in dataset.trees for c in t.completions)
        what = f'{setting(loss)} needs labels, but these rows have a "score" (median {scores[len(scores) // 2]:g})'
        raise DataError(name, what, "set data.score_threshold: a score at or above it is good, below it is bad")
    trees = tuple(
        replace(t, completions=tuple(replace(c, label=(c.score or 0.0) >= threshold) for c in t.completions))
        for t in dataset.trees
    )
    return replace(dataset, trees=trees, kind="unpaired", fingerprint=fingerprint(trees))


def mismatched_rows(prompts: list[bytes]) -> list[int] | None:
    """For each row, the index of the next row (wrapping around) with another prompt; None if all prompts are the same.

    KTO estimates its reference point from a prompt with a completion of that other row. The partner is fixed by the order
    of the data, so that a cached reference can hold it.
    """
    n = len(prompts)
    if n == 0 or all(p == prompts[0] for p in prompts):
        return None
    partner = [0] * n
    for i in range(2 * n - 1, -1, -1):  # twice around: rows of one prompt share their partner, across the end too
        row, next_row = i % n, (i + 1) % n
        partner[row] = next_row if prompts[next_row] != prompts[row] else partner[next_row]
    return partner
