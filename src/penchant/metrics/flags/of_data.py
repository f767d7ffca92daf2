"""Trust rules about a run's data: its rows, held-out rows, ties of its reward, and samples."""

from __future__ import annotations

from penchant.base.text import counted
from penchant.metrics.flags.rule import Finding, RunView, finding, percent
from penchant.metrics.names import TIES
from penchant.runfolder.values import algorithm_of, count_unchanged, num, sample_size


def _cut_rows(run: RunView) -> Finding | None:
    prompts, of = run.audit_count("cut_prompts")
    answers, _ = run.audit_count("cut_completions")
    either = run.audit_count("cut_rows")[0] or max(prompts, answers)
    if not of or either / of <= run.trust.cut_rows:
        return None
    data = run.section("data")
    eos = "" if data.get("add_eos") is False else " and with it EOS"
    parts = [f"{answers:,} lost the end of an answer{eos}"] if answers else []
    parts += [f"{prompts:,} lost the start of the prompt"] if prompts else []
    sentence = f"{either:,} of {counted(of, 'row')} ({percent(either / of)}) are cut at data.max_length {data.get('max_length', '')}: {', '.join(parts)}."
    return finding(
        sentence, "rows cut, answers without their end, prompts without their start", either, answers, prompts
    )


def _bad_rows(run: RunView) -> Finding | None:
    (read, of), (tokens, _) = run.audit_count("bad_rows"), run.audit_count("bad_after_tokenising")
    bad = read + tokens
    if not of or bad / of <= run.trust.bad_rows:
        return None
    return finding(
        f"{bad:,} of {counted(of, 'row')} ({percent(bad / of)}) are bad and left out of training.", "bad rows", bad
    )


def _nothing_held_out(run: RunView) -> Finding | None:
    data = run.section("data")
    asked = [data.get(key) for key in ("eval_path", "validation_rows", "validation_fraction")]
    if not data or any(asked) or run.evals:
        return None
    sentence = "Nothing is held out, so there is no way to tell how the model does on rows that it has not seen."
    return finding(sentence, "held-out rows", 0, level="note")


def _tied(run: RunView) -> Finding | None:
    last = run.evals[-1] if run.evals else {}
    if not num(last, "step"):  # before training most losses tie every pair
        return None
    cannot = "This reward cannot tell them apart."
    learned = cannot if algorithm_of(run.config) else "The policy has hardly moved from its reference."
    for name, what, tied, so in (
        ("win_rate", "prompts", "the run's completion and its start's", cannot),
        ("rewards/accuracies", "pairs", "both answers", learned),
    ):
        ties, n = num(last, f"eval/{TIES[name]}"), sample_size(last, f"eval/{name}")
        if ties is not None and ties >= run.trust.ties and n:
            sentence = f"Tied on {round(ties * n):,} of {n:,} held-out {what}: {tied} have the same reward. {so}"
            return finding(sentence, "share of ties", ties, level="warning" if so == cannot else "note")
    return None


def _samples_unchanged(run: RunView) -> Finding | None:
    same, n = count_unchanged(run.samples)
    if not n or same < n:
        return None
    return finding(
        f"{same} of {n} sampled answers are unchanged by training.",
        "sampled answers that are unchanged",
        same,
        level="note",
    )


OF_RUN = {
    "cut_rows": _cut_rows,
    "bad_rows": _bad_rows,
    "nothing_held_out": _nothing_held_out,
    "tied": _tied,
    "samples_unchanged": _samples_unchanged,
}
