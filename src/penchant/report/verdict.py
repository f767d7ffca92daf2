"""The verdict section: the outcome of runs and comparisons in words, and held-out figures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from penchant.base.text import counted as count
from penchant.metrics.names import METRICS, SELECTION_CAVEAT, Metric, all_tied
from penchant.report.data import Comparison, ReportData, RunData
from penchant.report.html import Element, Node, accessible_text, el, fold, labeled, note, panel, table, user_text
from penchant.report.settings import Ranking, Row, count_tried, held_out_rows, ranking, spread
from penchant.report.svg import MISSING, estimate, format_value, interval, interval_plot, number
from penchant.runfolder.values import (
    FEW_ROWS,
    ci_of,
    count_unchanged,
    mapping,
    mappings,
    num,
    sample_size,
    sequence,
    text,
)

# ---- The verdict: the outcome in words, before any figure, also if nothing was shown ----

Tone = Literal["good", "bad", "open", "plain"]
TONES: tuple[Tone, ...] = ("good", "bad", "open")
MARK = {"good": "\u25b2", "bad": "\u25bc", "open": "\u25cb", "plain": "\u2022"}
TONE_WORD = {"good": "shown: ", "bad": "worse: ", "open": "not shown: ", "plain": ""}
TONE_OF: dict[str, Tone] = {"better": "good", "worse": "bad", "unclear": "open"}
MOST = 8  # sentences of a comparison before the rest is folded
HELD_OUT = [m for m in METRICS.values() if m.label]


def statement(tone: Tone, *words: Node | Iterable[Node], lead: bool = False) -> Element:
    """A sentence of the verdict with a mark for its tone, which screen readers get in words."""
    if lead and tone == "plain":
        return el("p", *words, class_="lead bare")
    mark = el("span", MARK[tone], class_=f"mark {tone}", aria_hidden="true")
    spoken = el("span", TONE_WORD[tone], class_="spoken") if TONE_WORD[tone] else None
    return el("p", mark, spoken, el("span", *words), class_="lead" if lead else None)


def verdict(data: ReportData) -> Element:
    """All sentences of the verdict, starting with those of comparisons."""
    parts = [part for comparison in data.comparisons for part in comparison_statements(comparison)]
    if data.kind == "run" and data.runs:
        parts += run_statements(data.runs[0], first=not parts)
    elif len(data.runs) > 1 and (data.kind != "comparison" and not (data.comparisons and data.kind == "pipeline")):
        parts += runs_statements(data)
    if not parts:
        message = "Nothing can be said yet: there is no held-out figure in this folder."
        parts.append(statement("open", message, lead=True))
    return el("div", parts, class_="verdict")


def headline(data: ReportData) -> str:
    """The first sentence of the verdict, as plain text for a terminal."""
    texts = (accessible_text(part) for part in verdict(data).children if isinstance(part, Element))
    return next(texts, "").replace("\u2019", "'")


# ---- a comparison -------------------------------------------------------------------------------------------------


def comparison_statements(comparison: Comparison) -> list[Node]:
    """The comparison's own sentences, heading and notes."""
    figures = comparison.figures
    sentences = [text(s) for s in sequence(figures.get("sentences"))]
    entries = [mapping(v) for v in sequence(figures.get("verdict"))]
    entries += [{}] * (len(sentences) - len(entries))  # older files have no tones
    if not sentences:
        reason = " holds no verdict: it was not finished, or was written by an older version."
        return [statement("open", user_text(comparison.name), reason, lead=True)]
    tones: list[Tone] = [next((tone for tone in TONES if tone == a.get("tone")), "plain") for a in entries]
    judges = [text(a.get("by")) for a in entries]
    tagged = [(by, tone, user_text(s, tag="span")) for by, tone, s in zip(judges, tones, sentences, strict=False)]
    by_others = [statement(tone, words) for by, tone, words in tagged if by]
    main = [(tone, words) for by, tone, words in tagged if not by]
    if not main:  # only a judge's comparison
        main, by_others = [(tone, words) for _, tone, words in tagged], []
    statements = [statement(tone, words, lead=i == 0) for i, (tone, words) in enumerate(main)]
    parts: list[Node] = [*statements[:MOST]]
    folded = ((count(len(main) - MOST, "more sentence"), statements[MOST:]), ("The same by other rewards", by_others))
    for title, rest in folded:
        parts += [fold(title, rest, key=f"verdict-{comparison.name}-{title}")] if rest else []
    heading = text(figures.get("heading"))
    notes = [text(n) for n in sequence(figures.get("notes")) if text(n)]
    if heading:
        parts.append(note(user_text(heading, tag="span")))
    if notes:
        items = [el("li", user_text(n.removeprefix("- "), tag="span")) for n in notes]
        parts.append(el("ul", items, class_="soft small notes"))
    return parts


# ---- a run --------------------------------------------------------------------------------------------------------


def run_statements(run: RunData, first: bool = True) -> list[Node]:
    """Changes since the start on held-out rows, in words."""
    statements: list[Node] = []
    recorded = text(run.results.get("verdict"))
    if recorded:
        statements.append(statement("plain", user_text(recorded, tag="span"), lead=True))
    by_name = {c.figure.name: c for c in changes(run)}
    if not by_name or not num(run.last, "step"):
        reason = "Nothing was held out" if not run.evals else "Only the start was evaluated so far"
        if not recorded:
            statements.append(statement("plain", f"{reason}, so there is no comparison with the start.", lead=first))
        return statements
    main_changes = [c for n, c in by_name.items() if c.figure.main and not (n == "loss" and "reward" in by_name)]
    unchanged, n = count_unchanged(run.samples)
    all_unchanged = 0 < n == unchanged  # even if likelihoods changed, users see the same answers
    for i, change in enumerate(main_changes):
        lead = first and i == 0 and not recorded
        tone = "open" if all_tied(run.last, f"eval/{change.figure.name}") else TONE_OF.get(change.reading, "plain")
        statements.append(
            statement("plain" if all_unchanged and tone == "good" else tone, _sentence(change, run), lead=lead)
        )
    if all_unchanged:
        statements.insert(
            1 if statements else 0, statement("open", f"{unchanged} of {n} sampled answers are unchanged by training.")
        )
    if (kl := by_name.get("kl/k3")) is not None:
        shift, ci = el("b", estimate(kl.after, kl.after_ci)), f" {kl.brackets}" if kl.brackets else ""
        statements.append(statement("plain", "It moved ", shift, ci, " nats per completion away from the start (KL)."))
    judged = [c for c in main_changes if c.reading != "plain"]
    if judged and all(c.reading == "unclear" for c in judged):
        rows = num(run.last, "eval/rows")
        words = "No figure differs from chance on the held-out rows."
        if recorded:
            rows_text = "" if rows is None else f"{rows:,.0f} "
            words = f"On the {rows_text}held-out rows no figure differs from chance."
        elif all(c.figure.null is None for c in judged):  # only losses, which have no chance level
            words = "The intervals of start and end overlap on the held-out rows, so a change is not shown; more rows narrow them."
        summary = statement("open", words, lead=first and not recorded)
        position = 1 if recorded else 0
        statements = [*statements[:position], summary, *(_without_lead(m) for m in statements[position:])]
    return statements


def _without_lead(node: Node) -> Node:
    if isinstance(node, Element) and ("class", "lead") in node.attributes:
        return Element(node.tag, (), node.children)
    return node


def _sentence(c: Change, run: RunData) -> list[Node]:
    share, name = c.figure.share, f"eval/{c.figure.name}"
    rows, n = num(run.last, "eval/rows"), sample_size(run.last, name)
    value = el("b", estimate(c.after, c.after_ci, share))
    brackets = f" {c.brackets}" if c.brackets else ""
    scope = f" of {count(rows, 'held-out row')}" if rows is not None else " of the held-out rows"
    if share and c.figure.null is not None and n:
        label = c.figure.label[0].upper() + c.figure.label[1:]
        unit = "prompts" if c.figure.name == "win_rate" else "rows"
        if all_tied(run.last, name):
            tied_text = el("b", f"tied on {n:,} of {n:,} held-out {unit}")
            return [f"{label}: ", tied_text, ", so this reward cannot tell one answer from the other."]
        if n < FEW_ROWS:
            return [f"{label}: ", el("b", f"{c.after * n:g} of {n:,} held-out {unit}"), ", too few to tell."]
    if c.figure.name == "rewards/accuracies":
        scores = run.method == "reward_model"
        subject = (
            "The reward model scores the chosen answer higher in "
            if scores
            else "The policy prefers the chosen answer in "
        )
        return [subject, value, brackets, scope, _null_clause(c)]
    if c.figure.name == "win_rate":
        scope = " of comparisons with the start\u2019s"
        return ["Its completions win ", value, brackets, scope, _null_clause(c)]
    label = c.figure.label[0].upper() + c.figure.label[1:]
    if c.before is None:
        return [f"{label} is ", value, brackets, "; the start was not evaluated."]
    change = f" (a change of {interval(*c.change_ci)}, row by row)" if c.change_ci is not None else ""
    return [f"{label} went from {format_value(c.before, share)} to ", value, brackets, change, _start_clause(c)]


def _null_clause(c: Change) -> str:
    clauses = {
        "better": "; the interval lies above one half.",
        "worse": "; the interval lies below one half.",
        "unclear": "; the interval includes one half, which chance gives.",
    }
    return clauses.get(c.reading, ".")


def _start_clause(c: Change) -> str:
    if c.reading == "unclear":
        return "; the interval includes the start."
    return f"; {c.reading} than the start by its interval." if c.reading in ("better", "worse") else "."


def cards(run: RunData) -> Element | None:
    """The goals recorded with a run (`penchant demo`), and whether each was met."""
    elements = []
    for h in mappings(run.results.get("headline")):
        after, before = num(h, "after"), num(h, "before")
        ci = ci_of({"x/ci": h.get("ci")}, "x")
        share = "win rate" in text(h.get("name")).lower()
        start = el("span", f"{number(before)} \u2192 ", class_="soft") if before is not None else None
        name, value = (
            el("dt", user_text(text(h.get("name")))),
            el("dd", start, format_value(after, share), class_="value"),
        )
        remark = el("dd", _card_note(h, ci, share), class_="soft small")
        elements.append(el("div", name, value, remark, _goal_status(h), class_="card"))
    return el("dl", elements, class_="cards") if elements else None


def _card_note(headline: Mapping[str, Any], ci: tuple[float, float] | None, share: bool) -> str:
    change, ratio = num(headline, "change"), num(headline, "ratio")
    parts = [f"change {estimate(change, ci)}"] if change is not None else []
    parts += [interval(*ci, share and change is None)] if ci else []
    parts += [f"ratio {number(ratio)}"] if ratio is not None else []
    return " ".join(parts)


def _goal_status(headline: Mapping[str, Any]) -> Element | None:
    if "goal" not in headline:
        return None
    met = headline.get("met") is True
    words = ("\u2713 met: " if met else "\u2717 not met: ", user_text(text(headline.get("goal"))))
    return el("dd", *words, class_="met" if met else "unmet")


# ---- several runs -------------------------------------------------------------------------------------------------


def runs_statements(data: ReportData) -> list[Node]:
    """The best setting by validation, with caveats."""
    progress = _progress(data)
    ranked = ranking(data)
    if ranked is None:
        scope = f"{count(len(data.runs), 'run')} of {count(len(data.settings), 'setting')}"
        message = f"{scope}, none of them with a figure on held-out rows at its end."
        return [statement("open", message, lead=True), *progress]
    best = ranked.best
    if not best:
        message = "No setting has finished with all its seeds, so none is called best."
        return [statement("open", message, lead=True), *progress]
    share = ranked.figure.share
    names: list[Node] = []
    for row in best:
        names += [" and " if names else None, *labeled(row.setting.key, row.setting.name)]
    rows = held_out_rows(data)
    rows_text = f" on {count(rows[0], 'held-out row')}" if len(rows) == 1 else ""
    single = count_tried(data) == 1
    figure = (
        f", {ranked.figure.title} {estimate(best[0].mean, best[0].ci, share)}{rows_text} ({spread(best[0], share)})."
    )
    opening = "" if single else f"Best by validation of {count_tried(data)} settings: "
    statements: list[Node] = [statement("plain", opening, names, figure.replace(" ()", ""), lead=True)]
    statements += _caveats(ranked, best)
    if not single:
        statements.append(statement("plain", SELECTION_CAVEAT))
    return [*statements, *_halving_statements(data), *progress]


def _halving_statements(data: ReportData) -> list[Node]:
    """A sentence on the runs that successive halving stopped early."""
    states = [text(mapping(r).get("state")) for r in mapping(data.sweep.get("runs")).values()]
    n = states.count("cut")
    if not n:
        return []
    verb = "it has" if n == 1 else "they have"
    words = f"{count(n, 'run was', 'runs were')} stopped early by successive halving: {verb} no result, only a rank at a rung, and what is cut early might have won later."
    return [statement("open", words)]


def _caveats(ranked: Ranking, best: tuple[Row, ...]) -> list[Node]:
    parts: list[Node] = []
    others = [r for r in ranked.rows if r.values and r.is_complete and r not in best]
    if others and len(best) == 1:
        runner_up = others[0]
        (a, b), (c, d) = best[0].range, runner_up.range
        kind = "Seeds" if len(best[0].values) > 1 or len(runner_up.values) > 1 else "Intervals"
        label = labeled(runner_up.setting.key, runner_up.setting.name)
        overlap = a <= d and c <= b
        ending = ", overlap: nothing here tells the two apart." if overlap else ", do not overlap."
        parts.append(statement("open" if overlap else "plain", f"{kind} of it and of the next, ", label, ending))
    null = ranked.figure.null
    cis = [ci for r in ranked.rows for run in r.setting.runs if (ci := ci_of(run.last, f"eval/{ranked.figure.name}"))]
    if null is not None and cis:
        above = sum(low > null if ranked.up else high < null for low, high in cis)
        level, side = "one half" if null == 0.5 else number(null), "above" if ranked.up else "below"
        tone: Tone = "good" if above == len(cis) else "open" if not above else "plain"
        parts.append(statement(tone, f"In {above} of {count(len(cis), 'run')} the 95% interval lies {side} {level}."))
    return parts


def _progress(data: ReportData) -> list[Node]:
    states = [r.status for r in data.runs]
    unfinished = ("running", "paused", "interrupted", "stopped", "killed")
    parts = [f"{states.count('finished')} of {count(len(states), 'run')} finished"]
    parts += [f"{n} {word}" for word in unfinished if (n := states.count(word))]
    done = states.count("finished") == len(states)
    return [] if done else [statement("plain", f"{', '.join(parts)}.")]


# ---- Held-out figures of a run: at the start and at the end, with intervals, drawn next to the chance level ----

Pair = tuple[float, float] | None
Reading = Literal["better", "worse", "moved", "unclear", "plain"]


@dataclass(frozen=True, slots=True)
class Change:
    """A figure at the start and at the end of a run.

    Args:
        before: None if it was not evaluated at the start.
        change_ci: interval of the change since the start, paired by row; None if unknown.
    """

    figure: Metric
    before: float | None
    before_ci: Pair
    after: float
    after_ci: Pair
    change_ci: Pair = None

    @property
    def brackets(self) -> str:
        """The interval as text; empty if it has no width."""
        ci = self.after_ci
        return interval(*ci, self.figure.share) if ci and ci[0] < ci[1] else ""

    @property
    def reading(self) -> Reading:
        """What the intervals show.

        ``better`` or ``worse``; ``moved`` if neither direction is better; ``unclear`` if nothing is shown; ``plain`` without an interval
        or a value to compare with.
        The interval of the paired change must exclude zero. Without one, the figure's interval must exclude its null value (one half,
        zero) or, if it has none, not overlap the start's interval, which is stricter than a paired test.
        """
        if self.after_ci is None:
            return "plain"
        if self.change_ci is not None:
            low, high = self.change_ci
            up = self.figure.better == "higher"
            return "unclear" if low <= 0 <= high else "better" if (low > 0) == up else "worse"
        baseline: Pair = (self.figure.null, self.figure.null) if self.figure.null is not None else self.before_ci
        if baseline is None and self.before is not None:
            baseline = (self.before, self.before)
        if baseline is None:
            return "plain"
        if self.after_ci[0] <= baseline[1] and self.after_ci[1] >= baseline[0]:
            return "unclear"
        if self.figure.better not in ("higher", "lower"):
            return "moved"
        return "better" if (self.after_ci[0] > baseline[1]) == (self.figure.better == "higher") else "worse"


def changes(run: RunData) -> list[Change]:
    """Every known figure of the last evaluation, with its value at the start."""
    first: Mapping[str, Any] = run.first if len(run.evals) > 1 else {}
    figure_changes = []
    for figure in HELD_OUT:
        name = f"eval/{figure.name}"
        after = num(run.last, name)
        if after is not None:
            change = ci_of(run.last, "eval/loss_change") if figure.name == "loss" else None
            figure_changes.append(
                Change(figure, num(first, name), ci_of(first, name), after, ci_of(run.last, name), change)
            )
    return figure_changes


def held_out(run: RunData) -> Element | None:
    """Table of held-out figures at start and end; None if nothing was evaluated."""
    figure_changes = changes(run)
    if not figure_changes:
        return None
    with_start = any(c.before is not None for c in figure_changes)
    rows = [_row(c, with_start) for c in figure_changes]
    head: list[Node] = ["figure", *(["start"] if with_start else []), "end", "95% interval, by prompt", ""]
    row_count, step = num(run.last, "eval/rows"), num(run.last, "step") or 0
    caption = f"At step {step:,.0f}" + (f", over {count(row_count, 'held-out row')}" if row_count is not None else "")
    numeric = (1, 2, 3) if with_start else (1, 2)
    return panel(head, rows, numeric=numeric, caption=caption, class_="held")


def _row(c: Change, has_start: bool) -> list[Node]:
    share = c.figure.share
    unit = el("small", f" {c.figure.unit}") if c.figure.unit else None
    meaning = el("small", c.figure.meaning, class_="what")
    name = el("span", c.figure.label, unit, meaning)
    before = [MISSING if c.before is None else format_value(c.before, share)] if has_start else []
    after = el("b", estimate(c.after, c.after_ci, share))
    return [name, *before, after, c.brackets, el("span", _strip(c), class_="marks")]


def _strip(c: Change) -> Node:
    null = c.figure.null if c.figure.null is not None else c.before
    if c.after_ci is None or null is None or not c.brackets:
        return None
    values = [null, *c.after_ci, c.after]
    margin = (max(values) - min(values)) * 0.08
    return interval_plot(c.after, c.after_ci, null, min(values) - margin, max(values) + margin)


def by_length(run: RunData) -> Element | None:
    """A reward model's accuracy in quartiles of the length gap; None if there are no such figures."""
    length = mapping(run.calibration.get("length"))
    rows: list[Sequence[Node]] = []
    for q in sequence(length.get("quartiles")):
        low, high, size, accuracy = (num(q, k) for k in ("from", "to", "rows", "accuracy"))
        rows.append([f"{format_value(low)} to {format_value(high)}", format_value(size), format_value(accuracy, True)])
    if not rows:
        return None
    rule = num(length, "longer_wins")
    head, caption = (
        ["chosen \u2212 rejected, tokens", "pairs", "accuracy"],
        "Accuracy by length: held-out pairs in quartiles",
    )
    remark = note(f"The rule that the longer answer wins is right for {format_value(rule, True)} of them.")
    return el("div", table(head, rows, numeric=(1, 2), caption=caption), remark, class_="panel")
