"""The audit's page: it has every finding, cannot run or load anything, and escapes file contents."""

from __future__ import annotations

import re
from pathlib import Path

from audit_rows import planted, write

from penchant import api
from penchant.cli import main
from penchant.report.audit import GROUPS, OTHER, _group, render_audit


def test_every_finding_is_on_the_page(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", planted())
    result = api.audit_files(path, languages=False)
    page = api.audit_page(result, tmp_path / "pages" / "a.html", "a <b> c").read_text()
    for finding in result.findings.values():
        assert finding.title.replace("&", "&amp;").replace(">", "&gt;") in page
    assert "a &lt;b&gt; c" in page and "AKIAABCD" not in page and "a@b.co" not in page
    assert {_group(name) for name in result.findings} <= {g for g, _ in GROUPS}, "a finding without a place"
    assert _group("new") == OTHER


def test_nothing_on_it_can_run_or_load() -> None:
    hostile = '"><script>alert(1)</script>'
    one = {
        "title": hostile,
        "count": 3,
        "of": 9,
        "share": "x",
        "where": [hostile, 5],
        "note": hostile,
        "interval": [0.1, "x"],
    }
    page = render_audit(
        {"summary": hostile, "findings": {"duplicates": one, hostile: {}}, "lengths": {"p": {"mean": hostile}}}, hostile
    )
    assert "<script" not in page and "default-src 'none'" in page
    assert not re.search(r"(?:src|href)=", page)
    assert render_audit({}, "")


def test_the_command_writes_page_and_json(tmp_path: Path, capsys: object) -> None:
    train, test = write(tmp_path / "train.jsonl", planted()), write(tmp_path / "test.jsonl", planted()[:3])
    page, figures = tmp_path / "a.html", tmp_path / "a.json"
    command = ["data", "audit", "--split", f"train={train}", "--split", f"test={test}", "--no-languages"]
    assert main([*command, "--html", str(page), "--json", str(figures)]) == 0
    assert "leakage: prompts of test that are also in train" in page.read_text()
    assert '"leakage_train_test"' in figures.read_text()
