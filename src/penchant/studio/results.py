"""The results of an arena, as a page of the studio and as a file that can be read offline."""

from __future__ import annotations

import time

from penchant import __version__
from penchant.base.text import counted
from penchant.compare.humans import Annotator, HumanVerdict, human_verdict
from penchant.judges.humans import Preferences
from penchant.metrics.stats import Interval
from penchant.report.html import Element, Node, document, el, note, panel, user_text
from penchant.runfolder.values import format_p

MARKS = {"good": "●", "open": "○", "plain": "·"}


def results_page(name: str, preferences: Preferences) -> str:
    """Render the offline page, one self-contained file."""
    verdict = human_verdict(preferences.refresh())
    now = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    body = el(
        "main",
        el(
            "header",
            el("p", "Penchant arena", class_="kicker"),
            el("h1", user_text(name)),
            el("p", f"Written by Penchant {__version__}, {now}. This file loads nothing.", class_="soft facts-line"),
        ),
        results_body(verdict),
    )
    return document(f"{name} · Penchant arena", str(body))


def results_body(verdict: HumanVerdict) -> Element:
    """Render the verdict, its caveats, and a row for every pair of models and every person."""
    if not verdict.people:
        return el("p", "Nobody has judged anything yet.", class_="soft")
    lines = verdict.verdict()
    sentences = [
        el("p", el("span", MARKS[s.tone], class_=f"mark {s.tone}", aria_hidden="true"), user_text(s.text, "span"))
        for s in lines
    ]
    return el(
        "div",
        el("section", sentences, id="verdict", class_="verdict", aria_label="Verdict"),
        el("ul", [el("li", user_text(n)) for n in verdict.notes()], class_="notes"),
        _tally_cards(verdict),
        el("section", el("h2", "Models"), _models_table(verdict), aria_label="Models") if verdict.pairs else None,
        el("section", el("h2", "People"), _people_table(verdict), aria_label="People"),
        note(
            "Win rates, intervals and p-values are those of penchant compare: ties and both bad count one half; checks and repetitions "
            "say nothing about the models. Left and longer: share of decided pairs; without a bias for a side, left is 50%."
        ),
    )


def _tally_cards(verdict: HumanVerdict) -> Element:
    tally = verdict.tally
    cards: list[tuple[str, str, str]] = [
        ("Judgments", f"{verdict.judged:,}", f"by {verdict.by}"),
        ("Ties", f"{tally['tie']:,}", "neither is better"),
        ("Both bad", f"{tally['both_bad']:,}", "neither is any good"),
        ("Skipped", f"{tally['skip']:,}", f"{tally['undone']:,} taken back"),
    ]
    if verdict.alpha is not None:
        alpha = verdict.alpha
        caption = f"[{alpha.low:z.2f}, {alpha.high:z.2f}] on {counted(verdict.shared, 'shared pair')}"
        cards.insert(1, ("Krippendorff's alpha", f"{alpha.estimate:z.2f}", caption))
    return el(
        "dl",
        [
            el(
                "div",
                el("dt", head),
                el("dd", value, class_="value"),
                el("dd", caption, class_="soft small"),
                class_="card",
            )
            for head, value, caption in cards
        ],
        class_="cards",
    )


def _models_table(verdict: HumanVerdict) -> Element:
    rows: list[list[Node]] = []
    for pair in verdict.pairs:
        rows.append(
            [
                el("span", user_text(pair.name), " over ", user_text(pair.other)),
                _percent(pair.win_rate),
                _interval_svg(pair.win_rate),
                _percent(pair.equal_length),
                format_p(pair.corrected),
                f"{verdict.prompts[pair.name, pair.other]:,}",
            ]
        )
    head = ["Models", "Win rate", "", "At equal length", "p (corrected)", "Prompts"]
    return panel(head, rows, numeric=(1, 3, 4, 5), caption="Win rates with 95% intervals")


def _people_table(verdict: HumanVerdict) -> Element:
    rows = [_person_row(p) for p in verdict.people]
    win_rate_columns = [f"Win rate of {verdict.pairs[0].name}"] if len(verdict.pairs) == 1 else ["Win rate"]
    head: list[Node] = [
        "Name",
        "Judged",
        *win_rate_columns,
        "Left",
        "Longer",
        "With others",
        "Again",
        "Checks failed",
        "Seconds",
    ]
    return panel(head, rows, numeric=(1, 2, 3, 4, 5, 6, 7, 8), caption="Each person, with 95% intervals")


def _person_row(p: Annotator) -> list[Node]:
    failed, checks = p.checks
    return [
        user_text(p.name),
        f"{p.judged:,}",
        _percent(p.wins),
        _percent(p.left),
        _percent(p.longer),
        _percent(p.with_others),
        _percent(p.again),
        f"{failed} of {checks}" if checks else "-",
        "-" if p.seconds is None else f"{p.seconds:.1f}",
    ]


def _percent(share: Interval | None) -> Node:
    if share is None:
        return "-"
    return el("span", f"{share.estimate:.0%} ", el("small", f"[{share.low:.0%}, {share.high:.0%}]"), class_="ci")


def _interval_svg(share: Interval | None) -> Node:
    """Draw an interval on a line from 0 to 1 with a tick at one half."""
    if share is None:
        return None
    x, low, high = (4 + 152 * v for v in (share.estimate, share.low, share.high))
    return el(
        "svg",
        el("line", x1=4.0, x2=156.0, y1=10.0, y2=10.0, class_="axis"),
        el("line", x1=80.0, x2=80.0, y1=3.0, y2=17.0, class_="half"),
        el("line", x1=low, x2=high, y1=10.0, y2=10.0, class_="interval"),
        el("circle", cx=x, cy=10.0, r=4.0, class_="point"),
        viewBox="0 0 160 20",
        class_="share",
        aria_hidden="true",
    )
