"""The hub's client against a fake local hub: access, hashes, broken connections, and a token that is never shown."""

from __future__ import annotations

import gzip
import io
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_hub import COMMIT, FakeHub, fake_hub

from penchant.cli import main
from penchant.download import hub as module
from penchant.download.hub import Hub, HubFile, RemoteFile
from penchant.download.plan import hub_sources
from penchant.requests import GetRequest

SECRET = "hf_planted0123456789"
HH = "Anthropic/hh-rlhf"


def pair_rows(count: int, tag: str = "") -> list[dict[str, str]]:
    words = ["river", "stone", "cloud", "lamp", "forest", "window", "paper", "engine", "garden", "mirror"]
    draw = random.Random(tag)
    rows = []
    for i in range(count):
        asked = f"\n\nHuman: Question {i}{tag}: {' '.join(draw.choices(words, k=12))}?\n\nAssistant:"
        rows.append({"chosen": f"{asked} Good {i}.", "rejected": f"{asked} Bad {i}."})
    return rows


def jsonl(rows: list[dict]) -> bytes:
    return "".join(json.dumps(r) + "\n" for r in rows).encode()


def hh_files(count: int = 40) -> dict[str, bytes]:
    return {
        "README.md": b"# card",
        "harmless-base/train.jsonl.gz": gzip.compress(jsonl(pair_rows(count, "a")), mtime=0),
        "harmless-base/test.jsonl.gz": gzip.compress(jsonl(pair_rows(10, "b")), mtime=0),
        "helpful-base/train.jsonl.gz": gzip.compress(jsonl(pair_rows(10, "c")), mtime=0),
        "red-team-attempts/red_team_attempts.jsonl.gz": gzip.compress(
            json.dumps([{"transcript": "\n\nHuman: Hello?\n\nAssistant: Yes.", "rating": 1}]).encode(), mtime=0
        ),
    }


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., FakeHub]]:
    """Start a fake hub, with the client's cache and tokens in this test's folder."""
    import huggingface_hub.file_download
    import huggingface_hub.utils._http
    from huggingface_hub import constants

    made = []

    def begin(**settings: object) -> FakeHub:
        context = fake_hub(**settings)
        found = context.__enter__()
        made.append(context)
        monkeypatch.setenv("HF_ENDPOINT", found.url)
        return found

    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(tmp_path / "tokens"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(module, "RETRY_DELAYS", (0.0, 0.0, 0.0))
    for place in (huggingface_hub.file_download, huggingface_hub.utils._http):
        monkeypatch.setattr(place, "time", _NoSleep())
    monkeypatch.chdir(tmp_path)
    yield begin
    for context in made:
        context.__exit__(None, None, None)


class _NoSleep:
    """The time module without its sleep."""

    def __getattr__(self, name: str) -> object:
        import time

        return (lambda seconds: None) if name == "sleep" else getattr(time, name)


def run(*arguments: str) -> int:
    return main(["data", "get", *arguments])


def test_a_data_set_is_fetched_checked_and_split(
    start: Callable[..., FakeHub], capsys: pytest.CaptureFixture[str]
) -> None:
    hub = start(files={HH: hh_files()})
    assert run("hh", "--subset", "harmless-base") == 0
    said = capsys.readouterr()
    assert "50 rows = 50 accepted + 0 filtered + 0 kept aside" in said.out
    data = json.loads(Path("data/hh-rlhf/data.json").read_text())
    assert data["commit"] == COMMIT and data["origin"].endswith(HH)
    assert [s["path"] for s in data["sources"]] == ["harmless-base/train.jsonl.gz", "harmless-base/test.jsonl.gz"]
    assert sum(s["rows"] for s in data["splits"].values()) == 50
    assert not Path("data/hh-rlhf/.get").exists()
    asked = len(hub.asked)
    assert run("Anthropic/hh-rlhf", "--subset", "harmless-base", "--output", "data/hh-rlhf") == 2  # an alias
    assert run("hh", "--subset", "harmless-base") == 0
    assert "nothing was done" in capsys.readouterr().err and len(hub.asked) == asked


def test_first_reads_a_part_of_the_first_file(
    start: Callable[..., FakeHub], capsys: pytest.CaptureFixture[str]
) -> None:
    lines = jsonl([{"prompt": f"p {i} " + "x" * 2000, "chosen": "a", "rejected": "b"} for i in range(1000)])
    hub = start(files={"me/pairs": {"train.jsonl": lines, "train2.jsonl": lines}})
    assert run("me/pairs", "--first", "100") == 0
    said = capsys.readouterr()
    assert "100 rows = 100 accepted" in said.out and "its hash is not checked" in said.err
    ranges = [a.headers["range"] for a in hub.asked if a.method == "GET" and "range" in a.headers]
    assert ranges[0] == f"bytes=0-{module.BLOCK - 1}" and len(set(ranges)) == 1
    assert not any("train2.jsonl" in a.path for a in hub.asked if a.method == "GET" and a.server == "cdn")
    assert not list(Path("cache").rglob("*.jsonl"))


def test_first_rows_of_parquet_fetch_a_row_group(
    start: Callable[..., FakeHub], capsys: pytest.CaptureFixture[str]
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    draw = random.Random(0)
    rows = [{"prompt": f"p{i}", "completion": draw.randbytes(1000).hex()} for i in range(2000)]
    held = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), held, row_group_size=100)
    hub = start(files={"me/sft": {"data/train-0.parquet": held.getvalue(), "data/train-1.parquet": held.getvalue()}})
    assert run("me/sft", "--first", "50") == 0
    sizes = [
        int(end) - int(begin) + 1
        for a in hub.asked
        if a.server == "cdn" and "range" in a.headers
        for begin, end in [a.headers["range"].removeprefix("bytes=").split("-")]
    ]
    assert sum(sizes) < len(held.getvalue()) / 2 and not any(
        "train-1" in a.path for a in hub.asked if a.server == "cdn"
    )
    assert "50 rows = 50 accepted" in capsys.readouterr().out


def test_a_broken_connection_resumes(start: Callable[..., FakeHub], monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 4096)
    hub = start(files={HH: hh_files(4000)}, cut={"harmless-base/train.jsonl.gz"})
    assert run("hh", "--subset", "harmless-base") == 0
    ranges = [a.headers.get("range") for a in hub.asked if a.method == "GET" and a.path.endswith("base/train.jsonl.gz")]
    assert any(r and r != "bytes=0-" for r in ranges)
    assert json.loads(Path("data/hh-rlhf/data.json").read_text())["counts"]["accepted"] == 4010


def test_a_wrong_hash_is_fetched_once_more(start: Callable[..., FakeHub], capsys: pytest.CaptureFixture[str]) -> None:
    path = "harmless-base/train.jsonl.gz"
    hub = start(files={HH: hh_files()}, wrong={path: 1})
    assert run("hh", "--subset", "harmless-base") == 0
    assert "its hash is not the published one; fetching it again" in capsys.readouterr().err
    assert sum(p.endswith(path) for p in hub.paths()) == 2


@pytest.mark.parametrize("lfs", [(".gz",), ()])
def test_a_hash_that_stays_wrong_is_refused(
    start: Callable[..., FakeHub], capsys: pytest.CaptureFixture[str], lfs: tuple[str, ...]
) -> None:
    """By SHA-256 and by git object id."""
    hub = start(files={HH: hh_files()}, wrong={"harmless-base/train.jsonl.gz": 9}, lfs=lfs)
    assert run("hh", "--subset", "harmless-base") == 2
    assert "another hash than the published one, twice" in capsys.readouterr().err
    hub.wrong.clear()
    assert run("hh", "--subset", "harmless-base") == 0  # the bad file is not cached as good


@pytest.mark.parametrize("status", [429, 500, 503])
@pytest.mark.parametrize("place", ["/api/", "/tree/", "/resolve/", "/file/"])
def test_a_busy_hub_is_asked_again(start: Callable[..., FakeHub], status: int, place: str) -> None:
    start(files={HH: hh_files()}, fail={place: [status, status]})
    assert run("hh", "--subset", "harmless-base", "--quiet") == 0


def test_a_hub_that_stays_busy(start: Callable[..., FakeHub], capsys: pytest.CaptureFixture[str]) -> None:
    hub = start(files={HH: hh_files()}, fail={"helpful-base/train": [503] * 99})
    assert run("hh") == 2
    said = capsys.readouterr().err
    assert "the hub answers 503" in said and "continues where it stopped" in said
    hub.fail.clear()
    before = len(hub.asked)
    assert run("hh") == 0
    again = [a.path for a in hub.asked[before:] if a.method == "GET"]
    assert again and not any("harmless-base" in p for p in again)  # fetched files are kept
    assert "continuing what was begun" in capsys.readouterr().err


def _not_logged_in(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.gated = {HH}


def _terms(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.gated, hub.accepted, hub.token = {HH}, False, SECRET
    monkeypatch.setenv("HF_TOKEN", SECRET)


def _bad_token(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)


def _no_such(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.files.clear()
    hub.token = SECRET
    monkeypatch.setenv("HF_TOKEN", SECRET)


def _no_such_logged_out(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.files.clear()


def _no_network(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", f"http://{SECRET}@127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", SECRET)


def _offline(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_TOKEN", SECRET)


def _busy(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.token, hub.fail = SECRET, {"/file/": [503] * 99}
    monkeypatch.setenv("HF_TOKEN", SECRET)


def _wrong_hash(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.token, hub.wrong = SECRET, dict.fromkeys(hub.files[HH], 9)
    monkeypatch.setenv("HF_TOKEN", SECRET)


def _moved(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.token, hub.files = SECRET, {HH: {"README.md": b""}}
    monkeypatch.setenv("HF_TOKEN", SECRET)


def _fine(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.gated, hub.token = {HH}, SECRET
    monkeypatch.setenv("HF_TOKEN", SECRET)


@pytest.mark.parametrize(
    ("state", "code", "words"),
    [
        (_not_logged_in, 2, ["gated", "nobody is logged in", "accept its terms", "hf auth login", "HF_TOKEN"]),
        (_terms, 2, ["gated", "has not accepted its terms", f"huggingface.co/datasets/{HH}"]),
        (_bad_token, 2, ["does not accept the token", "hf auth login"]),
        (_no_such, 2, ["no such data set", "check the name"]),
        (_no_such_logged_out, 2, ["no such data set", "if it is private", "HF_TOKEN"]),
        (_no_network, 2, ["cannot be reached", "check the network"]),
        (_offline, 2, ["HF_HUB_OFFLINE"]),
        (_busy, 2, ["the hub answers 503"]),
        (_wrong_hash, 2, ["another hash"]),
        (_moved, 2, ["not where they were published"]),
        (_fine, 0, []),
    ],
)
def test_what_goes_wrong_is_said_and_the_token_is_never_seen(
    start: Callable[..., FakeHub],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    state: Callable[[FakeHub, pytest.MonkeyPatch], None],
    code: int,
    words: list[str],
) -> None:
    hub = start(files={HH: hh_files()})
    state(hub, monkeypatch)
    assert run("hh", "--subset", "harmless-base") == code
    said = capfd.readouterr()
    last = [line for line in said.err.splitlines() if line.startswith("penchant: http")]
    assert len(last) == (1 if code else 0)
    for word in words:
        assert word in last[0]
    assert SECRET not in said.out + said.err and "SIGNED" not in said.out + said.err and "Traceback" not in said.err
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert SECRET.encode() not in path.read_bytes(), path
    carried = [a for a in hub.asked if SECRET in a.headers.get("authorization", "")]
    assert all(a.server == "hub" for a in carried)  # the second host never receives it
    assert carried or state in (_not_logged_in, _no_such_logged_out, _no_network, _offline)


def test_the_token_stays_with_the_hub_when_parts_are_read(
    start: Callable[..., FakeHub], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = start(files={HH: hh_files()}, gated={HH}, token=SECRET)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    assert run("hh", "--first", "5", "--quiet") == 0
    assert [a for a in hub.asked if a.server == "cdn"]
    assert not any("authorization" in a.headers for a in hub.asked if a.server == "cdn")


def test_a_card_names_subsets_and_splits(start: Callable[..., FakeHub], capsys: pytest.CaptureFixture[str]) -> None:
    rows = jsonl([{"frage": f"q{i}", "gut": "a", "schlecht": "b"} for i in range(20)])
    configs = [
        {"config_name": "a", "default": True, "data_files": [{"split": "train", "path": "a/*.jsonl"}]},
        {
            "config_name": "b",
            "data_files": [{"split": "train", "path": ["b/x.jsonl"]}, {"split": "dev", "path": "b/y*"}],
        },
    ]
    files = dict.fromkeys(("a/0.jsonl", "a/1.jsonl", "b/x.jsonl", "b/y.jsonl"), rows)
    start(files={"me/set": files}, configs={"me/set": configs})
    columns = ["--columns", "prompt=frage", "chosen=gut", "rejected=schlecht"]
    assert run("me/set", *columns) == 0
    assert "subsets not read: b" in capsys.readouterr().err
    assert run("me/set", *columns, "--subset", "b", "--output", "b", "--published-splits", "--split", "1,0,0") == 0
    assert json.loads(Path("b/data.json").read_text())["splits"]["validation"]["rows"] == 20
    assert run("me/set", *columns, "--subset", "c", "--output", "c") == 2
    assert "it has a, b" in capsys.readouterr().err
    assert run("me/set", "--output", "d") == 2
    assert "map your columns" in capsys.readouterr().err
    assert run("me/set", "--revision", "gone", "--output", "e") == 2
    assert "no such revision" in capsys.readouterr().err


@pytest.mark.parametrize(
    "config,expected",
    [
        ({"data_dir": "en"}, {"en/rows.jsonl": "train", "en/dev.jsonl": "validation"}),
        ({"data_dir": "en", "data_files": "r*"}, {"en/rows.jsonl": "train"}),
        (
            {"data_files": [{"split": "test", "path": "de/**/*.jsonl"}]},
            {"de/rows.jsonl": "test", "de/x/y.jsonl": "test"},
        ),
    ],
)
def test_a_cards_folder_and_patterns_choose_its_files(config: dict[str, Any], expected: dict[str, str]) -> None:
    paths = ("de/rows.jsonl", "de/x/y.jsonl", "en/dev.jsonl", "en/rows.jsonl")
    files = [HubFile(path, 1, None, None) for path in paths]
    sources, _ = hub_sources(files, [{"config_name": "default", **config}], GetRequest("me/set"), None)
    assert {s.path: s.split for s in sources} == expected


def test_answers_that_make_no_sense(start: Callable[..., FakeHub], capsys: pytest.CaptureFixture[str]) -> None:
    start(files={HH: hh_files()}, fail={"/api/": [200]})
    assert run("hh") == 2
    assert "the hub's answer cannot be understood" in capsys.readouterr().err


def test_unknown_names(start: Callable[..., FakeHub], capsys: pytest.CaptureFixture[str]) -> None:
    start()
    assert run("a--b/c") == 2
    assert "is not a name that a data set can have" in capsys.readouterr().err
    assert run("ultrafedback") == 2
    assert "did you mean ultrafeedback?" in capsys.readouterr().err
    assert run("hh", "--subset", "harmles-base") == 2
    assert "did you mean harmless-base?" in capsys.readouterr().err


def test_red_team_attempts_are_prompts(start: Callable[..., FakeHub], capsys: pytest.CaptureFixture[str]) -> None:
    start(files={HH: hh_files()})
    assert run("hh", "--subset", "red-team-attempts") == 2
    assert "--as prompts" in capsys.readouterr().err
    assert run("hh", "--subset", "red-team-attempts", "--as", "prompts") == 0
    rows = [
        r for s in ("train", "validation", "test") for r in Path(f"data/hh-rlhf/{s}.jsonl").read_text().splitlines()
    ]
    assert json.loads(rows[0]) == {"prompt": [{"role": "user", "content": "Hello?"}]}


def test_parts_of_a_file(start: Callable[..., FakeHub]) -> None:
    content = random.Random(0).randbytes(100_000)
    start(files={"me/x": {"x.parquet": content, "y.csv": content}})
    hub = Hub(lambda line: None)
    repository = hub.list_repository("me/x", "main")
    for file in repository.files:
        with io.BufferedReader(RemoteFile(hub, repository, file), 1000) as stream:
            stream.seek(-10, io.SEEK_END)
            assert stream.read() == content[-10:]
            stream.seek(5000)
            assert stream.read(7) == content[5000:5007]
            stream.seek(0)
            assert stream.read() == content
