"""The streaming audit: the same findings as in memory, all planted problems are found, and memory is bounded."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from audit_rows import Row, edited, pair, planted, text, write
from rows import from_rows

from penchant.data.audit import Leakage, audit, audit_files, languages
from penchant.data.audit.counters import (
    RewardDisagreement,
    TextCheck,
    calibrate,
    earlier_match,
    edges_in_cycles,
    refuses,
)
from penchant.data.audit.findings import (
    KEPT,
    Finding,
    Places,
    balance_finding,
    estimated_finding,
    quantiles,
    wilson_interval,
)
from penchant.data.layouts import LAYOUTS
from penchant.data.load import load_preferences
from penchant.errors import DataError

EXPECTED = {
    "bad_rows": ["19", "20"],
    "identical_pairs": ["19"],
    "empty_completions": ["20"],
    "duplicates": ["9 (as 1)"],
    "contradictions": ["11 (against 2)"],
    "near_duplicates": ["10 (as 1)", "12 (as 11)"],
    "near_contradictions": ["12 (against 2)"],
    "near_identical": ["13"],
    "cycles": ["14", "15", "16"],
    "refusals_chosen": ["17"],
    "refusals_rejected": [],
    "pii_email": ["18"],
    "secrets_api_key": ["18"],
    "secrets_random_token": [],
}


def test_everything_that_is_planted_is_found_and_nothing_else(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", planted())
    result = audit_files({"a": str(path)}, languages=False)
    found = {n: [w.replace("a.jsonl:", "") for w in result.findings[n].where] for n in EXPECTED}
    assert found == EXPECTED
    for name, places in EXPECTED.items():
        assert result.findings[name].count == len(places)
    assert "AKIAABCD" not in json.dumps(result.to_json()) + result.to_text(whole=True)  # found values are never shown
    assert "a@b.co" not in json.dumps(result.to_json())


@pytest.mark.parametrize("extra", [{}, {"language": "en"}, {"labels": 1, "human_ref_A": "a", "human_ref_B": "b"}])
def test_in_memory_and_in_one_pass_find_the_same(tmp_path: Path, extra: Row) -> None:
    path = write(tmp_path / "a.jsonl", [row | extra for row in planted()])
    whole = audit(load_preferences(str(path), on_bad_row="skip"), path=str(path))
    assert audit_files({"a": str(path)}).to_json() == whole.to_json()


@pytest.mark.parametrize(
    "rows",
    [
        [{"prompt": text(i), "completion": text(i + 50), "label": i % 3 > 0} for i in range(9)],
        [{"prompt": text(i), "completion": text(i + 50), "score": i / 3} for i in range(9)],
        [{"prompt": text(i)} for i in range(9)],
        [{"text": text(i)} for i in range(9)],
        [{"prompt": text(i), "completion": text(i + 50)} for i in range(9)],
    ],
)
def test_of_every_kind(tmp_path: Path, rows: list[Row]) -> None:
    path = write(tmp_path / "a.jsonl", [*rows, rows[0]])
    whole = audit(load_preferences(str(path), on_bad_row="skip"), path=str(path))
    made = audit_files({"a": str(path)})
    assert made.to_json() == whole.to_json() and made.findings["duplicates"].where == ("a.jsonl:10 (as a.jsonl:1)",)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_of_every_layout(layout: str) -> None:
    path = str(Path(__file__).parent / "layouts" / f"{layout}.jsonl")
    rows = load_preferences(path, on_bad_row="skip")
    made = audit_files({"a": path})
    assert made.to_json() == audit(rows, path=path).to_json()
    aside = made.findings["bad_rows"].count + made.findings["left_out"].count
    assert aside == len(rows.quarantined) and f"layout {layout}" in made.layout


@pytest.mark.parametrize(
    ("layout", "option"),
    [(n, {o: c}) for n, layout in LAYOUTS.items() for o, option in layout.options.items() for c in option.choices],
)
def test_of_every_option_of_a_layout(layout: str, option: dict[str, str]) -> None:
    path = str(Path(__file__).parent / "layouts" / f"{layout}.jsonl")
    how: dict[str, Any] = {"shape": layout, "layout_options": option}
    rows = load_preferences(path, on_bad_row="skip", **how)
    assert audit_files({"a": path}, **how).to_json() == audit(rows, path=path).to_json()


def test_leakage_exact_and_near(tmp_path: Path) -> None:
    train, test = [pair(i) for i in range(6)], [pair(i) for i in range(20, 24)]
    test[1]["prompt"] = train[4]["prompt"].upper()
    test[2]["prompt"] = edited(train[5]["prompt"])
    paths = {"train": str(write(tmp_path / "train.jsonl", train)), "test": str(write(tmp_path / "test.jsonl", test))}
    found = audit_files(paths, languages=False).findings
    assert found["leakage_train_test"].where == ("test.jsonl:2 (as train.jsonl:5)",)
    assert found["near_leakage_train_test"].where == ("test.jsonl:3 (as train.jsonl:6)",)
    assert found["leakage_train_test"].of == 4
    splits = {name: load_preferences(p) for name, p in paths.items()}
    held = audit(splits["train"], splits=splits).findings
    assert held["near_leakage_train_test"] == found["near_leakage_train_test"]


def test_a_chain_through_one_split_does_not_leak_into_itself() -> None:
    leakage = Leakage(["a", "b"])
    for i, row in enumerate(from_rows([pair(0), pair(0), pair(1)], name="x").trees):
        leakage.update(int(i == 2), row)
    assert [f.count for _, f in leakage.findings()] == [0, 0]


def test_position_bias_where_the_layout_tells() -> None:
    rows = [pair(i) | {"winner_model_a": int(i < 3), "winner_model_b": int(3 <= i < 4)} for i in range(5)]
    found = audit(from_rows(rows)).findings["position_bias"]
    assert (found.count, found.of) == (3, 4) and found.interval == wilson_interval(3, 4)
    unknown = audit(from_rows([pair(0)])).findings["position_bias"]
    assert unknown.of == 0 and "not known" in unknown.note


def test_languages_as_a_column_says_or_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [pair(i) | {"language": "de" if i else "en"} for i in range(4)]
    assert audit(from_rows(rows)).findings["languages"].note == "as the rows say: de 75.0%, en 25.0%"
    english = [
        {"prompt": "p", "completion": f"The quick brown fox number {i} jumps over the lazy dog again."}
        for i in range(6)
    ]
    german = [
        {"prompt": "p", "completion": "Der schnelle braune Fuchs springt wieder einmal \u00fcber den faulen Hund."}
    ]
    if languages.guesser() is not None:
        found = audit(from_rows([*english, *german, {"prompt": "p", "completion": "42"}])).findings["languages"]
        assert (found.count, found.of) == (6, 8) and "en 75.0%" in found.note and "de 12.5%" in found.note
    monkeypatch.setattr(languages, "guesser", lambda: None)
    assert "pip install" in audit(from_rows(english)).findings["languages"].note


def test_the_sample_is_the_same_each_time_and_even(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(languages, "SAMPLE", 50)
    monkeypatch.setattr(languages, "guesser", lambda: lambda t: t.split()[0])
    rows = [{"prompt": "p", "completion": f"{'left' if i < 500 else 'right'} {text(0, 9)}"} for i in range(1000)]
    first, second = (audit(from_rows(rows)).findings["languages"] for _ in range(2))
    assert first == second and first.of == 50 and 25 <= first.count <= 38


def test_reward_disagreement_and_its_calibration() -> None:
    rows = [
        {"prompt": f"p{i}", "chosen": f"good {i} " + "w " * (9 if i % 4 else 1), "rejected": f"bad {i} w w w"}
        for i in range(40)
    ]

    def reward(prompts: Any, completions: Any) -> list[float]:
        assert len(prompts) == len(completions)
        return [float(len(c.split())) for c in completions]

    found = audit(from_rows(rows), languages=False, counters=[RewardDisagreement("words", reward)]).findings[
        "reward_disagreement"
    ]
    assert (found.count, found.of) == (10, 40) and found.interval == wilson_interval(10, 40)
    assert set(found.where) == {f"rows:{i + 1}" for i in range(0, 40, 4)}


def test_calibration_in_closed_form() -> None:
    # margins are +1 in a share p of the pairs and -1 in the rest, so the most likely s is logit(p)
    margins = np.r_[np.ones(80), -np.ones(20)]
    assert calibrate(margins) == pytest.approx(np.log(4), abs=1e-9)
    assert calibrate(2 * margins) == pytest.approx(np.log(4) / 2, abs=1e-9)
    assert calibrate(-margins) == 0.0 and calibrate(np.empty(0)) == 0.0


def test_a_persons_own_function() -> None:
    rows = [pair(i) for i in range(50)]
    rows[7]["rejected"] = "rude " + rows[7]["rejected"]
    found = audit(from_rows(rows), counters=[TextCheck("rude", lambda texts: ["rude" in t for t in texts])]).findings[
        "check_rude"
    ]
    assert (found.count, found.of, found.where) == (1, 150, ("rows:8 (answer 2)",))
    graded = audit(
        from_rows(rows), counters=[TextCheck("f", lambda texts: [0.7 if "rude" in t else 0.2 for t in texts])]
    )
    assert graded.findings["check_f"].count == 1 and "0.2, 0.2, 0.2" in graded.findings["check_f"].note


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda texts: [0.0], "returned 1 values"),
        (lambda texts: [float("nan")] * len(texts), "NaN"),
        (lambda texts: 1 / 0, "ZeroDivisionError"),
        (lambda texts: None, "TypeError"),
    ],
)
def test_a_function_that_fails_is_named(function: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        audit(from_rows([pair(i) for i in range(5)]), counters=[TextCheck("mine", function)])


def test_splits_of_two_kinds_are_refused(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.jsonl", [pair(0)]), write(tmp_path / "b.jsonl", [{"prompt": "p"}])
    with pytest.raises(DataError, match="hold pairs"):
        audit_files({"a": str(a), "b": str(b)})


def test_no_usable_row_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no row could be used"):
        audit_files({"a": str(write(tmp_path / "a.jsonl", [{"prompt": "", "chosen": "a", "rejected": "b"}]))})


# ---- parts ----------------------------------------------------------------------------------------------------------


def test_cycles_need_three_answers() -> None:
    def of(*edges: str) -> str:
        a, b = (np.array([ord(e[i]) for e in edges], dtype=np.uint64) for i in (0, 1))
        return " ".join(e for e, c in zip(edges, edges_in_cycles(a, b), strict=True) if c)

    assert of("ab", "bc", "ca", "cd", "ea") == "ab bc ca"
    assert of("ab", "ba") == "" and of("aa") == "" and of("ab", "bc", "ac") == ""
    assert of("ab", "bc", "ca", "xy", "yz", "zx", "cx") == "ab bc ca xy yz zx"  # a path between the two is in neither
    assert of("ab", "bc", "cd", "da", "ab") == "ab bc cd da ab"


def test_earlier_looks_back_only() -> None:
    keys, wanted = np.array([5, 7, 5, 9], np.uint64), np.array([7, 5, 9, 5], np.uint64)
    assert earlier_match(keys, wanted).tolist() == [-1, 0, -1, 0]


@pytest.mark.parametrize("seed", range(3))
def test_quantiles_are_numpys(seed: int) -> None:
    values = np.random.default_rng(seed).integers(0, 300, 57).tolist()
    made = quantiles(Counter(values))
    assert made["mean"] == pytest.approx(np.mean(values)) and made["max"] == max(values)
    for q in (5, 50, 95, 99):
        assert made[f"p{q}"] == pytest.approx(np.percentile(values, q))


def test_places_come_back_as_they_were() -> None:
    given = [
        "a.jsonl:1",
        "a.jsonl:23",
        "b.parquet: row 7",
        "plain",
        "",
        "x:007",
        "x:0",
        "n:" + "9" * 30,
        "a.jsonl:24",
        "\u0663",
    ]
    places = Places()
    for place in given:
        places.append(place)
    assert [places[i] for i in range(len(given))] == given and len(places) == len(given)


def test_only_the_first_places_are_held() -> None:
    found = audit(from_rows([pair(0)] * 1500)).findings["duplicates"]
    assert found.count == 1499 and len(found.where) == KEPT
    assert "and 1,479 more" in audit(from_rows([pair(0)] * 1500)).to_text(whole=True)


def test_refusals_are_matched_at_the_beginning() -> None:
    assert refuses("I'm sorry, but I can't help with that.") and refuses("I\u2019m unable to say.")
    assert not refuses("x " * 150 + "I cannot assist") and not refuses("You can't lose.")


def test_an_interval_is_wilsons_and_nothing_of_nothing() -> None:
    assert estimated_finding("t", 0, 0) == Finding("t", 0, 0)
    assert estimated_finding("t", 3, 10).interval == wilson_interval(3, 10)


def test_control_characters_are_escaped_in_text(tmp_path: Path) -> None:
    path = write(tmp_path / "a\x1b[31m.jsonl", [pair(0), pair(0)])
    shown = audit_files({"a": str(path)}, languages=False).to_text()
    assert "\x1b" not in shown and "\\x1b" in shown


@pytest.mark.parametrize(
    ("longer", "of", "advised"), [(101, 200, False), (2, 2, False), (130, 200, True), (70, 200, True)]
)
def test_advice_about_length_needs_evidence(longer: int, of: int, advised: bool) -> None:
    rows = [
        {
            "prompt": f"p{i}",
            "chosen": "long answer" if i < longer else "ok",
            "rejected": "ok" if i < longer else "long one",
        }
        for i in range(of)
    ]
    assert bool(audit(from_rows(rows), languages=False).findings["length_bias"].advice) is advised


def test_a_reward_is_sure_of_large_margins_only() -> None:
    """90% means nine times as likely, so the calibrated margin must exceed log 9."""
    margins = [2.0] * 30 + [-0.1] * 4 + [-3.0]
    rows = [{"prompt": f"p{i}", "chosen": f"c {m}", "rejected": "r 0"} for i, m in enumerate(margins)]
    reward = lambda prompts, completions: [float(c.split()[1]) for c in completions]  # noqa: E731
    scale = calibrate(np.array(margins))
    assert 0.1 * scale < np.log(9) < 3 * scale
    found = audit(from_rows(rows), languages=False, counters=[RewardDisagreement("numbers", reward)]).findings
    assert found["reward_disagreement"].count == 5
    assert "in 1 of them it is at least 90% sure" in found["reward_disagreement"].note


def test_a_pair_of_equal_answers_contradicts_nothing() -> None:
    same = {"prompt": "b", "chosen": "x", "rejected": "x"}
    found = audit(from_rows([same, same, pair(1)], identical="keep"), languages=False).findings
    assert (found["identical_pairs"].count, found["duplicates"].count, found["contradictions"].count) == (2, 1, 0)


def test_what_was_found_comes_first_and_what_is_in_order_is_one_line() -> None:
    result = audit(from_rows([pair(0), pair(0), *(pair(i) for i in range(1, 30))]), languages=False)
    short, whole = result.to_text().splitlines(), result.to_text(whole=True).splitlines()
    assert short[2].startswith("exact duplicates of an earlier row") and "--all" in short[-1]
    (fine,) = [line for line in short if line.startswith("Also checked, nothing found: ")]
    assert "contradictions" in fine and "pii email" in fine and ", duplicates" not in fine
    assert len(short) < 12 < len(whole) and any(line.startswith("characters") for line in whole)


@pytest.mark.parametrize(("longer", "of", "said"), [(153_000, 300_000, False), (180, 300, True), (12, 20, False)])
def test_a_share_calls_for_advice_by_its_size_and_not_by_its_certainty_alone(longer: int, of: int, said: bool) -> None:
    found = balance_finding("length bias", longer, of, "", "far from 50%")
    assert bool(found.advice) == said and found.is_notable == said
