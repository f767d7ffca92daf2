"""Trust flags about a run's data: cut rows, bad rows, nothing held out, samples that training did not change."""

from __future__ import annotations

from penchant.base.text import counted
from penchant.flags.rule import Finding, RunView, finding, percent
from penchant.runfolder.values import count_unchanged


def _cut_rows(run: RunView) -> Finding | None:
    prompts, total = run.audit_count("cut_prompts")
    answers, _ = run.audit_count("cut_completions")
    cut = run.audit_count("cut_rows")[0] or max(prompts, answers)
    if not total or cut / total <= run.trust.cut_rows:
        return None
    data = run.section("data")
    eos = "" if data.get("add_eos") is False else " and with it EOS"
    parts = [f"{answers:,} lost the end of an answer{eos}"] if answers else []
    parts += [f"{prompts:,} lost the start of the prompt"] if prompts else []
    sentence = f"{cut:,} of {counted(total, 'row')} ({percent(cut / total)}) are cut at data.max_length {data.get('max_length', '')}: {', '.join(parts)}."
    return finding(sentence, "rows cut, answers without their end, prompts without their start", cut, answers, prompts)


def _bad_rows(run: RunView) -> Finding | None:
    (bad_read, n), (bad_tokenized, _) = run.audit_count("bad_rows"), run.audit_count("bad_after_tokenising")
    bad = bad_read + bad_tokenized
    if not n or bad / n <= run.trust.bad_rows:
        return None
    return finding(
        f"{bad:,} of {counted(n, 'row')} ({percent(bad / n)}) are bad and left out of training.", "bad rows", bad
    )


def _nothing_held_out(run: RunView) -> Finding | None:
    data = run.section("data")
    holdouts = [data.get(key) for key in ("eval_path", "validation_rows", "validation_fraction")]
    if not data or any(holdouts) or run.evals:
        return None
    sentence = "Nothing is held out, so there is no way to tell how the model does on rows that it has not seen."
    return finding(sentence, "held-out rows", 0, level="note")


def _samples_unchanged(run: RunView) -> Finding | None:
    unchanged, n = count_unchanged(run.samples)
    if not n or unchanged < n:
        return None
    return finding(
        f"{unchanged} of {n} sampled answers are unchanged by training.",
        "sampled answers that are unchanged",
        unchanged,
        level="note",
    )


OF_RUN = {
    "cut_rows": _cut_rows,
    "bad_rows": _bad_rows,
    "nothing_held_out": _nothing_held_out,
    "samples_unchanged": _samples_unchanged,
}
