"""The run pages over HTTP, and starting, stopping and resuming runs."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from run_folders import make_run
from starlette.testclient import TestClient

from penchant.config import load_config
from penchant.config.page import parts
from penchant.errors import CheckpointError, ConfigError
from penchant.report import write_report
from penchant.runfolder import CONSOLE, RunLock
from penchant.studio import launch, shelf
from penchant.studio.app import Studio
from penchant.studio.launch import INTERRUPTED, Processes, draft, form_parts, settings_of, working_folder
from penchant.studio.runs import sample_of
from penchant.studio.shelf import Feed, Shelf

FIXTURES = Path(__file__).parents[1] / "fixtures/v0_1"
EVIL = "<script>alert(1)</script></style>\u202e\x1b[31m"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "studio"
    root.mkdir()
    make_run(root / "first", 8, status="finished", total_steps=8)
    return root


@pytest.fixture
def client(folder: Path) -> Iterator[TestClient]:
    studio = Studio(folder, token="t")
    made = TestClient(studio, base_url="http://127.0.0.1")
    made.get("/?token=t")
    made.headers["x-csrf-token"] = studio._csrf
    yield made
    studio.close()


def test_the_list_finds_and_filters(client: TestClient, folder: Path) -> None:
    shutil.copytree(FIXTURES / "sweep", folder / "sweep")
    page = client.get("/runs").text
    assert 'href="/runs/view?run=first"' in page and 'href="/runs/group?kind=sweep&amp;path=sweep"' in page
    part = client.get("/runs?q=sweep", headers={"hx-request": "true"}).text
    assert "<html" not in part and "sweep/beta-0.1" in part and "run=first" not in part


def test_a_run_several_of_them_and_a_sweep_have_pages(client: TestClient, folder: Path) -> None:
    shutil.copytree(FIXTURES / "sweep", folder / "sweep")
    aside = {"where": "d.jsonl:3", "what": "no prompt", "how": "add one", "row": {}}
    (folder / "first" / "quarantine.train.jsonl").write_text(json.dumps(aside) + "\n")
    one = client.get("/runs/view?run=first").text
    assert 'data-feed="/runs/feed?run=first"' in one and "8 of 8" in one
    link = re.search(r'href="([^"]*)">Rows that were kept aside', one)
    assert link and "no prompt" in client.get(link[1]).text
    two = client.get("/runs/view?run=first&run=sweep/beta-0.1").text
    assert "2 runs" in two and "run=first&amp;run=sweep/beta-0.1" in two
    group = client.get("/runs/group?kind=sweep&path=sweep").text
    assert "best by validation" in group and "sweep/beta-0.5" in group and ">preference accuracy at the end" in group


def test_a_page_that_is_none_leads_back_to_its_area(client: TestClient) -> None:
    for path, back in (("/runs/view?run=none", "/runs"), ("/data/view?file=none", "/data"), ("/none", "/arena")):
        page = client.get(path)
        assert page.status_code == 404 and f'<a href="{back}">Back to' in page.text
    assert "there is no such page" in client.get("/none").text


def test_samples_of_a_run_that_goes_on_are_those_from_before() -> None:
    assert sample_of({"prompt": "P", "completion": "C", "reward": 0.5})["answers"] == [("before training", "C", 0.5)]
    both = sample_of({"prompt": "P", "before": "B", "after": "A", "reward_after": 1.0})["answers"]
    assert both == [("before training", "B", None), ("after training", "A", 1.0)]


def test_the_buttons_follow_what_can_be_done(client: TestClient, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shelf, "FRESH", 0.0)
    asked: list[bool] = []
    monkeypatch.setattr(Processes, "stop_requested", lambda self, path: bool(asked))

    def buttons() -> list[str]:
        return re.findall(r"<button[^>]*>([^<]*)", client.get("/runs/actions?run=second").text)

    make_run(folder / "second", 5)
    with RunLock(folder / "second"):
        assert (
            buttons() == ["Stop it"] and Feed(Shelf(folder), ["second"]).updates()["second"]["facts"]["lock"] == "held"
        )
        asked.append(True)
        assert buttons() == [] and "stopping; it writes" in client.get("/runs/actions?run=second").text
    assert (
        buttons() == ["Go on with it"]
        and Feed(Shelf(folder), ["second"]).updates()["second"]["facts"]["lock"] == "free"
    )
    asked.clear()
    monkeypatch.setattr(Processes, "is_running", lambda *_: True)  # it was started, but has not reported yet
    assert buttons() == ["Stop it"] and "loading the model" in client.get("/runs/actions?run=second").text


@pytest.mark.parametrize(
    "page", ["view?run=", "actions?run=", "feed?run=", "samples?run=", "report?path=", "group?kind=sweep&path="]
)
def test_nothing_outside_the_folder_is_shown(client: TestClient, folder: Path, page: str) -> None:
    make_run(folder.parent / "outside", 2)
    (folder / "link").symlink_to(folder.parent / "outside")
    for name in ("..", "../outside", "/etc", "first/../../outside", "link", "nothing", "first%00"):
        assert client.get(f"/runs/{page}{name}").status_code in (400, 404), name


def test_a_damaged_table_of_a_sweep_does_not_break_its_page(client: TestClient, folder: Path) -> None:
    make_run(folder / "sweep" / "one", 8, status="finished")
    table = {"settings": [{"setting": ["x"], "seeds": 3, "mean": "y"}], "best": 5, "metric": 7}
    record = {"sweep": {"runs": [5, "one", None]}, "runs": {"one": {"state": 5}}, "table": table}
    (folder / "sweep" / "sweep.json").write_text(json.dumps(record))
    assert client.get("/runs/group?kind=sweep&path=sweep").status_code == 200


def test_a_report_that_is_a_link_out_is_not_served(client: TestClient, folder: Path) -> None:
    (folder.parent / "secret.html").write_text("secret")
    (folder / "first" / "report.html").symlink_to(folder.parent / "secret.html")
    assert "secret" not in client.get("/runs/report?path=first").text


def test_a_report_is_a_sandbox_of_its_own(client: TestClient, folder: Path) -> None:
    (folder / "first" / "report.html").write_text("<p>kept</p><script>fetch('/')</script>")
    answer = client.get("/runs/report?path=first")
    policy = answer.headers["content-security-policy"]
    assert "kept" in answer.text and policy.startswith("sandbox allow-scripts;") and "connect-src" not in policy
    assert "default-src 'none'" in policy and "allow-same-origin" not in policy
    (folder / "first" / "report.html").unlink()
    assert "Penchant report" in client.get("/runs/report?path=first").text  # built from the current files
    assert not (folder / "first" / "report.html").exists()


def test_the_report_of_a_killed_run_does_not_say_that_it_goes_on(client: TestClient, folder: Path) -> None:
    run = make_run(folder / "killed", 8, status="running")
    with RunLock(run):
        kept = write_report(run).read_text()
        assert "still running" in kept and client.get("/runs/report?path=killed").text == kept
    (run / ".lock").write_text(f"PID 999999999 on {socket.gethostname()}\n")
    assert "still running" not in client.get("/runs/report?path=killed").text


def test_texts_of_models_are_inert(client: TestClient, folder: Path) -> None:
    run = folder / "first"
    turns = [{"role": "system", "content": EVIL}, {"role": EVIL, "content": "hello"}]
    rows = [{"messages": turns, "before": EVIL, "after": EVIL}, {"prompt": EVIL, "completion": EVIL, "reward": 0.5}]
    (run / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "manifest.json").write_text(json.dumps({"status": "stopped", "why": EVIL, "loss": EVIL}))
    (run / "config.resolved.yaml").write_text(f"# {EVIL!r}\nloss: '</pre><script>x</script>'\n")
    for page in ("/runs/samples?run=first", "/runs/view?run=first", "/runs"):
        text = client.get(page).text
        assert "<script>alert" not in text and "<script>x" not in text and "\u202e" not in text and "\x1b" not in text
        assert "</style>" not in text
    assert "before training" in client.get("/runs/samples?run=first").text


def test_news_come_as_events(client: TestClient, folder: Path) -> None:
    studio: Any = client.app
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("penchant.studio.runs.EVERY", 0.01)
        patch.setattr("penchant.studio.shelf.FRESH", 0.0)
        patch.setattr("asyncio.sleep", _closing_after(studio, folder / "first"))
        answer = client.get("/runs/feed?run=first")
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: ")]
    assert events[0]["start"] is True and events[0]["runs"]["first"]["line"]["loss"][0] == list(range(1, 9))
    assert "start" not in events[1] and events[1]["runs"]["first"]["line"]["loss"] == [[9], [0.5]]


def _closing_after(studio: Any, run: Path) -> Callable[[float], Any]:
    """A fake sleep: each call advances the run by a step, and the second one closes the studio."""
    slept = 0

    async def sleep(_: float) -> None:
        nonlocal slept
        slept += 1
        if slept == 1:
            with (run / "metrics.jsonl").open("a") as file:
                file.write('{"kind": "train", "step": 9, "loss": 0.5}\n')
        studio.closing = slept > 1

    return sleep


# ---- The form ----


def test_the_form_has_every_key_of_the_schema() -> None:
    shown = {key.path for part in form_parts("dpo", "ppo") for key in part.keys}
    known = {key.path for part in parts() for key in part.keys if ".N." not in key.path}
    of_others = {key.path for part in parts() if part.title.startswith("algorithm") for key in part.keys}
    assert known - of_others - {"loss.mix", "data.sources"} <= shown
    assert "loss.beta" in shown and "loss.gamma" in {k.path for p in form_parts("simpo") for k in p.keys}
    for part in form_parts():
        for key in part.keys:
            assert key.meaning and (key.takes or part.title == "loss"), key


def test_what_the_form_writes_is_the_config(tmp_path: Path) -> None:
    fields = [
        *(("model.path", "m: odd #name"), ("data.path", "rows.jsonl"), ("output", "runs/a"), ("loss.name", "simpo")),
        *(("loss.beta", "2.5"), ("train.lr", "1e-5"), ("train.epochs", ""), ("probe", "on"), ("lora.r", "8")),
        ("more", "train.seed=7\n\ndata.columns={prompt: q}\n"),
    ]
    made = draft(tmp_path, fields)
    (tmp_path / "a.yaml").write_text(made.text)
    read = load_config(tmp_path / "a.yaml")
    assert read == made.config and read.model.path == "m: odd #name" and read.train.lr == 1e-5 and read.train.seed == 7
    assert read.lora is not None and read.lora.r == 8 and read.data.columns == {"prompt": "q"}
    assert "epochs" not in made.text and (made.file, made.folder) == ("runs/a.yaml", "runs/a")


@pytest.mark.parametrize(
    "more, said",
    [
        ({"train.lr": "fast"}, "train.lr"),
        ({"train.batch_size": "0"}, "train.batch_size"),
        ({"output": "../elsewhere"}, "output"),
        ({"output": "/tmp/elsewhere"}, "output"),
        ({"output": "."}, "output"),
        ({"more": "no setting"}, "further settings"),
        ({"more": "train.batchsize=3"}, "batch_size"),
        ({"algorithm.name": "rloo", "loss.beta": "0.2"}, "loss and algorithm are both set"),
    ],
)
def test_what_the_form_cannot_mean_is_said(tmp_path: Path, more: dict[str, str], said: str) -> None:
    fields = {"model.path": "m", "data.path": "d.jsonl", "output": "a", **more}
    with pytest.raises(ConfigError, match=said):
        draft(tmp_path, list(fields.items()))


def test_a_run_like_another_has_its_settings(client: TestClient, folder: Path) -> None:
    config = json.loads((FIXTURES / "finished" / "identity.json").read_text())["config"]
    given = settings_of(config)
    assert given["loss.beta"] == "0.5" and given["train.batch_size"] == "6" and "train.weight_decay" not in given
    shutil.copytree(FIXTURES / "finished", folder / "finished")
    text = (FIXTURES / "finished" / "config.resolved.yaml").read_text()
    (folder / "finished" / "config.resolved.yaml").write_text(text.replace("@FOLDER@", "/there"))
    page = client.get("/runs/new?like=finished").text
    assert 'value="finished-2"' in page and 'name="train.batch_size" value="6"' in page


def test_a_plan_stands_before_the_start(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {"model.path": "m", "data.path": "d.jsonl", "output": "new", "train.max_steps": "3"}
    sizes = {"peak": 2e9, "free": 4e9, "fits": True}
    found = {"work": {"steps": 3, "steps_per_epoch": 2}, "memory": sizes, "disk": sizes, "seconds": None}
    found |= {"parameters": {"all": 10, "trainable": 4}, "data": {}, "notes": [EVIL]}
    monkeypatch.setattr(Processes, "plan", lambda *_: found)
    page = client.post("/runs/plan", data=asked).text
    assert "max_steps: 3" in page and "2.00 GB" in page and 'hx-post="/runs/start"' in page and "<script>" not in page

    def fails(*_: Any) -> Any:
        raise ConfigError("plan", "m: no such model")

    monkeypatch.setattr(Processes, "plan", fails)
    page = client.post("/runs/plan", data=asked).text
    assert "no such model" in page and "/runs/start" not in page
    page = client.post("/runs/plan", data=asked | {"train.lr": "fast"}).text
    assert "train.lr is" in page and "/runs/start" not in page


# ---- Processes ----


def test_the_exit_code_of_a_stopped_run_is_that_of_training() -> None:
    from penchant.training.loop import Interrupted

    assert Interrupted.exit_code == INTERRUPTED


TRAINS = """
import fcntl, os, signal, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
from penchant.runfolder import RunLock
signal.signal(signal.SIGTERM, lambda *_: (print("stopped well", flush=True), sys.exit(4)))
with RunLock(folder):
    (folder / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "loss": 0.5}\\n')
    (folder / "config.resolved.yaml").write_text("{}")
    print("trains", sys.argv[2:], flush=True)
    time.sleep(60)
"""


@pytest.fixture
def processes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Processes]:
    """Processes that hold a run's lock, as stand-ins for `penchant train`."""
    monkeypatch.setattr(launch, "command", lambda *a: [sys.executable, "-c", TRAINS, "new", *a])
    made = Processes(folder)
    yield made
    for process in made.started.values():
        process.kill()
        process.wait()


FORM = [("model.path", "m"), ("data.path", "d.jsonl"), ("output", "new")]


def until(what: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not what():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_stopping_a_run_that_has_just_ended_or_is_somebody_elses(
    processes: Processes, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "lock_holder", lambda _: (12345, "here"))
    monkeypatch.setattr(launch, "lock_state", lambda _: "held")
    kill = Mock(side_effect=ProcessLookupError)
    monkeypatch.setattr(launch.os, "kill", kill)
    processes.stop("new")
    assert kill.called and processes.stop_requested("new")
    kill.side_effect = PermissionError
    with pytest.raises(CheckpointError, match="another user"):
        processes.stop("other")
    assert not processes.stop_requested("other")


def test_a_run_is_started_stopped_and_gone_on_with(processes: Processes, folder: Path) -> None:
    made = draft(folder, FORM)
    processes.start(made)
    assert (folder / "new.yaml").read_text() == made.text
    until(lambda: "trains" in processes.output_of("new"))
    assert "['train', './new.yaml']" in processes.output_of("new") and processes.is_running("new")
    with pytest.raises(CheckpointError, match="holds this run"):
        processes.resume("new")
    process = processes.started["new"]
    assert _session(process.pid) == process.pid  # signals to the studio's session do not reach it
    processes.stop("new")
    assert (
        process.wait(60) == INTERRUPTED
        and "stopped well" in processes.output_of("new")
        and not processes.failure("new")
    )
    with pytest.raises(CheckpointError, match="no process"):
        processes.stop("new")
    with pytest.raises(CheckpointError, match="holds a run already"):
        processes.start(made)
    processes.resume("new")
    until(lambda: "trains" in processes.output_of("new"))
    assert "new/config.resolved.yaml" in processes.output_of("new")
    process = processes.started["new"]
    processes.stop("new")
    processes.resume("new")  # immediately, while the other one is still writing
    assert processes.started["new"] is not process and process.poll() == INTERRUPTED
    until(lambda: "trains" in processes.output_of("new"))


def test_two_clicks_at_once_start_one_process(processes: Processes, folder: Path) -> None:
    made, refused = draft(folder, FORM), []

    def click() -> None:
        try:
            processes.start(made)
        except CheckpointError as error:
            refused.append(error)

    threads = [threading.Thread(target=click) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 5


def _session(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[3])


def test_a_run_of_another_process_is_stopped_by_its_lock(processes: Processes, folder: Path) -> None:
    (folder / "new").mkdir()
    with subprocess.Popen([sys.executable, "-c", TRAINS, str(folder / "new")], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and b"trains" in other.stdout.readline()
        other.send_signal(signal.SIGSTOP)  # like Ctrl-Z: it must be continued to receive the signal
        processes.stop("new")
        assert other.wait(60) == INTERRUPTED


def test_a_number_that_a_lock_leaves_behind_gets_no_signal(processes: Processes, folder: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as stranger:
        import socket

        (folder / "first" / ".lock").write_text(f"PID {stranger.pid} on {socket.gethostname()}\n")
        with pytest.raises(CheckpointError, match="no process"):
            processes.stop("first")
        assert stranger.poll() is None
        stranger.send_signal(signal.SIGKILL)


def test_nothing_is_overwritten(processes: Processes, folder: Path) -> None:
    (folder / "new.yaml").write_text("mine: true\n")
    with pytest.raises(CheckpointError, match="something else"):
        processes.start(draft(folder, FORM))
    (folder / "new.yaml").unlink()
    (folder / "new").mkdir()
    (folder.parent / "target").write_text("kept")
    (folder / "new" / CONSOLE).symlink_to(folder.parent / "target")
    with pytest.raises(OSError):
        processes.start(draft(folder, FORM))
    assert (folder.parent / "target").read_text() == "kept"


def test_a_run_that_fails_before_its_first_step_says_why(
    client: TestClient, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = "print('no such model: \\x1b[31m<b>'); raise SystemExit(2)"
    monkeypatch.setattr(launch, "command", lambda *_: [sys.executable, "-c", words])
    answer = client.post("/runs/start", data=dict(FORM))
    assert answer.headers["hx-redirect"] == "/runs/view?run=new"
    until(lambda: "has ended before" in client.get("/runs/view?run=new").text)
    page = client.get("/runs/view?run=new").text
    assert "no such model" in page and "\x1b" not in page and "<b>'" not in page


def test_a_plan_is_what_the_command_says(processes: Processes, monkeypatch: pytest.MonkeyPatch) -> None:
    says = "import sys; print('{\"read\": \"' + open(sys.argv[2]).read().strip() + '\", \"probe\": ' + str(int(len(sys.argv) < 5)) + '}')"
    monkeypatch.setattr(launch, "command", lambda *a: [sys.executable, "-c", says, *a])
    assert processes.plan("a: 1", probe=False) == {"read": "a: 1", "probe": 0}
    assert processes.plan("a: 1", probe=True)["probe"] == 1
    fails = "import sys; print('one\\npenchant: ' + sys.argv[2] + ':3: no', file=sys.stderr); sys.exit(2)"
    monkeypatch.setattr(launch, "command", lambda *a: [sys.executable, "-c", fails, *a])
    with pytest.raises(ConfigError, match="plan: the form:3: no"):
        processes.plan("a: 1", probe=False)


def test_the_studio_ends_while_a_plan_is_made(processes: Processes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "command", lambda *_: [sys.executable, "-c", "import time; time.sleep(600)"])
    failed: list[ConfigError] = []

    def plans() -> None:
        with pytest.raises(ConfigError) as error:
            processes.plan("a: 1", probe=False)
        failed.append(error.value)

    thread = threading.Thread(target=plans)
    thread.start()
    until(lambda: bool(processes.children._running))
    processes.close()
    thread.join(60)
    assert failed and not thread.is_alive()


def test_a_link_in_a_run_leads_nowhere(client: TestClient, folder: Path) -> None:
    (folder.parent / "secret").write_text('{"prompt": "secret", "after": "secret"}\n')
    for name in ("config.resolved.yaml", "samples.jsonl"):
        (folder / "first" / name).unlink(missing_ok=True)
        (folder / "first" / name).symlink_to(folder.parent / "secret")
    for page in ("view", "samples"):
        assert "secret" not in client.get(f"/runs/{page}?run=first").text


def test_changes_need_the_token(client: TestClient) -> None:
    for path in ("/runs/plan", "/runs/start", "/runs/stop", "/runs/resume"):
        assert client.post(path, data={"run": "first"}, headers={"x-csrf-token": "other"}).status_code == 403
        assert client.get(path).status_code == 405


def test_a_second_click_starts_nothing(processes: Processes, folder: Path) -> None:
    made = draft(folder, FORM)
    processes.start(made)
    process = processes.started["new"]
    with pytest.raises(CheckpointError, match="started already"):
        processes.start(made)
    assert processes.started["new"] is process


@pytest.mark.parametrize("output", ["a\0b", "..", ".", "/tmp/x", "a/../../b", "x" * 400])
def test_an_output_outside_the_folder_is_refused(tmp_path: Path, output: str) -> None:
    with pytest.raises(ConfigError):
        draft(tmp_path, [*FORM[:2], ("output", output)])


def test_a_start_that_failed_can_be_mended(processes: Processes, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(launch, "command", lambda *_: [sys.executable, "-c", "raise SystemExit('no such data')"])
        processes.start(draft(folder, FORM))
        assert processes.started["new"].wait(60)
    processes.start(draft(folder, [*FORM, ("train.seed", "3")]))
    assert "seed: 3" in (folder / "new.yaml").read_text() and processes.is_running("new")


def test_paths_of_a_run_start_where_its_model_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    root, config = tmp_path / "runs", {"model": {"path": "model"}}
    root.mkdir()
    assert working_folder(root, config) == root
    (tmp_path / "model").mkdir()
    assert working_folder(root, config) == tmp_path  # the studio was started beside it, for the runs folder only
    (root / "model").mkdir()
    assert working_folder(root, config) == root
