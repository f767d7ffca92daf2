"""The audit of single answers: labels, contradictions, scores."""

from __future__ import annotations

from rows import from_rows

from penchant.data.audit import audit


def test_labels_and_contradictions() -> None:
    rows = [
        {"prompt": "p", "completion": "a", "label": True},
        {"prompt": "p", "completion": "a", "label": False},
        {"prompt": "p", "completion": "b", "label": True},
        {"prompt": "p", "completion": "b", "label": True},
    ]
    found = audit(from_rows(rows, name="x")).findings
    assert (found["good_answers"].count, found["good_answers"].of) == (3, 4)
    assert found["contradictions"].where == ("x:2 (against x:1)",)
    assert found["duplicates"].where == ("x:4 (as x:3)",)


def test_scores_show_where_a_threshold_could_lie() -> None:
    rows = [{"prompt": f"p{i}", "completion": "a", "score": i} for i in range(5)]
    found = audit(from_rows(rows)).findings["scores"]
    assert found.note == "quartiles 1, 2, 3" and found.count == 3
