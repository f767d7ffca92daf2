"""The arena over HTTP: what it shows and records, access control, concurrent judges, and crashes."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
from endpoints import serve
from processes import forked
from studio_people import in_memory, say
from studios import SOURCE, Person, answers_of, arena_of, judgements, lines, studio_of

from penchant.cli import main
from penchant.data.audit import audit
from penchant.data.load import load_preferences
from penchant.errors import DataError
from penchant.judges.humans import Judgement
from penchant.runfolder.read import lock_state
from penchant.studio import pairs
from penchant.studio.arena import _record_verdict
from penchant.studio.pairs import Answers, Arena
from penchant.studio.queue import is_shared, next_item
from penchant.studio.text import CUT, render_markdown, should_fold
from penchant.studio.writers import Writers


@pytest.fixture
def studio(tmp_path: Path) -> Iterator[Any]:
    with studio_of(tmp_path) as server:
        yield server


# ---- access ----


def test_only_who_has_the_token_and_comes_by_a_name_of_this_machine_gets_in(studio: Any) -> None:
    client = httpx.Client(base_url=studio.address, trust_env=False)
    assert client.get("/arena").headers["location"] == "/login"
    assert client.get("/arena", headers={"hx-request": "true"}).status_code == 401
    assert client.get("/?token=wrong").headers["location"] == "/login" and not client.cookies
    assert client.post("/login", data={"token": "wrong"}).status_code == 401
    assert client.get("/arena", headers={"host": "evil.example"}).status_code == 403
    assert client.get("/static/studio.css").status_code == 200
    entered = client.get(f"/arena?token={studio.studio.token}&x=1")
    assert (entered.status_code, entered.headers["location"]) == (303, "/arena?x=1")
    cookie = entered.headers["set-cookie"].lower()
    assert "httponly" in cookie and "samesite=strict" in cookie and studio.studio.token.lower() not in cookie
    page = client.get("/arena")
    assert page.status_code == 200 and studio.studio.token not in page.text
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and page.headers["cache-control"] == "no-store"
    assert not re.search(r"<script>|<style|\son\w+=|\sstyle=", page.text), "nothing inline"
    assert not re.findall(r'(?:src|href|action)="(?:https?:)?//', page.text), "no other host"


def test_a_redirect_stays_here(studio: Any) -> None:
    client = httpx.Client(base_url=studio.address, trust_env=False)
    there = httpx.URL(studio.address).copy_with(raw_path=f"//evil.example/x?token={studio.studio.token}".encode())
    gone = client.get(there)
    assert gone.headers["location"].startswith("/") and not gone.headers["location"].startswith("//")


def test_no_change_without_the_csrf_token_or_from_another_site(studio: Any, tmp_path: Path) -> None:
    arena = arena_of(tmp_path)
    ada = Person(studio, "ada")
    order = {"order": "0", "pair": next_item(arena, "ada").pair.id, "verdict": "left"}  # type: ignore[union-attr]
    for headers in (
        {"x-csrf-token": "wrong"},
        {"origin": "http://evil.example"},
        {"sec-fetch-site": "cross-site"},
        {"origin": "null"},
    ):
        assert ada.post("/arena/test/judge", order, **headers).status_code == 403, headers
    assert ada.client.post("/arena/test/judge", data=order).status_code == 403
    assert not arena.preferences.path.exists()
    assert ada.post("/arena/test/judge", order).status_code == 200 and len(lines(arena)) == 1


def test_nothing_outside_the_folder_and_no_endless_body(studio: Any, tmp_path: Path) -> None:
    outside = tmp_path.parent / f"{tmp_path.name}-secret"
    secret = arena_of(outside)  # a complete arena and a file of pairs, but outside the root
    (outside / "x.jsonl").write_text(json.dumps({"prompt": "Q", "chosen": "good", "rejected": "bad"}) + "\n")
    (tmp_path / "arenas").mkdir()
    (tmp_path / "arenas/link").symlink_to(secret.folder)
    (tmp_path / "link.jsonl").symlink_to(outside / "x.jsonl")
    ada = Person(studio, "ada")
    for name in ("%2e%2e", "..%2f..", "link", "a%00b", "x" * 400):
        assert ada.get(f"/arena/{name}").status_code in (303, 404), name
    for given in (f"../{outside.name}/x.jsonl", str(outside / "x.jsonl"), "link.jsonl", "/etc/passwd", "arenas/link"):
        told = ada.post("/arena/new", {"name": "n", "source": "pairs", "file": given})
        assert told.status_code == 404 and "root:" not in told.text, given
    assert ada.post("/arena/new", {"name": "x" * (2 << 20)}).status_code == 413
    (tmp_path / "pairs.jsonl").write_text((outside / "x.jsonl").read_text())
    good = {"name": "n", "source": "pairs", "file": "pairs.jsonl"}
    assert ada.post("/arena/new", {**good, **{f"f{i}": "" for i in range(3000)}}).status_code == 400
    assert ada.post("/arena/new", good).status_code == 200
    many = ada.client.post("/arena/new", content=b"{}", headers={"x-csrf-token": ada.csrf})
    assert many.status_code == 415


def test_the_studio_starts_without_torch(tmp_path: Path) -> None:
    script = "import sys; from pathlib import Path; from penchant.studio.app import Studio; Studio(Path('.'))"
    script += "; print(sorted({'torch', 'transformers', 'krippendorff'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_address_of_all_needs_a_key(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.delenv("PENCHANT_API_KEY", raising=False)
    assert main(["studio", str(tmp_path), "--host", "0.0.0.0", "--port", "0"]) == 2
    assert "there is no key" in capsys.readouterr().err
    assert main(["studio", str(tmp_path / "none")]) == 2 and "is not a folder" in capsys.readouterr().err


# ---- what is shown and recorded ----


def test_a_verdict_is_written_whole_and_says_nothing_before(studio: Any, tmp_path: Path) -> None:
    names = ("zorro", "zelda")
    rows = [
        (f"Prompt {i}?", {name: f"Answer {i}{end}" for name, end in zip(names, ".!", strict=True)}) for i in range(9)
    ]
    arena = arena_of(tmp_path, answers=Answers(rows, dict.fromkeys(names, SOURCE)), reasons=("clear", "helpful"))
    ada = Person(studio, "ada")
    page = ada.get("/arena/test").text
    assert not any(name in page for name in names) and SOURCE["sha256"] not in page
    left = re.search(r'id="left"[^>]*><p>(.*?)</p>', page)
    assert left is not None
    ada.judge("test", "left", reason=["clear", "nonsense"], edited="A better one.")
    (row,) = lines(arena)
    assert row[f"answer_{row['left']}"] == left[1] and row["verdict"] == row["left"]
    assert row["annotator"] == "ada" and row["seconds"] == 2.5 and row["order"] == 0
    assert row["reasons"] == ["clear"] and row["edited"] == "A better one."
    assert {row["model_a"], row["model_b"]} == {*names} and row["sha256_a"] == SOURCE["sha256"]
    for verdict in ("right", "tie", "both_bad", "skip"):
        ada.judge("test", verdict)
    made = [r["verdict"] for r in lines(arena)]
    assert made[1] == {"a": "b", "b": "a"}[lines(arena)[1]["left"]] and made[2:] == ["tie", "both_bad", "skip"]
    assert ada.judge("test", "nonsense").status_code == 400 and len(lines(arena)) == 5


def test_an_answer_of_ones_own_is_never_lost(studio: Any, tmp_path: Path) -> None:
    arena = arena_of(tmp_path, pairs=30, reasons=("clear", "helpful"), checks=0.0, repeats=0.0)
    ada = Person(studio, "ada")
    assert "not trained on" in ada.judge("test", "both_bad", edited="\nMine <b>.", reason="helpful").text
    (row,) = lines(arena)
    assert row["edited"] == "\nMine <b>." and row["verdict"] == "both_bad"
    page = ada.post("/arena/test/undo", {"order": "1"}).text
    # a browser drops one newline after the tag
    assert ">\n\nMine &lt;b&gt;.</textarea>" in page and 'value="helpful" checked>' in page
    assert 'value="clear">' in page and '<details class="edit" open>' in page
    again = ada.get("/arena/test").text
    assert "Mine" not in again and " checked" not in again


def test_a_key_pressed_twice_says_one_thing(studio: Any, tmp_path: Path) -> None:
    arena = arena_of(tmp_path)
    ada = Person(studio, "ada")
    page = ada.get("/arena/test").text
    hidden = {n: page.split(f'name="{n}" value="')[1].split('"')[0] for n in ("order", "pair")}
    ada.post("/arena/test/judge", {**hidden, "verdict": "left"})
    again = ada.post("/arena/test/judge", {**hidden, "verdict": "left"})
    assert again.status_code == 200 and "judged already" in again.text and len(lines(arena)) == 1


@pytest.fixture
def slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Delay between reading the recorded judgments and writing one."""
    made = Judgement.to_json

    def to_json(self: Judgement) -> dict[str, Any]:
        time.sleep(0.05)
        return made(self)

    monkeypatch.setattr(Judgement, "to_json", to_json)


def test_a_key_pressed_many_times_at_once_says_one_thing(studio: Any, tmp_path: Path, slowly: None) -> None:
    arena = arena_of(tmp_path)
    ada = Person(studio, "ada")
    page = ada.get("/arena/test").text
    hidden = {n: page.split(f'name="{n}" value="')[1].split('"')[0] for n in ("order", "pair")}
    threads = [
        threading.Thread(target=ada.post, args=("/arena/test/judge", {**hidden, "verdict": "left"})) for _ in range(12)
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(lines(arena)) == 1


def test_two_studios_at_once_write_one_word_on_one_showing(tmp_path: Path, slowly: None) -> None:
    """Two `Arena`s of one folder share nothing but the files, as two processes do."""
    first = arena_of(tmp_path)
    item = next_item(first, "ada")
    assert item is not None
    given = [("pair", item.pair.id), ("order", "0"), ("verdict", "left")]
    threads = [threading.Thread(target=_record_verdict, args=(Arena(first.folder), "ada", given)) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert [r["order"] for r in lines(first)] == [0]


def test_a_studio_that_was_stopped_in_its_turn_is_named_with_a_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pairs, "LOCK_TIMEOUT", 0.2)
    arena = arena_of(tmp_path)

    def takes_its_turn() -> None:
        with Arena(arena.folder).locked():
            time.sleep(600)

    other = forked(takes_its_turn)
    try:
        while lock_state(arena.folder) != "held":
            time.sleep(0.01)
        assert other.pid is not None
        os.kill(other.pid, signal.SIGSTOP)
        with studio_of(tmp_path) as studio:
            ada = Person(studio, "ada")
            assert 'id="judge"' in ada.get("/arena/test").text, "what is only looked at waits for nobody"
            told = ada.judge("test", "left")
            assert told.status_code == 400 and f"process {other.pid} has held" in told.text
            assert f"kill -9 {other.pid}" in told.text and not arena.preferences.path.exists()
            other.kill()
            other.join()
            assert ada.judge("test", "left").status_code == 200 and len(lines(arena)) == 1
    finally:
        other.kill()
        other.join()


def test_what_is_to_come_does_not_change_by_loading_the_page_again(studio: Any, tmp_path: Path) -> None:
    arena_of(tmp_path, pairs=8, overlap=0.0, checks=0.0, repeats=0.0)
    people = [Person(studio, name) for name in ("ada", "ben", "cleo")]
    for person in people:
        person.get("/arena/test")
    seen = {re.findall(r"(\d+) to come", people[0].get("/arena/test").text)[-1] for _ in range(3)}
    assert seen == {"6"}  # two of the eight are with the others now


def test_undo_brings_the_pair_back_with_sides_drawn_anew(studio: Any, tmp_path: Path) -> None:
    arena = arena_of(tmp_path, pairs=30)
    ada, sides = Person(studio, "ada"), []
    ada.judge("test", "right")
    for _ in range(12):
        ada.judge("test", "left")
        row = lines(arena)[-1]
        sides.append((row["pair"], row["left"]))
        order = str(len(lines(arena)))
        assert "taken back" in ada.post("/arena/test/undo", {"order": order}).text
        assert "nothing to take back" in ada.post("/arena/test/undo", {"order": order}).text.lower()
    assert len({p for p, _ in sides}) == 1 and {s for _, s in sides} == {"a", "b"}
    assert [j.side for j in judgements(arena)] == ["right"] and len(lines(arena)) == 25


def test_the_folder_goes_on_where_a_killed_studio_stopped(tmp_path: Path) -> None:
    """A page from before the crash still works if the key is the same, and recorded pairs are not shown again."""
    arena = arena_of(tmp_path)
    with studio_of(tmp_path, token="key " * 8) as first:
        ada = Person(first, "ada")
        ada.judge("test", "left")
        page = ada.get("/arena/test").text
        hidden = {n: page.split(f'name="{n}" value="')[1].split('"')[0] for n in ("order", "pair")}
    with arena.preferences.path.open("ab") as torn:
        torn.write(b'{"half": ')
    with studio_of(tmp_path, token="key " * 8) as second:
        ada.client.base_url = second.address
        assert ada.post("/arena/test/judge", {**hidden, "verdict": "right"}).status_code == 200
    assert [r["order"] for r in lines(arena)] == [0, 1]


def test_two_people_at_once_lose_nothing_and_share_what_overlaps(studio: Any, tmp_path: Path) -> None:
    arena = arena_of(tmp_path, pairs=24, overlap=0.5, checks=0.0, repeats=0.0)
    ends = {}

    def work(name: str) -> None:
        person = Person(studio, name)
        while 'id="judge"' in person.get("/arena/test").text:
            person.judge("test", "left")
        ends[name] = True

    threads = [threading.Thread(target=work, args=(n,)) for n in ("ada", "ben")]
    for t in threads:
        t.start()
    for t in threads:
        t.join(120)
    assert set(ends) == {"ada", "ben"}
    said = judgements(arena)
    by = {n: {j.pair for j in said if j.annotator == n} for n in ends}
    assert by["ada"] | by["ben"] == set(arena.pairs)
    shared = {p.id for p in arena.pairs.values() if is_shared(arena, p)}
    assert by["ada"] & by["ben"] == shared and 4 <= len(shared) <= 20 and len(said) == 24 + len(shared)


def test_a_pair_stays_before_somebody_whatever_others_say(studio: Any, tmp_path: Path) -> None:
    """Also if the studio restarts between showing and judging: no judgment is refused, and the sides stay the same."""
    arena = arena_of(tmp_path, pairs=6, models=("dpo", "ipo", "start"), overlap=1.0, checks=0.0, repeats=0.0)
    ada, ben = Person(studio, "ada"), Person(studio, "ben")
    page = ada.get("/arena/test").text
    hidden = {n: page.split(f'name="{n}" value="')[1].split('"')[0] for n in ("order", "pair")}
    for _ in range(9):
        ben.judge("test", "left")
        assert f'value="{hidden["pair"]}"' in ada.get("/arena/test").text
    with studio_of(tmp_path) as another:
        Person(another, "ada").post("/arena/test/judge", {**hidden, "verdict": "left"})
    (word,) = [j for j in judgements(arena) if j.annotator == "ada"]
    assert (
        word.pair == hidden["pair"] and word.answers[word.left == "b"] in page.split('id="left"')[1].split("</div>")[0]
    )


def test_training_and_the_audit_read_the_file(studio: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arena = arena_of(tmp_path, overlap=1.0, checks=0.0, repeats=0.0)
    ada = Person(studio, "ada")
    for verdict in ("left", "right", "tie", "both_bad", "left", "left"):
        ada.judge("test", verdict)
    ada.post("/arena/test/undo", {"order": "6"})
    found = load_preferences(str(arena.preferences.path))
    assert found.shape == "studio" and len(found.trees) == 3
    rows = [r for r in lines(arena) if r["verdict"] in ("a", "b")][:3]
    for tree, row in zip(found.trees, rows, strict=True):
        assert tree.completions[0].text == row[f"answer_{row['verdict']}"] and tree.completions[0].label
    assert sorted(q.what for q in found.quarantined) == ["a tie", "both are bad", "taken back", "taken back"]
    assert main(["data", "audit", str(arena.preferences.path)]) == 0
    assert "1 x a tie" in capsys.readouterr().out.replace("4 kept aside (", "")


def test_what_several_people_say_of_a_pair_is_no_copy(studio: Any, tmp_path: Path) -> None:
    arena = arena_of(tmp_path, pairs=3, overlap=1.0, checks=0.0, repeats=0.0)
    for name in ("ada", "ben"):
        while (item := next_item(arena, name)) is not None:
            say(arena, item, name, "b" if name == "ben" and item.pair.id == min(arena.pairs) else "a")
    while (item := next_item(arena, "cleo")) is not None:
        say(arena, item, "cleo", "tie")
    found = audit(load_preferences(str(arena.preferences.path)), languages=False).findings
    assert {"duplicates", "contradictions"}.isdisjoint(found)
    assert (found["bad_rows"].count, found["left_out"].count) == (0, 3), "a tie is no bad row"
    assert (found["agreed"].count, found["disagreed"].count) == (2, 1)


def test_hostile_texts_are_inert(studio: Any, tmp_path: Path) -> None:
    hostile = (
        "<script>alert(1)</script> </style> [x](javascript:alert(1)) ![i](http://evil.example/i.png) \u202eabc \x1b[2J"
    )
    answers = Answers([(hostile, {"<b>dpo</b>": hostile, "start": f"`{hostile}`"})], {"<b>dpo</b>": {}, "start": {}})
    arena_of(tmp_path, answers=answers, reasons=("<i>tag</i>",), question="<u>Which?</u>")
    ada = Person(studio, "ada</title>")
    for path in ("/arena", "/arena/test", "/arena/test/results", "/arena/test/report"):
        if path.endswith("results"):
            ada.judge("test", "left")
        # the text that a judge's own answer starts from is in a hidden text area, unchanged, and cannot close it
        page = re.sub(r"<textarea hidden.*?</textarea>", "", ada.get(path).text, flags=re.S)
        body = re.sub(r"<style>.*?</style>", "", page, flags=re.S)
        for bad in (
            "<script>alert",
            "</style>",
            "<b>dpo",
            "<i>tag",
            "<u>Which",
            "\u202e",
            "\x1b",
            'href="java',
            "<img",
        ):
            assert bad not in body, (path, bad)
    assert "U+202E" in ada.post("/arena/test/undo", {"order": "1"}).text


def test_long_answers_fold_alike_and_endless_ones_are_cut() -> None:
    assert not should_fold("short", "short") and should_fold("short", "x" * 5000) and should_fold("a\n" * 40, "b")
    assert "more characters are not shown" in str(render_markdown("y" * (CUT + 5)))
    assert "empty answer" in str(render_markdown(" \n"))
    for nasty in ("[" * 20_000, "*a " * 12_000, "`" * 30_000, ">" * 30_000, "- " * 20_000, "|" * 9_000):
        assert render_markdown(nasty)


# ---- the queue ----


def test_sides_are_drawn_anew_and_even(tmp_path: Path) -> None:
    arena = in_memory(arena_of(tmp_path, pairs=100))
    lefts = 0
    for i in range(400):
        arena.preferences.records["ada"] = i
        item = next_item(arena, "ada")
        assert item is not None
        lefts += item.left == "a"
    assert 160 < lefts < 240


def test_checks_and_repetitions_come_by_their_shares(tmp_path: Path) -> None:
    arena = in_memory(arena_of(tmp_path, pairs=40, gold=12, checks=0.3, repeats=0.3))
    while (item := next_item(arena, "ada")) is not None:
        say(arena, item, "ada", "a")
    said = list(arena.preferences.judgements.values())
    golds, again = [j for j in said if j.gold], [j for j in said if j.repeat_of]
    assert len(golds) == len({j.pair for j in golds}) and 5 <= len(golds) <= 12 and 4 <= len(again) <= 30
    places = {j.id: i for i, j in enumerate(said)}
    for j in again:
        assert places[j.id] - places[str(j.repeat_of)] > 8
    assert len([j for j in said if not j.gold and not j.repeat_of]) == 40


def test_a_share_of_checks_is_not_left_to_luck(tmp_path: Path) -> None:
    arena = in_memory(arena_of(tmp_path, pairs=60, gold=20, overlap=1.0, checks=0.1, repeats=0.0))
    for who in ("Ada", "Ben", "Cleo", "Dan", "Eve", "Fay"):
        for _ in range(50):
            item = next_item(arena, who)
            assert item is not None
            say(arena, item, who, "a")
        checks = [i for i, j in enumerate(arena.preferences.of(who)) if j.gold]
        assert 4 <= len(checks) <= 5 and checks[0] < 20
        assert any(b - a != 10 for a, b in pairwise(checks)), "nobody can count them off"


def test_people_share_their_share_of_pairs_from_the_start(tmp_path: Path) -> None:
    """Each judges 30 of 300 pairs, and every fifth of them is shared with the others: the same six."""
    arena = in_memory(arena_of(tmp_path, pairs=300, overlap=0.2, checks=0.0, repeats=0.0))
    for _ in range(30):
        for who in ("ada", "ben", "cleo"):
            item = next_item(arena, who)
            assert item is not None
            say(arena, item, who, "a")
    by = {who: {j.pair for j in arena.preferences.of(who)} for who in ("ada", "ben", "cleo")}
    assert by["ada"] & by["ben"] == by["ada"] & by["cleo"] == by["ben"] & by["cleo"]
    assert len(by["ada"] & by["ben"]) == 6


def test_the_queue_balances_models_or_asks_where_least_is_known(tmp_path: Path) -> None:
    met: dict[str, list[int]] = {}
    for first in ("balanced", "widest"):
        arena = in_memory(
            arena_of(
                tmp_path,
                first,
                pairs=40,
                models=("dpo", "ipo", "start"),
                first=first,
                overlap=0.0,
                checks=0.0,
                repeats=0.0,
            )
        )
        for _ in range(45):
            item = next_item(arena, "ada")
            assert item is not None
            # one pair of models is always distinguished; the others tie, so their intervals stay wide
            say(arena, item, "ada", "a" if item.pair.models == ("dpo", "ipo") else "tie")
        said = list(arena.preferences.judgements.values())
        models = [j.models for j in said]
        met[first] = [models.count(m) for m in (("dpo", "ipo"), ("dpo", "start"), ("ipo", "start"))]
        prompts = [j.prompt for j in said]
        assert max(map(prompts.count, prompts)) <= 2, "prompts take turns"
    assert met["balanced"] == [15, 15, 15]
    assert met["widest"][0] < min(met["widest"][1:]) - 3


# ---- a new arena ----


def test_arenas_are_made_of_runs_comparisons_and_data(studio: Any, tmp_path: Path) -> None:
    for run in ("dpo", "ipo"):
        folder = tmp_path / "runs" / run
        folder.mkdir(parents=True)
        (folder / "config.resolved.yaml").write_text("{}")
        rows = [{"prompt": f"P{i}", "before": "no", "after": f"{run} {i}"} for i in range(3)]
        (folder / "samples.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    compared = tmp_path / "runs/compared"
    compared.mkdir()
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    row = {"prompt": "text", "messages": chat, "completions": {"dpo": {"text": "a"}, "start": {"text": "b"}}}
    (compared / "comparison.jsonl").write_text(json.dumps(row) + "\n")
    (compared / "comparison.json").write_text("{}")
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": "Q", "chosen": "good", "rejected": "bad"}) + "\n")
    ada = Person(studio, "ada")
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    another = arena_of(tmp_path, "another")
    say(another, next_item(another, "ada"), "ada", "a")  # type: ignore[arg-type]
    page = ada.get("/arena/new").text
    offered = {name: set(re.findall(rf'name="{name}" value="([^"]+)"', page)) for name in ("run",)}
    for name in ("comparison", "file", "run_one", "run_two", "checks_file"):
        offered[name] = set(
            re.findall(r'<option value="([^"]+)"', page.split(f'<select name="{name}">')[1].split("</select>")[0])
        )
    assert offered["run"] == {"runs/dpo", "runs/ipo"} and offered["comparison"] == {"runs/compared"}
    assert offered["file"] == offered["checks_file"] == {"pairs.jsonl"}, "no file of a run or of an arena"
    assert offered["run_one"] == offered["run_two"] == {"runs/dpo", "runs/ipo", "model"}
    for name, given in {
        "of runs": {"source": "runs", "run": ["runs/dpo", "runs/ipo"], "checks_file": "pairs.jsonl"},
        "of-comparison": {"source": "comparison", "comparison": "runs/compared"},
        "of-pairs": {"source": "pairs", "file": "pairs.jsonl"},
        "of-prompts": {"source": "prompts", "prompts": "One?\nTwo?", "run_one": "runs/dpo", "run_two": "runs/ipo"},
    }.items():
        made = ada.post("/arena/new", {"name": name, **given})
        assert made.status_code == 200, made.text
        assert ada.get(made.headers["hx-redirect"]).status_code == 200
    found = {a.name: a for a in pairs.arenas(tmp_path)}
    runs = [p for p in found["of runs"].pairs.values() if p.gold is None]
    assert {p.models for p in runs} == {("start", "dpo"), ("start", "ipo"), ("dpo", "ipo")} and len(runs) == 9
    assert [p.answers for p in found["of runs"].pairs.values() if p.gold == "a"] == [("good", "bad")]
    (chatted,) = found["of-comparison"].pairs.values()
    assert chatted.prompt == chat
    assert [p.answers for p in found["of-prompts"].pairs.values()] == [None, None]
    for wrong, words in (
        ({"name": "of-pairs", "source": "pairs", "file": "pairs.jsonl"}, "already exists"),
        ({"name": "../x", "source": "pairs", "file": "pairs.jsonl"}, "is not a name"),
        ({"name": "new", "source": "pairs", "file": "pairs.jsonl"}, "is not a name"),
        ({"name": "x", "source": "runs"}, "none is ticked"),
        ({"name": "x", "source": "runs", "run": "model"}, "no prompt has two answers"),
        ({"name": "x", "source": "prompts", "run_one": "model", "run_two": "runs/dpo"}, "prompts: there is none"),
        ({"name": "x", "source": "prompts", "prompts": "Hi", "run_one": "model"}, "second model: is not chosen"),
        ({"name": "x"}, "is not chosen"),
        ({"name": "x", "source": "pairs", "file": "pairs.jsonl", "overlap": "200"}, "not a share"),
        ({"name": "x", "source": "prompts", "prompts": "a", "url_one": "ftp://x", "model_one": "m"}, "not an address"),
    ):
        told = ada.post("/arena/new", wrong)
        assert told.status_code == 400 and words in told.text, told.text


def test_starts_from_different_weights_are_different_models(tmp_path: Path) -> None:
    for run in ("a", "b"):
        (tmp_path / run).mkdir()
        (tmp_path / run / "manifest.json").write_text(json.dumps({"model": {"sha256": run * 64}}))
        (tmp_path / run / "samples.jsonl").write_text(
            json.dumps({"prompt": run, "before": "no", "after": "yes"}) + "\n"
        )
    found = pairs.answers_from_runs([tmp_path / "a", tmp_path / "b"])
    assert [set(answers) for _, answers in found.rows] == [{"start of a", "a"}, {"start of b", "b"}]


def test_the_form_says_how_many_pairs_an_arena_takes(studio: Any) -> None:
    assert f"at most {pairs.MAX_PAIRS:,} pairs" in Person(studio, "ada").get("/arena/new").text


def test_equal_answers_are_no_pair(tmp_path: Path) -> None:
    same = Answers([("P", {"a": "x", "b": "x "})], {"a": {}, "b": {}})
    assert pairs.make_pairs(same, 0) == []
    with pytest.raises(DataError, match="no pair of two different answers"):
        arena_of(tmp_path, answers=same)
    assert len(pairs.make_pairs(answers_of(3, ("a", "b", "c")), 0)) == 9


# ---- live answers ----


def test_answers_are_written_by_a_run_and_an_endpoint_and_kept(studio: Any, tmp_path: Path) -> None:
    from serving import model_of, serving, writer_folder

    run = writer_folder(tmp_path / "runs/dpo", "Yes!")
    with serving(model_of(writer_folder(tmp_path / "writer", "no-way")), name="writer") as endpoint:
        ada = Person(studio, "ada")
        given = {"source": "prompts", "prompts": "One?\nTwo?", "run_one": "runs/dpo", "url_two": endpoint.url}
        made = ada.post("/arena/new", {"name": "live", **given, "model_two": "writer"})
        assert made.status_code == 200, made.text
        page = ada.get("/arena/live").text
        assert 'data-live="/arena/live/live"' in page and 'class="say left" disabled' in page
        hidden = {n: page.split(f'name="{n}" value="')[1].split('"')[0] for n in ("order", "pair")}
        assert ada.post("/arena/live/judge", {**hidden, "verdict": "left"}).status_code == 409
        events = ada.get("/arena/live/live").text
        pieces: dict[str, str] = {"left": "", "right": ""}
        for kind, data in re.findall(r"event: (\w+)\ndata: (.*)\n", events):
            if kind in pieces:
                pieces[kind] += json.loads(data)["text"]
        assert "event: done" in events and sorted(pieces.values()) == ["Yes!", "no-way"], events
        (arena,) = pairs.arenas(tmp_path)
        written = arena.pairs[hidden["pair"]].answers
        assert written is not None and set(written) == set(pieces.values())
        ada.judge("live", "left")
        (row,) = lines(arena)
        assert (row["model_a"], row["model_b"]) == ("runs/dpo", "writer") and Path(run).name == "dpo"
        assert row[f"answer_{row['left']}"] == pieces["left"]
    # the endpoint is gone: an error message, and nothing is recorded
    assert "event: failed" in (told := ada.get("/arena/live/live").text) and "cannot be asked" in told
    assert len(lines(arena)) == 1
    assert ada.judge("live", "skip").status_code == 200 and lines(arena)[1]["verdict"] == "skip"
    assert "That was the last pair" in ada.get("/arena/live").text
    assert [q.what for q in load_preferences(str(arena.preferences.path)).quarantined] == ["skipped"]


def test_a_key_goes_to_no_endpoint_that_another_person_put_into_an_arena(
    studio: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "secret-of-mine")
    ada = Person(studio, "ada")
    endpoint = {"url_two": "http://127.0.0.1:9/v1", "model_two": "writer", "key_two": "MY_KEY"}
    random_run = {"url_one": "http://127.0.0.1:9/v1", "model_one": "other"}
    given = {"name": "live", "source": "prompts", "prompts": "One?", **random_run, **endpoint}
    assert ada.post("/arena/new", given).status_code == 200
    ada.get("/arena/live")
    assert "cannot be asked" in ada.get("/arena/live/live").text  # nobody listens there
    monkeypatch.setenv("PENCHANT_CACHE", str(tmp_path / "of-another-person"))
    told = ada.get("/arena/live/live").text
    assert "event: failed" in told and "secret-of-mine" not in told

    async def asked(**writer: str) -> None:
        async for _ in Writers()._stream_from_endpoint({"model": "writer", **writer}, "One?"):
            pass

    for writer, words in (
        ({"url": "http://127.0.0.1:9/v1", "key_env": "MY_KEY"}, r"\$MY_KEY.*not made in your studio"),
        ({"url": "https://elsewhere.example/v1"}, "prompts.*not made in your studio"),
    ):
        with pytest.raises(DataError, match=words):
            asyncio.run(asked(**writer))
    monkeypatch.setenv("OPENAI_API_KEY", "the-usual-one")
    with serve(lambda *_: (404, {}, '{"error": {"message": "no such model"}}')) as endpoint:
        with pytest.raises(DataError, match="answered 404: no such model; check"):
            asyncio.run(asked(url=endpoint.url))
        assert "authorization" not in endpoint.asked[0].headers
    half = 'data: {"choices": [{"delta": {"content": "Half"}}]}\n\ndata: {"error": {"message": "out of memory"}}\n\n'
    with serve(lambda *_: (200, {}, half)) as endpoint, pytest.raises(DataError, match="broke off: out of memory"):
        asyncio.run(asked(url=endpoint.url))


def test_a_link_in_an_arena_leads_nowhere(studio: Any, tmp_path: Path) -> None:
    secret = tmp_path.parent / f"{tmp_path.name}-secret.jsonl"
    secret.write_text('{"prompt": "secret"}\n')
    arena, ada = arena_of(tmp_path), Person(studio, "ada")
    for name in (pairs.PAIRS, pairs.WRITTEN, "preferences.jsonl"):
        file = arena.folder / name
        kept = file.read_bytes() if file.exists() else None
        file.unlink(missing_ok=True)
        file.symlink_to(secret)
        for page in ("", "/results", "/report", "/preferences.jsonl", "/item"):
            answer = ada.get(f"/arena/test{page}")
            assert answer.status_code == 404 and "secret" not in answer.text, (name, page)
        assert "/arena/test" not in ada.get("/arena").text
        file.unlink()
        if kept is not None:
            file.write_bytes(kept)
    assert ada.get("/arena/test").status_code == 200
    (tmp_path / "arenas").rename(tmp_path / "moved")
    (tmp_path.parent / f"{tmp_path.name}-out").mkdir()
    (tmp_path / "arenas").symlink_to(tmp_path.parent / f"{tmp_path.name}-out")
    with pytest.raises(DataError, match="link"):
        arena_of(tmp_path, "other")


def test_half_characters_and_odd_names_do_not_break_a_page(studio: Any, tmp_path: Path) -> None:
    answers = Answers([("\ud800?", {"a": "x\udfff", "b": "y"})], {"a": {}, "b": {}})
    arena_of(tmp_path, answers=answers, reasons=("goo\u200bd",))
    (tmp_path / "b\u202ed.jsonl").write_text('{"prompt": "p", "chosen": "c", "rejected": "r"}\n')
    (tmp_path / "bad\udcff.jsonl").write_text("{}\n")
    ada = Person(studio, "ada")
    assert "U+DFFF" in ada.get("/arena/test").text
    assert ada.judge("test", "left", reason="goo\u200bd").status_code == 200
    assert lines(pairs.Arena(tmp_path / "arenas/test"))[0]["reasons"] == ["goo\u200bd"]
    page = ada.get("/arena/new")
    assert page.status_code == 200 and "bad" not in page.text.split("<main")[1]
    assert '<option value="b\u202ed.jsonl">' in page.text  # its real name, so that it can be selected
    assert ada.post("/arena/test/judge", origin="http://[").status_code == 403
    assert ada.get(f"/arena/{'a' * 5000}").status_code == 404


@pytest.mark.parametrize("reasons", [5, "abc", {"a": 1}, None])
def test_reasons_that_are_no_list_are_none(tmp_path: Path, reasons: Any) -> None:
    folder = tmp_path / pairs.ARENAS / "x"
    folder.mkdir(parents=True)
    (folder / pairs.ARENA).write_text(json.dumps({"reasons": reasons, "overlap": 0.5}))
    (arena,) = pairs.arenas(tmp_path)
    assert arena.settings.reasons == () and arena.settings.overlap == 0.5


def test_an_arena_that_was_made_anew_has_its_own_results(studio: Any, tmp_path: Path) -> None:
    ada = Person(studio, "ada")
    for models in (("dpo", "start"), ("kto", "start")):
        arena = arena_of(tmp_path, models=models)
        ada.judge("test", "left")
        assert models[0] in ada.get("/arena/test/results").text
        shutil.rmtree(arena.folder)


def test_an_arena_that_does_not_fit_leaves_its_name_free(
    studio: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "rows.jsonl").write_text('{"prompt": "p", "chosen": "c", "rejected": "r"}\n')
    ada, asked = Person(studio, "ada"), {"name": "new one", "source": "pairs", "file": "rows.jsonl"}
    with monkeypatch.context() as patched:
        patched.setattr(pairs, "write_atomically", full)
        answer = ada.post("/arena/new", asked)
        assert answer.status_code == 400 and "No space left" in answer.text
        assert not any((tmp_path / "arenas").iterdir())
        patched.setattr("penchant.studio.arena.pairs.answers_from_pairs", full)  # any disk error becomes a message
        answer = ada.post("/arena/new", asked)
        assert answer.status_code == 507 and "No space left" in answer.text
    made = pairs.write_atomically

    def slowly(*what: Any) -> None:
        time.sleep(0.05)
        made(*what)

    monkeypatch.setattr(pairs, "write_atomically", slowly)
    answers: list[httpx.Response] = []
    threads = [threading.Thread(target=lambda: answers.append(ada.post("/arena/new", asked))) for _ in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    first, second = sorted(answers, key=lambda answer: answer.status_code)
    assert first.status_code == 200 and "already exists" in second.text
    assert [p.name for p in (tmp_path / "arenas").iterdir()] == ["new one"]


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    monkeypatch.setitem(sys.modules, "markdown_it", None)
    assert main(["studio", str(tmp_path)]) == 2
    assert "pip install 'penchant[studio]'" in capsys.readouterr().err
