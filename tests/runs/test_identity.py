"""A run's identity: an input changed before a resume is refused by name, or the run ends bit for bit the same."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from tiny import polite_rows, tiny_model_folder, write_jsonl
from transformers.utils import chat_template_utils

from penchant import api
from penchant.config import config_from_mapping
from penchant.errors import CheckpointError, ModelError, PenchantError
from penchant.runfolder import TOKENS, differences, identity_changes, write_summed
from penchant.runs import Run
from penchant.runs.find import check_config, find_model
from penchant.runs.identity import model_contents, run_identity
from penchant.training.loop import Paused

REWARD = """import sys
from pathlib import Path
sys.path.insert(0, str(Path(__file__).parent))
def letters(prompts, completions):
    import words_of_mine
    return [words_of_mine.worth(c) for c in completions]
"""
LOSS = """from pathlib import Path
import sys
sys.path.insert(0, str(Path(__file__).parent))
from losses_of_mine.slope import SLOPE
from penchant.losses import loss
from penchant.losses.helpers import pair_logratios, pair_output
from penchant.types import LossOutput, PairLogps
@loss("squared", "(1 - beta h)^2")
def mine(logps: PairLogps, *, beta: float = 0.1) -> LossOutput:
    chosen, rejected = pair_logratios(logps)
    return pair_output((1.0 - SLOPE * beta * (chosen - rejected)) ** 2, beta * chosen, beta * rejected)
"""
DATED = (
    "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}\n{% endif %}"
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


CACHED = "content of model.path in the hub's cache"


class Stopped(Exception):
    pass


class World:
    """A saved copy of a run stopped after step 2, with all its inputs. `fresh` restores everything."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder, self.kept = folder / "here", folder / "kept"
        here = self.folder
        here.mkdir(parents=True)
        self.config: dict[str, Any] = {
            "model": {"path": tiny_model_folder(here / "model", chat=True), "dtype": "fp32"},
            "data": {
                "path": write_jsonl(here / "pairs.jsonl", polite_rows(12)),
                "validation_rows": 3,
                "max_length": 128,
            },
            "train": {"max_steps": 4, "batch_size": 4, "epochs": 9, "lr": 3e-3, "tokens_per_step": 600},
            "checkpoint": {"every": 2, "keep_last": 2},
            "evaluation": {"samples": 0, "sample_tokens": 3, "every": None, "at_start": False, "kl_prompts": 0},
            "output": str(here / "run"),
        }
        getattr(self, kind)(here)
        try:
            Run(api.as_config(self.config, ()), quiet=True, pause_at=2).train()
        except Exception as error:
            assert type(error).__name__ == "Paused", error
        shutil.copytree(here, self.kept)

    def pairs(self, here: Path) -> None:
        """A DPO-like run with a user's loss, layout and judge, and a separate reference."""
        (here / "losses_of_mine").mkdir()
        (here / "losses_of_mine/__init__.py").write_text("")
        (here / "losses_of_mine/slope.py").write_text("SLOPE = 1.0\n")
        (here / "loss.py").write_text(LOSS)
        (here / "words_of_mine.py").write_text("def worth(text):\n    return float(len(text))\n")
        (here / "reward.py").write_text(REWARD)
        (here / "tok").mkdir()
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            (here / "model" / name).rename(here / "tok" / name)
        (here / "model/generation_config.json").write_text('{"eos_token_id": 1}')
        self.config["model"]["tokenizer"] = str(here / "tok")
        self.config["loss"] = f"{here}/loss.py:mine"
        self.config["reference"] = {
            "path": tiny_model_folder(here / "reference", seed=1),
            "cache_dir": str(here / "cache"),
            "kind": "cached",
        }
        self.config["evaluation"] |= {"reward": f"{here}/reward.py:letters", "kl_prompts": 2}

    def judged(self, here: Path) -> None:
        """RLOO with LoRA, judged by a reward model."""
        of_reward = {
            "model": {"path": tiny_model_folder(here / "rm_start", chat=True, seed=2), "dtype": "fp32"},
            "data": {"path": self.config["data"]["path"], "max_length": 128},
            "algorithm": "reward_model",
            "train": {"max_steps": 1, "batch_size": 6, "tokens_per_step": 600},
            "output": str(here / "rm"),
        }
        api.train(of_reward, quiet=True)
        shutil.copytree(here / "rm/checkpoints/step-1/model", here / "judge")
        shutil.rmtree(here / "rm")
        shutil.rmtree(here / "rm_start")
        self.config |= {
            "algorithm": {"name": "rloo", "max_new_tokens": 3},
            "reward": str(here / "judge"),
            "lora": {"r": 2},
        }

    def reward_model(self, here: Path) -> None:
        """A reward model with a random head."""
        self.config["algorithm"] = "reward_model"

    def fresh(self) -> Path:
        shutil.rmtree(self.folder)
        shutil.copytree(self.kept, self.folder)
        return self.folder

    def resume(self, *overrides: str, quiet: bool = True) -> None:
        """Resume up to the first step, by which point nothing was refused."""

        def stop(*_: Any) -> None:
            raise Stopped

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("penchant.training.loop.Loop.take_step", stop)
            api.train(self.config, *overrides, quiet=quiet)


WORLDS: dict[str, World] = {}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], World]:
    def made(kind: str) -> World:
        if kind not in WORLDS:
            WORLDS[kind] = World(tmp_path_factory.mktemp(kind), kind)
        return WORLDS[kind]

    return made


def flip(path: Path, at: float = 0.9, bit: int = 1) -> None:
    content = bytearray(path.read_bytes())
    content[int(at * len(content))] ^= 1 << bit
    path.write_bytes(content)


@pytest.fixture(autouse=True)
def _no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penchant.report.LiveReport._write", lambda *_: None)


FILES = {
    "pairs": (
        "pairs.jsonl",
        "loss.py",
        "losses_of_mine/__init__.py",
        "losses_of_mine/slope.py",
        "reward.py",
        "words_of_mine.py",
        "model/config.json",
        "model/generation_config.json",
        "model/model.safetensors",
        "tok/tokenizer.json",
        "tok/tokenizer_config.json",
        "tok/chat_template.jinja",
        "reference/config.json",
        "reference/model.safetensors",
    ),
    "judged": (
        "judge/model.safetensors",
        "judge/config.json",
        "judge/tokenizer.json",
        "judge/chat_template.jinja",
        "judge/reward_settings.json",
        "model/model.safetensors",
        "model/chat_template.jinja",
    ),
    "reward_model": ("model/model.safetensors", "model/tokenizer.json", "model/config.json"),
}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in FILES.items() for name in names])
def test_a_changed_input_is_refused_by_name(world: Callable[[str], World], kind: str, name: str) -> None:
    here = world(kind).fresh()
    path = here / name
    assert path.exists()
    if path.suffix == ".safetensors":
        flip(path)
    elif path.suffix == ".jsonl":
        path.write_text(path.read_text().replace("Of course", "Certainly"))
    else:
        path.write_text(path.read_text() + "\n")
    whole = {"model/model.safetensors": "model: its weights"}
    what = whole.get(name, path.name) if kind != "reward_model" else path.name
    with pytest.raises(CheckpointError) as met:
        world(kind).resume()
    inside = name.startswith("judge/") and path.suffix in (".json", ".safetensors")
    assert ("judge" if inside else what) in str(met.value)
    assert "put back" in str(met.value) or "put them back" in str(met.value)
    assert not re.search(r"[0-9a-f]{64}", str(met.value))


def test_rows_have_changed_only_if_nothing_else_explains_it() -> None:
    saved = {"config": {"data": {"path": "a.jsonl", "max_length": 64}}, "data": "of 64"}
    longer = {"config": {"data": {"path": "a.jsonl", "max_length": 32}}, "data": "of 32"}
    (change,) = identity_changes(saved, longer, {})
    assert "max_length" in change and "rows" not in change
    (change,) = identity_changes(saved, {**saved, "data": "edited"}, {})
    assert "rows of a.jsonl have changed" in change
    assert not identity_changes(saved, saved, {})


@pytest.mark.slow
@pytest.mark.parametrize("kind", FILES)
def test_any_bit_of_any_input(world: Callable[[str], World], kind: str) -> None:
    """Either refused with an error that names the place, or the change does not affect the run."""
    made = world(kind)
    outputs = ("run", "cache")
    files = [p.relative_to(made.kept) for p in sorted(made.kept.rglob("*")) if p.is_file() and p.stat().st_size]
    went_on = []
    for name in files:
        if name.parts[0] in outputs or "__pycache__" in name.parts:
            continue
        for at in (0.0, 0.13, 0.5, 0.77, 0.999):
            flip(made.fresh() / name, at, bit=int(at * 7))
            try:
                made.resume()
            except PenchantError as error:
                told = str(error)
                assert name.name in told or name.parts[0] in told or "is not UTF-8" in told, (name, at, told)
            except Stopped:
                went_on.append(str(name))
    # answers of prompt rows are not used, and a reference gets ids
    unused = {"judged": {"pairs.jsonl"}, "pairs": {"reference/tokenizer.json", "reference/tokenizer_config.json"}}
    assert set(went_on) <= unused.get(kind, set())


@pytest.mark.parametrize("kind", FILES)
def test_the_same_inputs_go_on(world: Callable[[str], World], kind: str) -> None:
    world(kind).fresh()
    # what is kept and where may change, e.g. when a disk is full
    kept = ("checkpoint.keep_last=1", "checkpoint.keep_best=false", "checkpoint.pt=true")
    with pytest.raises(Stopped):
        world(kind).resume(*kept, f"reference.cache_dir={world(kind).folder / 'cache'}")


@pytest.mark.parametrize("name", ["generation_config.json", "chat_template.jinja", "gone"])
def test_a_file_that_came_or_went_is_a_change(world: Callable[[str], World], name: str) -> None:
    here = world("judged").fresh()
    if name == "gone":
        (here / "model" / "chat_template.jinja").unlink()
        name = "chat_template.jinja"
    elif name == "generation_config.json":
        (here / "model" / name).unlink(missing_ok=True)
        assert "generation_config" in (here / "run/identity.json").read_text()
    else:
        (here / "judge" / "vocab.txt").write_text("a")
        name = "vocab.txt"
    with pytest.raises(CheckpointError, match=name):
        world("judged").resume()


def test_rows_that_become_other_tokens_are_refused(
    world: Callable[[str], World], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever changed; here it is the tokenizing code."""
    world("pairs").fresh()
    from penchant.data import tokenize

    real = tokenize.chat
    monkeypatch.setattr(
        tokenize,
        "chat",
        lambda tree, *a, **k: real(tree, *a, **k)._replace(prompt="<s>user: Another</s>\n<s>assistant: "),
    )
    with pytest.raises(CheckpointError, match="content of the rows as tokens"):
        world("pairs").resume()


def test_a_run_of_an_older_version_goes_on_with_a_note(world: Callable[[str], World], capsys: Any) -> None:
    here = world("pairs").fresh()
    known = json.loads((here / "run/identity.json").read_text())
    old = {k: v for k, v in known.items() if k in ("config", "data") or (k.startswith("content of") and ": " not in k)}
    old.pop("content of the rows as tokens")
    (here / "run/identity.json").write_text(json.dumps(old))
    (here / "run/sums.json").unlink()
    with pytest.raises(Stopped):
        world("pairs").resume(quiet=False)
    told = capsys.readouterr().err
    assert "older version" in told and "model.path: config.json" in told and "slope.py" in told
    assert json.loads((here / "run/identity.json").read_text()) == known


def test_an_evaluation_says_what_has_changed_since(world: Callable[[str], World]) -> None:
    here = world("pairs").fresh()
    assert "notes" not in api.evaluate(here / "run", quiet=True)
    (here / "words_of_mine.py").write_text("def worth(text):\n    return -float(len(text))\n")
    (said,) = api.evaluate(here / "run", quiet=True)["notes"]
    assert "words_of_mine.py has changed since run was trained with it" in said
    assert "notes" not in api.evaluate(here / "run", "evaluation.reward=words", quiet=True)


def test_an_adapters_base_that_was_trained_anew_is_refused_by_all_that_put_it_on(world: Callable[[str], World]) -> None:
    run = world("judged").fresh() / "run"
    assert find_model(str(run)).load(torch.device("cpu")) is not None
    tiny_model_folder(run.parent / "model", seed=5, chat=True)
    with pytest.raises(ModelError, match=r"model: its weights are not those that the adapter of .*run was trained on"):
        find_model(str(run)).load(torch.device("cpu"))
    for form in ("adapter", "safetensors"):
        with pytest.raises(ModelError, match=r"its weights are not those that the adapter"):
            api.export(run, to=form)


def test_a_changed_config_is_refused_also_where_nothing_else_says_what_it_was(tmp_path: Path) -> None:
    write_summed(tmp_path / "config.resolved.yaml", "model: {path: a/b}\ndata: {path: rows.jsonl}\noutput: out\n")
    (tmp_path / "config.resolved.yaml").write_text("model: {path: c/d}\ndata: {path: rows.jsonl}\noutput: out\n")
    with pytest.raises(CheckpointError, match=r"was changed after the run wrote it; undo"):
        check_config(tmp_path / "config.resolved.yaml")


# ---- Today's date ----


def set_day(patch: pytest.MonkeyPatch, day: date) -> None:
    class Day(date):
        @classmethod
        def today(cls) -> Any:
            return day

    class Now:
        @staticmethod
        def now() -> Any:
            return day

    patch.setattr(chat_template_utils, "datetime", Now)
    for module in ("penchant.data.templates", "penchant.runs"):
        patch.setattr(f"{module}.date", Day)


@pytest.mark.parametrize("kind", ["pairs", "reward_model"])
def test_a_template_with_todays_date_keeps_the_day_of_the_first_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    model = tmp_path / "model"
    tiny_model_folder(model, chat=True)
    (model / "chat_template.jinja").write_text(DATED)
    config: dict[str, Any] = {
        "model": {"path": str(model), "dtype": "fp32"},
        "data": {
            "path": write_jsonl(tmp_path / "pairs.jsonl", polite_rows(12)),
            "validation_rows": 3,
            "max_length": 160,
        },
        "train": {"max_steps": 2, "batch_size": 4, "epochs": 9, "lr": 3e-3, "tokens_per_step": 600},
        "checkpoint": {"every": 1, "keep_last": 2},
        "evaluation": {"samples": 0, "every": None, "kl_prompts": 0},
        "output": str(tmp_path / "run"),
    }
    if kind == "reward_model":
        config["algorithm"] = "reward_model"
    set_day(monkeypatch, date(2026, 11, 1))
    whole = api.train(config, f"output={tmp_path / 'whole'}", quiet=True)
    first = Run(api.as_config(config, ()), quiet=True, pause_at=1)
    with pytest.raises(Paused):
        first.train()
    set_day(monkeypatch, date(2026, 12, 27))
    second = Run(api.as_config(config, ()))
    result = second.train()
    told = capsys.readouterr()
    assert (told.out + told.err).count("2026-11-01 as at this run's first start") == 1
    ids = [r.rows.trees[0][0].prompt_ids.tolist() for r in (first, second)]
    assert ids[0] == ids[1]
    assert "01 Nov 2026" in second.rows.tokenizer.decode(ids[1])
    for name in ("metrics.jsonl", "checkpoints/step-2/model/model.safetensors"):
        assert (result.folder / name).read_bytes() == (whole.folder / name).read_bytes(), name
    assert api.evaluate(result.folder, quiet=True) == api.evaluate(whole.folder, quiet=True)
    if kind == "reward_model":
        assert json.loads((result.model / "reward_settings.json").read_text())["template_options"] == {
            "strftime_now": "2026-11-01"
        }
    another = Run(api.as_config(config, (f"output={tmp_path / 'other'}",)), quiet=True)
    assert "27 Dec 2026" in another.rows.tokenizer.decode(another.rows.trees[0][0].prompt_ids)
    with pytest.raises(CheckpointError, match="strftime_now"):
        api.train(config, "data.template_options={strftime_now: 2026-11-02}", quiet=True)


def test_a_run_continues_on_another_device_of_the_same_kind() -> None:
    def identity(**devices: str) -> dict[str, Any]:
        return {"config": {key: {"device": device} for key, device in devices.items()}}

    first = identity(model="cuda:1", reference="cuda:0")
    assert identity_changes(first, identity(model="cuda:0", reference="cuda"), {}) == []
    assert identity_changes(first, identity(model="cpu", reference="cuda"), {}) == [
        'config.model.device: "cuda:1" -> "cpu"'
    ]


def test_a_day_that_is_none_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(PenchantError, match="2026-12-31"):
        api.as_config(
            {
                "model": {"path": "m"},
                "data": {"path": "d", "template_options": {"strftime_now": "soon"}},
                "output": "o",
            },
            (),
        )


@pytest.mark.parametrize("part", ["config.json", "tokenizer_config.json"])
def test_the_files_of_a_hub_id_are_part_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    """With a cache as the hub's library writes it, and no network."""
    repo = tmp_path / "hub" / "models--someone--tiny"
    files = Path(tiny_model_folder(repo / "snapshots" / ("a" * 40)))
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    given = {"model": {"path": "someone/tiny"}, "data": {"path": "x.jsonl"}, "loss": "sft", "output": "run"}
    config = api.as_config(given, ())
    before = model_contents(config)
    assert {f"{CACHED}: {p.name}" for p in files.iterdir() if p.suffix == ".json"} <= set(before)
    (files / part).write_text((files / part).read_text() + " ")
    now = model_contents(config)
    assert [name for name in before if now[name] != before[name]] == [f"{CACHED}: {part}"]
    kept = {"config": {}, TOKENS: "1"}  # from a run that did not record them
    assert differences("Größe", 1, "data.path") == ['data.path: "Größe" -> 1']
    assert identity_changes(kept, kept | now, {}) == [] and identity_changes(kept | before, kept | now, {}) != []
    # a file that is downloaded later
    later = {k: v for k, v in before.items() if not k.endswith("generation_config.json")}
    assert identity_changes(kept | later, kept | before, {}) == [] and len(later) < len(before)


def test_a_function_that_a_rewards_file_lacks_is_what_is_said_of_a_used_folder(
    world: Callable[[str], World],
) -> None:
    here = world("pairs")
    folder = here.fresh()
    wrong = here.config | {"evaluation": here.config["evaluation"] | {"reward": f"{folder}/reward.py:wrong"}}
    with pytest.raises(PenchantError, match="wrong") as said:
        Run(api.as_config(wrong, ()), quiet=True).train()
    assert "different run" not in str(said.value)


def test_where_completions_are_asked_for_may_change_and_what_they_count_for_may_not() -> None:
    def identity(**rollout: Any) -> Any:
        given = {"model": {"path": "m"}, "data": {"path": "d"}, "algorithm": "rloo", "reward": "words", "output": "o"}
        made = config_from_mapping({**given, "rollout": {"engine": "vllm", "url": "http://a", **rollout}}, [])
        return run_identity(made, [], {})

    assert identity() == identity(url="http://b", attempts=3, timeout=5.0, folder="f", update="file")
    assert identity() != identity(correction="tis") and identity() != identity(lag=1)
