"""Default values that depend on model and data, and notes about values that are probably mistakes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import polite_rows, tiny_model_folder, write_jsonl

from penchant.base import hub
from penchant.base.text import closest, closest_file
from penchant.cli import main
from penchant.config import RunConfig, config_from_mapping, parse_yaml
from penchant.data.load import load_preferences
from penchant.errors import ConfigError, DataError, ModelError
from penchant.models.options import check_model_path
from penchant.runfolder import open_run
from penchant.runs import Run
from penchant.runs.parts import peak_lr, remarks, start_key


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("defaults")
    data = write_jsonl(folder / "rows.jsonl", [dict(r) for r in polite_rows(8)])
    model = tiny_model_folder(folder / "tiny-model")  # its context is 256
    return {"model": {"path": model}, "data": {"path": data}, "output": str(folder / "run")}


def made(base: dict[str, Any], *overrides: str) -> RunConfig:
    return config_from_mapping(base, overrides)


@pytest.mark.parametrize("settings", [(), ("data.max_length=auto",), ("algorithm=reward_model",)])
def test_the_default_length_is_within_the_context(base: dict[str, Any], settings: tuple[str, ...]) -> None:
    run = Run(made(base, *settings), quiet=True)
    assert run.config.data.max_length == run.rows.max_length == 256


def test_an_online_methods_answers_have_room_in_the_context(base: dict[str, Any]) -> None:
    config = made(base, "algorithm=rloo", "reward=words", "algorithm.max_new_tokens=56")
    assert Run(config, quiet=True).rows.max_length == 200


def test_a_length_that_was_given_is_refused_before_rows_are_read(base: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"data\.max_length: 257 is beyond the model's context of 256"):
        Run(made(base, "data.max_length=257", "data.path=nowhere.jsonl"), quiet=True)
    assert Run(made(base, "data.max_length=256"), quiet=True).rows.max_length == 256


@pytest.mark.parametrize(
    "settings,lr",
    [
        ((), 5e-5),  # a small model
        (("lora.r=4",), 5e-5),
        (("loss=sft",), 2e-4),
        (("loss=orpo",), 8e-5),
        (("algorithm=rloo", "reward=words"), 1e-5),
        (("algorithm=reward_model",), 1e-4),
        (("train.lr=3e-6",), 3e-6),
    ],
)
def test_auto_is_one_table(base: dict[str, Any], settings: tuple[str, ...], lr: float) -> None:
    config = made(base, *settings)
    rows = Run(config, quiet=True).rows
    assert peak_lr(config, rows, 1_000_000) == lr
    if not settings:
        assert peak_lr(config, rows, 10**9) == 5e-6
        assert peak_lr(config, rows, 1_000_000, {"peak_lr": 7e-7}) == 7e-7  # a resumed run keeps its own
        assert peak_lr(config, rows, 1_000_000, {}) == 1e-6  # also one from before the table existed


def test_values_that_were_hardly_meant_are_said(base: dict[str, Any]) -> None:
    def said(*settings: str) -> list[str]:
        config = made(base, *settings)
        return remarks(config, Run(config, quiet=True).rows)

    assert said("train.batch_size=8") == said("train.batch_size=8", "lora.r=4", "train.lr=2e-5") == []
    (low,) = said("train.batch_size=8", "lora.r=4", "train.lr=5e-6")
    assert "low for an adapter" in low and "5e-05" in low
    (many,) = said("train.batch_size=9")
    assert "batch_size is 9" in many and "8 rows" in many
    (kind,) = said("train.batch_size=8", "loss=simpo", "reference.kind=frozen")
    assert "reference.kind" in kind and "simpo needs no reference" in kind
    assert said("train.batch_size=8", "loss=ipo", "reference.kind=frozen") == []


def test_a_longer_run_is_told_how_to_go_on(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    settings = {"train": {"max_steps": 5, "lr": 1e-4}, "model": {"path": "m"}}
    open_run(folder, "", {"config": settings})
    (folder / "checkpoints" / "step-5").mkdir(parents=True)
    longer = {"config": {**settings, "train": {"max_steps": 9, "lr": 1e-4}}}
    with pytest.raises(Exception, match=r"(?s)to train on from its last checkpoint.*max_steps: 5 -> 9") as told:
        open_run(folder, "", longer)
    assert not str(told.value).splitlines()[-1].startswith(";")
    other = {"config": {**settings, "model": {"path": "n"}}}
    with pytest.raises(Exception, match="choose another output") as told:
        open_run(folder, "", other)
    assert "to train on" not in str(told.value)


@pytest.mark.parametrize(("device", "is_shared"), [("cuda", False), ("cpu", True)])
def test_runs_share_figures_of_the_start_only_in_one_precision(
    base: dict[str, Any], monkeypatch: pytest.MonkeyPatch, device: str, is_shared: bool
) -> None:
    monkeypatch.setattr("penchant.runs.parts.placed", lambda _: (torch.device(device), torch.float32))
    keys = {start_key(made(base, f"train.tf32={value}")) for value in ("false", "true")}
    assert (len(keys) == 1) == is_shared


# ---- misspelled names ----


def test_a_mistyped_folder_is_answered_with_the_nearest(base: dict[str, Any]) -> None:
    model = base["model"]["path"]
    with pytest.raises(ModelError, match=r"no such folder; did you mean .*tiny-model"):
        check_model_path(model.replace("tiny-model", "tiny_model"))
    with pytest.raises(ModelError, match="give a folder"):
        check_model_path(model.replace("tiny-model", "llama"))


def test_a_relative_folder_in_one_that_is_there_is_no_hub_id(
    base: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    there = Path(base["model"]["path"])
    monkeypatch.chdir(there.parent.parent)
    with pytest.raises(ModelError, match="no such folder"):
        check_model_path(f"{there.parent.name}/tiny-modle")


@pytest.mark.parametrize("reached", [True, False])
def test_a_hub_id_is_asked_about_once(reached: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.errors import RepositoryNotFoundError

    asked = []

    def info(self: Any, name: str, **how: Any) -> None:
        asked.append(how["timeout"])
        if not reached:
            raise ConnectionError("Name or service not known")
        raise RepositoryNotFoundError.__new__(RepositoryNotFoundError)

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", info)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    what = "the hub has no such model" if reached else "the hub cannot be reached"
    for _ in range(2):
        with pytest.raises(ModelError, match=what):
            hub.check_hub("owner/mistyped")
    assert max(asked) <= 10 and len(asked) == (2 if reached else 1)  # an unreachable hub is not asked again


@pytest.mark.parametrize(
    "word,names,found",
    [
        ("dop", ["dpop", "dpo", "ipo"], "dpo"),
        ("dpoo", ["odpo", "dpo"], "dpo"),
        ("xyz", ["dpo"], ""),
    ],
)
def test_the_nearest_name(word: str, names: list[str], found: str) -> None:
    assert closest(word, names) == found


def test_the_nearest_file_is_told_by_its_stem(tmp_path: Path) -> None:
    names = ["pairs.csv", "pairs.jsonl", "rewards.jsonl", "train.jsonl.gz", "b.yaml"]
    assert closest_file(tmp_path / "pair.jsonl", names) == str(tmp_path / "pairs.jsonl")
    for given, found in (
        ("train.jsonl", "train.jsonl.gz"),
        ("trian.jsonl", "train.jsonl.gz"),
        ("eval.jsonl", ""),
        ("b.yml", "b.yaml"),
    ):
        assert closest_file(tmp_path / given, names) == (str(tmp_path / found) if found else "")


@pytest.mark.parametrize(
    "columns,match",
    [
        ({"prompt": "quesiton"}, r'no such column; did you mean "question"\? there are bad, good, question'),
        ({"promt": "question"}, r'no such field; did you mean "prompt"'),
    ],
)
def test_a_slip_in_data_columns_is_named(columns: dict[str, str], match: str, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"question": "Q", "good": "A", "bad": "B"}] * 3)
    with pytest.raises(DataError, match=match):
        load_preferences(path, columns=columns)


@pytest.mark.parametrize(
    "given,setting",
    [
        (["--lr", "1e-4"], "train.lr=1e-4"),
        (["--learning_rate=1e-4"], "train.lr=1e-4"),
        (["--loss", "ipo"], "loss=ipo"),
        (["--beta", "0.2"], "loss.beta=0.2"),
        (["--train.epochs", "3"], "train.epochs=3"),
        (["--nonsense"], "train --help"),
    ],
)
def test_options_of_other_tools_are_answered_with_our_setting(
    given: list[str], setting: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["train", "run.yaml", *given])
    assert setting in capsys.readouterr().err


def test_a_share_that_holds_nothing_out_is_named() -> None:
    from penchant.data.split import held_out_rows

    class Rows:
        trees = (0,) * 20

    with pytest.raises(DataError, match=r"data\.validation_fraction: 0\.01 of 20 rows would hold out 0"):
        held_out_rows(Rows(), validation_fraction=0.01)  # type: ignore[arg-type]


def test_a_hub_that_was_gone_is_asked_again_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed lookup must not keep later pushes or lookups of the same process from the hub."""
    import huggingface_hub
    from huggingface_hub import constants

    asked = []

    def info(self: Any, name: str, **how: Any) -> None:
        asked.append(name)
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", info)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(hub, "_gone_since", [])
    for since in (0.0, 2 * hub.AGAIN):
        hub._gone_since[:] = [t - since for t in hub._gone_since]
        with pytest.raises(ModelError, match="cannot be reached"):
            hub.check_hub("owner/gone")
    assert len(asked) == 2 and constants.HF_HUB_OFFLINE
    hub.reset_hub_state()
    assert not constants.HF_HUB_OFFLINE
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.reset_hub_state()  # set by the user, so it stays
    assert constants.HF_HUB_OFFLINE


def test_passwords_are_not_in_a_runs_config(tmp_path: Path) -> None:
    config = "output: o\nlogging:\n  mlflow: http://me:pass:word@host/\nurl: 'https://h/?token=abcdef'\n"
    for _ in range(2):  # and again on resume
        assert open_run(tmp_path, config, {"config": {}}) == []
        kept = (tmp_path / "config.resolved.yaml").read_text()
        assert "pass" not in kept and "abcdef" not in kept and parse_yaml(kept, "")[0]["output"] == "o"


def test_members_of_a_sweep_have_one_day(tmp_path: Path) -> None:
    """Whenever each of them starts, because they are compared on the same prompts."""
    run = Run(
        config_from_mapping({"model": {"path": "m"}, "data": {"path": "d"}, "output": str(tmp_path / "b")}), quiet=True
    )
    other = {"config": {"data": {"template_options": {"strftime_now": "2026-11-01"}}}}
    (tmp_path / "a").mkdir()
    open_run(tmp_path / "a", "", other)
    assert run._sweep_date() is None  # unrelated runs in the same folder
    (tmp_path / "sweep.json").write_text("{}")
    assert run._sweep_date() == "2026-11-01"
