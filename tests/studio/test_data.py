"""The studio's data pages over HTTP."""

from __future__ import annotations

import json
import re
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient
from tiny import tiny_tokenizer

from penchant.errors import DataError, DiskError
from penchant.studio import data
from penchant.studio.app import Studio
from penchant.studio.launch import environment
from penchant.studio.rows import Edits

EVIL = '<script>alert(1)</script></style></textarea>"><img src=x onerror=alert(1)>\u202e\x1b[31m'


def row(i: int, **more: Any) -> dict[str, Any]:
    return {"prompt": f"Question {i}?", "chosen": f"Good {i}.", "rejected": f"Bad {i}.", **more}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "studio"
    root.mkdir()
    turns = [{"role": "system", "content": EVIL}, {"role": "user", "content": EVIL}]
    evil = {
        "prompt": turns,
        "chosen": [{"role": "assistant", "content": EVIL}],
        "rejected": [{"role": "assistant", "content": "ok"}],
    }
    (root / "rows.jsonl").write_text("".join(json.dumps(row(i)) + "\n" for i in range(1, 51)))
    (root / "evil.jsonl").write_text(json.dumps(evil) + "\n" + "{broken " + EVIL.replace("\x1b", "") + "\n")
    return root


@pytest.fixture
def client(folder: Path) -> Iterator[TestClient]:
    studio = Studio(folder, token="t")
    made = TestClient(studio, base_url="http://127.0.0.1")
    made.get("/?token=t")
    made.headers["x-csrf-token"] = studio._csrf
    yield made
    studio.close()


def test_files_and_their_pages(client: TestClient, folder: Path) -> None:
    made = folder / "arenas" / "mine"
    made.mkdir(parents=True)
    for name in ("arena.json", "pairs.jsonl", "written.jsonl", "preferences.jsonl"):
        (made / name).write_text("{}\n")
    listed = re.findall(r'href="/data/view\?file=([^"]*)"', client.get("/data").text)
    assert listed == ["evil.jsonl", "rows.jsonl", "arenas/mine/preferences.jsonl"]
    page = client.get("/data/view?file=rows.jsonl").text
    assert "Layout pairs" in page and "Question 20?" in page and "Question 21?" not in page
    link = re.search(r'href="(/data/view[^"]*)">Next', page)
    assert link and "Question 21?" in client.get(link[1].replace("&amp;", "&")).text
    assert "Question 33?" in client.get("/data/view?file=rows.jsonl&q=good+33").text
    with (folder / "rows.jsonl").open("a") as out:
        out.write(json.dumps(row(51)) + "\n")
    # the file has changed, so it is reopened
    assert "Question 51?" in client.get("/data/view?file=rows.jsonl&line=51").text


def test_a_row_of_several_is_not_offered_for_edits_that_no_copy_can_have(client: TestClient, folder: Path) -> None:
    said = {"pair": "p", "annotator": "Ada", "prompt": "Q", "answer_a": "A", "answer_b": "B", "left": "a"}
    lines = [{"id": str(i), "verdict": verdict, **said} for i, verdict in enumerate(("a", "tie"))]
    (folder / "preferences.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = client.get("/data/view?file=preferences.jsonl").text
    assert "Layout studio" in page and "left out" in page and ">Edit<" not in page and ">Drop<" not in page
    at = {"file": "preferences.jsonl", "where": "preferences.jsonl:1", "line": "1", "action": "drop"}
    assert client.post("/data/edit", data=at).status_code == 400


@pytest.mark.parametrize("page", ["view", "row", "edit", "tokens", "audit"])
def test_nothing_outside_the_folder_is_opened(client: TestClient, folder: Path, page: str) -> None:
    (folder.parent / "secret.jsonl").write_text(json.dumps(row(1)) + "\n")
    (folder / "link.jsonl").symlink_to(folder.parent / "secret.jsonl")
    for name in ("../secret.jsonl", "/etc/passwd", "link.jsonl", "nothing.jsonl", "", ".", "%00.jsonl"):
        assert client.get(f"/data/{page}?file={name}").status_code in (400, 404), name
    posted = client.post("/data/copy", data={"file": "../secret.jsonl", "output": "b.jsonl"})
    assert posted.status_code == 404


@pytest.mark.parametrize("show", ["", "diff", "raw"])
def test_texts_of_rows_are_inert(client: TestClient, show: str) -> None:
    page = client.get(f"/data/view?file=evil.jsonl&show={show}").text
    edit = client.get("/data/edit?file=evil.jsonl&where=evil.jsonl:1&line=1").text
    for text in (page, edit):
        assert "alert(1)" in text and "<script>alert" not in text and "<img" not in text and "</style>" not in text
        assert "\u202e" not in text and "\x1b" not in text
    assert edit.count("</textarea>") == 1


def test_the_search_of_a_person_is_inert(client: TestClient) -> None:
    from urllib.parse import quote

    page = client.get(f"/data/view?file=rows.jsonl&q={quote(EVIL)}&tokenizer={quote(EVIL)}").text
    assert "<script>alert" not in page and "<img" not in page and "\u202e" not in page


def test_rows_are_edited_dropped_and_taken_back(
    client: TestClient, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = {"file": "rows.jsonl", "where": "rows.jsonl:2", "line": "2"}
    answer = client.post("/data/edit", data={**at, "row": json.dumps(row(2, chosen="Mine."))})
    assert "changed in the copy" in answer.text and "Mine." in answer.text and "Good 2." not in answer.text
    assert 'id="edits" hx-swap-oob' in answer.text and "1 row edited" in answer.text
    assert "Mine." in client.get("/data/edit?file=rows.jsonl&where=rows.jsonl:2&line=2").text
    again = client.get("/data/row?file=rows.jsonl&where=rows.jsonl:2&line=2").text  # the request of the Cancel button
    assert "changed in the copy" in again and "Mine." in again
    assert (
        "dropped in the copy"
        in client.post("/data/edit", data={**at, "where": "rows.jsonl:3", "line": "3", "action": "drop"}).text
    )
    shown = client.get("/data/view?file=rows.jsonl&only=edited").text
    assert shown.count("<article") == 2 and "2 rows edited" in shown
    bad = client.post("/data/edit", data={**at, "row": "{"}).text
    assert 'role="alert"' in bad and "<textarea" in bad
    same = json.dumps(row(2, chosen="x", rejected="x"))
    assert "it would be kept aside" in client.post("/data/edit", data={**at, "row": same}).text
    assert "changed in the copy" in client.post("/data/edit", data={**at, "row": same, "anyway": "on"}).text
    assert "in the copy" not in client.post("/data/undo", data=at).text
    done = client.post("/data/copy", data={"file": "rows.jsonl", "output": "sub.jsonl"})
    assert done.status_code == 200 and "rows that a person dropped" in done.text
    assert len((folder / "sub.jsonl").read_text().splitlines()) == 49
    assert (folder / "sub.jsonl.touched.jsonl").exists()
    fails = "import sys; print('penchant: sub.jsonl: already exists', file=sys.stderr); sys.exit(2)"
    monkeypatch.setattr(data, "command", lambda *_: [sys.executable, "-c", fails])
    again = client.post("/data/copy", data={"file": "rows.jsonl", "output": "sub.jsonl"})
    assert again.status_code == 400 and again.text == "the copy: sub.jsonl: already exists"
    for output in ("../x.jsonl", "/tmp/x.jsonl"):
        assert client.post("/data/copy", data={"file": "rows.jsonl", "output": output}).status_code == 404


def test_changes_need_the_token(client: TestClient, folder: Path) -> None:
    at = {"file": "rows.jsonl", "where": "rows.jsonl:2", "line": "2", "action": "drop"}
    for path in ("edit", "undo", "copy", "audit"):
        assert client.post(f"/data/{path}", data=at, headers={"x-csrf-token": "other"}).status_code == 403
    assert Edits(folder, "rows.jsonl").latest() == {}


def test_findings_of_an_audit_are_filters(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {
        "duplicates": {
            "title": "exact copies",
            "count": 2,
            "where": ["rows.jsonl:7 (as rows.jsonl:3)", "rows.jsonl:40"],
        }
    }
    words = f"import sys, json; open(sys.argv[1], 'w').write(json.dumps({{'findings': {found!r}}}))"
    monkeypatch.setattr(data, "command", lambda *a: [sys.executable, "-c", words, a[a.index("--json") + 1]])
    assert "Audit this file" in client.get("/data/view?file=rows.jsonl").text
    client.post("/data/audit", data={"file": "rows.jsonl"})
    end = time.monotonic() + 60
    while "hx-refresh" not in client.get("/data/audit?file=rows.jsonl").headers:
        assert time.monotonic() < end
        time.sleep(0.02)
    page = client.get("/data/view?file=rows.jsonl&only=duplicates").text
    assert (
        "exact copies (2)" in page and page.count("<article") == 2 and "Question 7?" in page and "Question 40?" in page
    )


def test_two_audits_at_once_have_a_file_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = "import json, sys; open(sys.argv[1], 'w').write(json.dumps({'of': sys.argv[2]}))"

    def slowly(*asked: str) -> list[str]:
        time.sleep(0.05)
        return [sys.executable, "-c", words, asked[asked.index("--json") + 1], asked[2]]

    monkeypatch.setattr(data, "command", slowly)
    audits, names = data.Audits(), ("a.jsonl", "b.jsonl")
    for name in names:
        (tmp_path / name).write_text("{}\n")
    threads = [threading.Thread(target=audits.start, args=(tmp_path, name, "auto")) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    end = time.monotonic() + 60
    while any(audits.result(tmp_path / name, "auto")[0] == "running" for name in names):
        assert time.monotonic() < end
        time.sleep(0.02)
    assert [audits.result(tmp_path / name, "auto")[1]["of"] for name in names] == [f"./{name}" for name in names]
    audits.close()


def test_an_audit_lists_as_many_places_as_are_asked_for(tmp_path: Path) -> None:
    from penchant.cli import main

    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row(1)) + "\n" for _ in range(40)))
    assert (
        main(["data", "audit", str(path), "--json", str(tmp_path / "out.json"), "--places", "1000", "--no-languages"])
        == 0
    )
    assert len(json.loads((tmp_path / "out.json").read_text())["findings"]["duplicates"]["where"]) == 39


def test_tokens_need_a_tokenizer_of_the_folder(client: TestClient, folder: Path) -> None:
    at = "file=rows.jsonl&where=rows.jsonl:1&line=1"
    assert client.get(f"/data/tokens?{at}&tokenizer=../..").status_code == 404
    assert 'role="alert"' in client.get(f"/data/tokens?{at}&tokenizer=nothing").text


def test_a_look_at_tokens_does_not_take_the_hub_from_runs_that_are_started(
    client: TestClient, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    tiny_tokenizer().save_pretrained(folder / "model")
    assert (
        'class="t trained"' in client.get("/data/tokens?file=rows.jsonl&where=rows.jsonl:1&line=1&tokenizer=model").text
    )
    assert "HF_HUB_OFFLINE" not in environment()


def test_odd_files_do_not_break_the_list(client: TestClient, folder: Path) -> None:
    (folder / "nothing.jsonl").symlink_to(folder / "gone.jsonl")
    (folder / "out.jsonl").symlink_to("/etc/passwd")
    (folder / "bad\udcff.jsonl").write_text("{}\n")
    (folder / "bad\udcff").mkdir()
    (folder / "bad\udcff" / "metrics.jsonl").write_text("{}\n")
    page = client.get("/data")
    assert page.status_code == 200 and "rows.jsonl" in page.text
    assert not any(name in page.text for name in ("nothing.jsonl", "out.jsonl", "bad"))
    assert client.get("/runs").status_code == client.get("/runs/new").status_code == 200
    assert client.get(f"/data/view?file={'a' * 5000}.jsonl").status_code == 404


def test_edits_outlive_a_full_disk_and_stay_inside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    edits = Edits(folder, "rows.jsonl")
    edits.add("rows.jsonl:1", "dropped")
    with edits.file.open("a") as out:
        out.write('{"where": "half a li')  # left by a killed studio
    edits.add("rows.jsonl:2", "dropped")
    write = os.write

    def full(handle: int, line: bytes) -> int:
        if len(line) < 20:
            raise OSError(28, "No space left on device")
        return write(handle, line[: len(line) - 10])

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", full)
        with pytest.raises(DiskError, match="cannot be written"):
            edits.add("rows.jsonl:3", "dropped")
    edits.add("rows.jsonl:4", "dropped")
    assert [*edits.latest()] == ["rows.jsonl:1", "rows.jsonl:2", "rows.jsonl:4"]
    long = "/".join(["a" * 90] * 4)
    assert Edits(folder, f"x{long}").file != Edits(folder, f"y{long}").file
    (folder / ".studio").rename(folder / "moved")
    (folder / ".studio").symlink_to(folder.parent)
    with pytest.raises(DataError, match="link"):
        Edits(folder, "rows.jsonl")
