"""Arena verdicts: the biases of simulated annotators are recovered, and the verdict equals `penchant compare`'s."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from studio_people import PEOPLE, judged, texts, truth, word
from studios import arena_of

from penchant.cli import main
from penchant.compare.humans import HumanVerdict, human_verdict
from penchant.judges.humans import Preferences
from penchant.metrics.stats import share_ci, sign_flip_test


def said_of(*words: object) -> HumanVerdict:
    """The verdict on judgments, without a file."""
    return human_verdict(Preferences(Path("none.jsonl"), {w.id: w for w in words}))  # type: ignore[attr-defined]


def simulated(folder: Path, seed: int, pairs: int) -> HumanVerdict:
    answers, quality = texts(pairs, seed)
    arena = arena_of(
        folder, answers=answers, gold=12, overlap=1.0, checks=0.1, repeats=0.08, seed=seed, name=f"seed-{seed}"
    )
    return human_verdict(judged(arena, quality, seed))


def hits(found: HumanVerdict) -> dict[str, bool]:
    """Which intervals contain the true value."""
    true = truth()
    rate, alpha = found.pairs[0].win_rate, found.alpha
    assert rate is not None and alpha is not None
    made = {"win rate": rate.low <= true.win_rate <= rate.high, "alpha": alpha.low <= true.alpha <= alpha.high}
    for person in found.people:
        for what, interval, value in (
            ("left", person.left, true.left[person.name]),
            ("longer", person.longer, true.longer[person.name]),
        ):
            assert interval is not None
            made[f"{what} {person.name}"] = interval.low <= value <= interval.high
    return made


def test_biases_of_simulated_people_are_found_again(tmp_path: Path) -> None:
    found = simulated(tmp_path, 0, 160)
    assert sum(hits(found).values()) >= 11  # of 12 intervals at 95%
    ada, ben, cleo, _, eve = found.people
    assert ben.left is not None and ben.left.low > 0.5 and any("left side" in w for w in ben.warnings())
    assert cleo.longer is not None and cleo.longer.low > 0.5 and any("longer" in w for w in cleo.warnings())
    assert not any("favors" in w for w in ada.warnings())
    assert ada.checks[0] == 0 and eve.checks[0] >= 2 and any("checks" in w for w in eve.warnings())
    assert ada.with_others is not None and eve.with_others is not None
    assert ada.with_others.estimate > eve.with_others.estimate


@pytest.mark.slow
def test_every_interval_holds_what_is_true_over_twenty_seeds(tmp_path: Path) -> None:
    counts: dict[str, int] = {}
    for seed in range(20):
        for what, held in hits(simulated(tmp_path, seed, 400)).items():
            counts[what] = counts.get(what, 0) + held
    print(f"{sum(counts.values())} of {20 * len(counts)} intervals hold what is true: {counts}")
    assert len(counts) == 2 + 2 * len(PEOPLE)
    assert min(counts.values()) >= 16, counts  # at 95%, fewer than 16 of 20 happens once in 400 times
    assert sum(counts.values()) >= 0.92 * 20 * len(counts), counts


def test_the_verdict_is_that_of_the_statistics_of_compare() -> None:
    rng = np.random.default_rng(0)
    wins = rng.random(40) < 0.8
    words = [word(i, prompt=f"Prompt {i}?", verdict="a" if w else "b") for i, w in enumerate(wins)]
    found = said_of(*words)
    (pair,) = found.pairs
    assert pair.win_rate == share_ci(wins.astype(float))
    assert pair.p == sign_flip_test(np.full(40, 0.5), wins.astype(float))
    (sentence,) = found.verdict()
    assert sentence.tone == "good" and "dpo is better than start" in sentence.text
    # with the models swapped, and either answer as a
    turned = [
        word(i, prompt=f"Prompt {i}?", verdict="b" if w else "a", models=("start", "dpo")) for i, w in enumerate(wins)
    ]
    (other,) = said_of(*turned).pairs
    assert other.win_rate is not None and other.win_rate.estimate == pytest.approx(1 - wins.mean())
    mixed = said_of(*words[:20], *turned[20:])
    assert mixed.pairs[0].win_rate == pair.win_rate


def test_ties_count_one_half_and_checks_repetitions_and_skips_nothing() -> None:
    words = [word(i, prompt=f"{i}", verdict=v) for i, v in enumerate(["a", "tie", "both_bad", "skip", "b"] * 4)]
    extra = [
        word(50, gold="a", verdict="b"),
        word(51, repeat_of="ada-0", pair="p0", verdict="b"),
        word(52, repeat_of="ada-4", pair="p4", verdict="b"),
    ]
    found = said_of(*words, *extra)
    rate = found.pairs[0].win_rate
    assert rate is not None and rate.estimate == 0.5 and found.judged == 16
    assert {k: found.tally[k] for k in ("tie", "both_bad", "skip")} == {"tie": 4, "both_bad": 4, "skip": 4}
    (ada,) = found.people
    assert ada.checks == (1, 1) and ada.again is not None and ada.again.estimate == 0.5


def test_few_prompts_name_no_winner_and_few_people_are_said() -> None:
    found = said_of(*(word(i, prompt=f"{i}") for i in range(5)))
    assert [s.tone for s in found.verdict()] == ["open"] and "too few" in found.verdict()[0].text
    assert any("over prompts alone" in n for n in found.notes())


def test_people_who_differ_name_no_winner() -> None:
    """Ada and Ben prefer the first, Cleo the second. By the prompts alone it would win."""
    words = [
        word(i, who, prompt=f"{i}", pair=f"p{i}", verdict="b" if who == "cleo" else "a")
        for who in ("ada", "ben", "cleo")
        for i in range(30)
    ]
    found = said_of(*words)
    assert found.over_people and found.pairs[0].p_prompts < 0.001
    assert [s.tone for s in found.verdict()] == ["open"] and "its people differ" in found.verdict()[0].text


def test_judgements_faster_than_anybody_reads_are_counted() -> None:
    long = "word " * 200
    words = [word(i, prompt=f"{i}", answers=(long, long + "x"), seconds=s) for i, s in enumerate([1.0, 0.2, 30.0] * 4)]
    assert said_of(*words).people[0].fast == 8


def test_compare_prints_what_the_page_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = Preferences(tmp_path / "preferences.jsonl")
    for i in range(12):
        file.append(word(i, prompt=f"{i}", verdict="a" if i % 4 else "b").to_json())
    with file.path.open("a") as lines:
        lines.write("{no judgment\n")
    page = human_verdict(file.refresh())
    assert "1 line of preferences.jsonl" in page.to_text()
    assert main(["compare", "--judge", f"humans:{file.path}"]) == 0
    assert capsys.readouterr().out.strip() == page.to_text()
    assert main(["compare", "dpo", "start", "--judge", f"humans:{tmp_path}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == page.to_json()
    assert main(["compare", "dpo", "--judge", f"humans:{tmp_path}", "--json"]) == 0  # one model alone: all of its pairs
    assert json.loads(capsys.readouterr().out) == page.to_json()
    for wrong, words in (
        (["compare", "dop", "--judge", f"humans:{file.path}"], "not a model of"),
        (["compare", "--judge", f"humans:{file.path}", "--prompts", "3"], "--prompts"),
        (["compare", "--judge", "humans:none.jsonl"], "no such file"),
        (["compare"], "no run is given"),
    ):
        assert main(wrong) == 2 and words in capsys.readouterr().err
