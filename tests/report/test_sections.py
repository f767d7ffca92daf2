"""Win rates, completions, audit, settings, cost, provenance, later evaluations."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from report_folders import ci, make_comparison, make_run, make_sweep, write_json, write_lines

from penchant.report.audit import audit
from penchant.report.data import read_report
from penchant.report.provenance import command, cost, evaluations, provenance
from penchant.report.samples import MAX_BYTES, MAX_CHARACTERS, collect_cards, samples
from penchant.report.settings import configs, differing_keys, short
from penchant.report.winrates import compared_figures, comparison_pairs, matrix_cells, win_rates


def words(node: Any) -> str:
    return re.sub(r"<[^>]*>", "", str(node))


# ---- win rates ------------------------------------------------------------------------------------------------------


def test_the_matrix_is_filled_both_ways_round() -> None:
    cells = matrix_cells(
        [{"name": "a", "other": "b", "win_rate": ci(0.8, 0.7, 0.9)}, {"name": "a", "other": "c", "win_rate": None}],
        "win_rate",
    )
    assert cells["a", "b"].estimate == 0.8 and len(cells) == 2
    assert (cells["b", "a"].estimate, cells["b", "a"].low, cells["b", "a"].high) == pytest.approx((0.2, 0.1, 0.3))


def test_the_matrix_shows_intervals_and_pales_where_they_include_one_half(tmp_path: Path) -> None:
    made = str(win_rates(read_report([make_comparison(tmp_path / "c")], 0.0)))
    assert '<td class="up3"><b>80.0%</b><small>70\u201390</small></td>' in made
    assert '<td class="down3"><b>20.0%</b><small>10\u201330</small></td>' in made
    assert '<td class="up0"><b>55.0%</b>' in made and '<td class="down0"><b>45.0%</b>' in made
    assert made.count('class="matrix"') == 2 and "corrected (Holm) for 3" in made


def test_other_rewards_have_matrices_of_their_own(tmp_path: Path) -> None:
    folder = make_comparison(tmp_path / "c")
    figures = json.loads((folder / "comparison.json").read_text())
    figures["also"] = {"words": figures["comparisons"]}
    figures["models"]["ours"]["also"] = {"words": {"reward": 7.5}}
    write_json(folder / "comparison.json", figures)
    data = read_report([folder], 0.0)
    assert "Win rate, by words" in str(win_rates(data)) and "reward, by words" in words(compared_figures(data))


@pytest.mark.parametrize("own", [False, True])
def test_a_judge_has_matrices_once(tmp_path: Path, own: bool) -> None:
    folder = make_comparison(tmp_path / "c")
    figures = json.loads((folder / "comparison.json").read_text())
    judged = figures["comparisons"] if own else [{**p, "win_rate": ci(0.9, 0.8, 1.0)} for p in figures["comparisons"]]
    write_json(folder / "comparison.json", {**figures, "judge": {"name": "referee", "comparisons": judged}})
    made = str(win_rates(read_report([folder], 0.0)))
    assert made.count('class="matrix"') == (2 if own else 4) and ("Win rate, by referee" in made) != own
    assert ("Differences of win rate by referee" in made) != own


def test_a_comparison_of_an_older_version_has_its_first_column(tmp_path: Path) -> None:
    folder = make_comparison(tmp_path / "c")
    figures = json.loads((folder / "comparison.json").read_text())
    del figures["comparisons"]
    write_json(folder / "comparison.json", figures)
    data = read_report([folder], 0.0)
    assert [(p["name"], p["other"]) for p in comparison_pairs(data.comparisons[0])] == [
        ("ours", "start"),
        ("fine", "start"),
    ]
    assert "80.0%" in str(win_rates(data))


def test_without_a_reward_there_is_no_matrix_but_differences(tmp_path: Path) -> None:
    folder = make_comparison(tmp_path / "c")
    figures = json.loads((folder / "comparison.json").read_text())
    for p in figures["comparisons"]:
        p |= {"win_rate": None, "equal_length": None}
    write_json(folder / "comparison.json", figures)
    made = str(win_rates(read_report([folder], 0.0)))
    assert 'class="matrix"' not in made and "0.40" in made and "0.0300" in made


def test_every_figure_of_every_model(tmp_path: Path) -> None:
    text = words(compared_figures(read_report([make_comparison(tmp_path / "c")], 0.0)))
    assert (
        "reward0.10 [0.00, 0.20]0.50 [0.40, 0.80]" in text
        and "KL from start, nats per completion\u20134.0 [3.5, 4.5]" in text
    )


# ---- completions ----------------------------------------------------------------------------------------------------


def test_completions_of_one_prompt_stand_together_and_the_start_once(tmp_path: Path) -> None:
    data = read_report([make_sweep(tmp_path / "s")], 0.0)
    found = collect_cards(data)
    assert found.models == ("start", *(r.name for r in data.runs)) and found.keys == ("", "A", "B", "A", "B")
    assert len(found.cards) == 3 and [a.model for a in found.cards[0].answers] == [0, 1, 2, 3, 4] and found.judged


def test_starts_from_different_weights_are_told_apart(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name) for name in ("r", "s")]
    manifest = json.loads((runs[1] / "manifest.json").read_text())
    write_json(runs[1] / "manifest.json", {**manifest, "model": {"sha256": "cd" * 32}})
    write_lines(runs[1] / "samples.jsonl", [{"prompt": "p", "before": "b", "after": "a"}])
    found = collect_cards(read_report(runs, 0.0))
    assert found.models == ("start of r", "start of s", "r", "s") and found.keys[:2] == ("", "")
    (card,) = (c for c in found.cards if c.prompt == "p")
    assert [(found.models[a.model], a.text) for a in card.answers] == [("start of s", "b"), ("s", "a")]


def test_equal_cards_are_one(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r")
    write_lines(
        run / "samples.jsonl",
        [{"prompt": "p", "before": "b", "after": "a"}] * 3 + [{"prompt": "p", "before": "b", "after": "c"}],
    )
    found = collect_cards(read_report([run], 0.0))
    assert [(c.times, [a.text for a in c.answers]) for c in found.cards] == [
        (3, ["b", "a"]),
        (1, ["b", "c"]),
    ] and not found.judged


def test_a_conversation_is_turns_with_roles(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r")
    turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    row = {"prompt": "<|im_start|>system Be kind. user Hi", "messages": turns, "before": "b", "after": "a"}
    write_lines(run / "samples.jsonl", [row])
    made = str(samples(read_report([run], 0.0)))
    assert "im_start" not in made and ">user</bdi></b>: " in made and ">Hi</bdi>" in made
    system = made.split('<details class="system">')[1].split("</details>")[0]
    assert "<summary>system prompt</summary>" in system and "Be kind." in system, "folded"
    assert "Be kind." not in made.replace(system, "")


def test_a_comparisons_completions_come_first(tmp_path: Path) -> None:
    folder = make_comparison(tmp_path / "c")
    found = collect_cards(read_report([folder, make_run(tmp_path / "r")], 0.0))
    assert found.models == ("start", "ours", "fine") and found.in_tokens and len(found.cards) == 4
    assert found.cards[0].answers[0].ended is False and found.cards[0].answers[0].tokens == 5


def test_the_first_twenty_are_open_and_all_are_there(tmp_path: Path) -> None:
    made = str(samples(read_report([make_run(tmp_path / "r", samples=33)], 0.0)))
    assert made.count('<details class="sample"') == 33 and made.count('<details class="sample" open="">') == 20
    assert "33 prompts." in made and 'class="controls" hidden=""' in made


def test_long_texts_are_cut_and_the_page_has_a_limit(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r")
    write_lines(
        run / "samples.jsonl",
        [{"prompt": f"{i}", "before": "x" * (MAX_CHARACTERS + 7), "after": "y"} for i in range(400)],
    )
    made = str(samples(read_report([run], 0.0)))
    assert "7 more characters" in made and len(made) < MAX_BYTES + 10_000
    shown, left = made.count('class="sample"'), re.search(r"([\d,]+) more are in samples.jsonl", made)
    assert left is not None and shown + int(left[1]) == 400 and shown > 100


def test_no_samples_no_section(tmp_path: Path) -> None:
    assert samples(read_report([make_run(tmp_path / "r", samples=0)], 0.0)) is None


# ---- audit, settings, cost, provenance --------------------------------------------------------------------------------


def test_runs_on_the_same_rows_share_an_audit(tmp_path: Path) -> None:
    data = read_report([make_sweep(tmp_path / "s")], 0.0)
    made = str(audit(data))
    assert made.count("Looked for and not found") == 1 and "<h3>" not in made
    write_json(data.runs[0].path / "audit.json", {"summary": "other", "findings": {"x": {"title": "t", "count": 3}}})
    assert str(audit(read_report([tmp_path / "s"], 0.0))).count("<h3>") == 2


def test_only_keys_that_differ_are_in_the_table(tmp_path: Path) -> None:
    assert differing_keys([{"a": 1, "b": 2}, {"a": 1, "b": 3, "c": 0}]) == ["b", "c"]
    text = words(configs(read_report([make_sweep(tmp_path / "s")], 0.0)))
    assert "settingloss.betaA beta-0.10.1B beta-0.30.3" in text and "Whole configs" in text
    two = [make_run(tmp_path / f"x-seed-{i}", seed=i) for i in (0, 1)]
    assert "2 runs of one setting: their seeds differ, and nothing else." in words(configs(read_report(two, 0.0)))


def test_absolute_paths_are_shortened() -> None:
    assert (
        short("/home/someone/models/small") == "\u2026/models/small"
        and short("hub/name") == "hub/name"
        and short(None) == "\u2013"
    )


def test_time_and_memory(tmp_path: Path) -> None:
    text = words(cost(read_report([make_sweep(tmp_path / "s")], 0.0)))
    assert "4 runs: 4 min 04 s in all, at most 1.50 GB" in text and "1 min 01 s20.0 s1,020" in text.replace(
        "20 s", "20.0 s"
    )


def test_provenance_has_what_is_shared_once_and_names_what_differs(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path / "s")
    manifest = json.loads((sweep / "beta-0.1-seed-0/manifest.json").read_text())
    write_json(sweep / "beta-0.1-seed-0/manifest.json", {**manifest, "penchant": "0.0.9"})
    text = words(provenance(read_report([sweep], 0.0)))
    assert text.count("ab" * 32) == 1 and "0.0.9, 0.1.0" in text
    assert "penchant train beta-0.1-seed-0/config.resolved.yaml output=beta-0.1-seed-0-again" in text


def test_commands_are_quoted(tmp_path: Path) -> None:
    folder = make_comparison(tmp_path / "c", word="x; rm -rf ~")
    assert command(read_report([folder], 0.0).comparisons[0]).startswith(
        "penchant compare 'x; rm -rf ~' --reward sentiment --prompts 4"
    )


def test_later_evaluations_newest_first(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r")
    assert evaluations(read_report([run], 0.0)) is None
    lines = [
        {
            "time": f"2026-01-0{i}",
            "step": i,
            "what": {"data": "test.jsonl"},
            "metrics": {"eval/loss": i / 10, "eval/win_rate": 0.6, "eval/win_rate/ci": [0.5, 0.7], "note": "x"},
        }
        for i in (1, 2)
    ]
    write_lines(run / "evaluations.jsonl", lines)
    made = str(evaluations(read_report([run], 0.0)))
    assert (
        made.index("2026-01-02") < made.index("2026-01-01") and made.count("<details") == 2 and made.count("open=") == 1
    )
    assert "60.0%" in made and "[50.0%, 70.0%]" in made and "data=test.jsonl" in made
