"""A run from config to report on a tiny model, through the public interface."""

from __future__ import annotations

import json
import math
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from families import make_tree
from processes import forked
from tiny import polite_rows, tiny_model_folder, write_jsonl

from penchant import api
from penchant.algorithms.offline import Offline
from penchant.errors import CheckpointError, ConfigError, DataError, ModelError
from penchant.report import headline
from penchant.runfolder import write_summed
from penchant.runs import Run, evaluating
from penchant.runs.sharing import ObjectCache
from penchant.training.loop import Loop


def base_in(folder: Path) -> dict[str, Any]:
    return {
        "model": {"path": tiny_model_folder(folder / "model"), "dtype": "fp32"},
        "data": {"path": write_jsonl(folder / "pairs.jsonl", polite_rows()), "validation_rows": 6, "max_length": 128},
        "loss": {"name": "dpo", "beta": 0.5},
        "train": {"epochs": 2, "batch_size": 6, "tokens_per_step": 600, "lr": 3e-3, "warmup_fraction": 0.0},
        "evaluation": {"samples": 2, "sample_tokens": 4},
        "output": str(folder / "run"),
    }


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setenv("PENCHANT_CACHE", str(tmp_path / "cache"))
    return base_in(tmp_path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> api.TrainResult:
    """A read-only run of `base`, for comparison with others."""
    return api.train(base_in(tmp_path_factory.mktemp("trained")), quiet=True)


def _lines(folder: Path | str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    (path,) = folder.glob("*.safetensors")
    return load_file(path)


@pytest.mark.usefixtures("live_reports")
def test_dpo_learns_and_leaves_a_whole_run_folder(base: dict[str, Any]) -> None:
    result = api.train(base, quiet=True)
    assert result.before["eval/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert result.after["eval/rewards/accuracies"] == 1.0
    assert result.after["eval/loss"] < 0.5
    assert result.after["eval/rows"] == 6
    for name in (
        "config.resolved.yaml",
        "metrics.jsonl",
        "samples.jsonl",
        "manifest.json",
        "report.html",
        "audit.json",
    ):
        assert (result.folder / name).exists(), name
    manifest = json.loads((result.folder / "manifest.json").read_text())
    assert manifest["status"] == "finished" and manifest["steps"] == result.steps == 6
    assert api.evaluate(result.folder, quiet=True)["eval/loss"] == pytest.approx(result.after["eval/loss"], rel=1e-6)
    start = api.evaluate(result.folder, quiet=True, step="0")
    assert start["eval/loss"] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.usefixtures("live_reports")
def test_the_report_is_written_while_the_run_goes_on_and_never_ends_it(
    base: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, int]] = []

    def spied(folder: Path) -> None:
        state = json.loads((folder / "manifest.json").read_text())["status"]
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        seen.append((state, sum(line["kind"] == "eval" for line in lines)))
        if len(seen) == 3:
            raise OSError("the disk is full")

    monkeypatch.setattr("penchant.report.write_report", spied)
    monkeypatch.setattr("penchant.report.SHARE", 0.0)
    result = api.train({**base, "evaluation": {**base.get("evaluation", {}), "every": 2}}, quiet=True)
    # at the start, after steps 2, 4 and 6 (the second failed and was ignored), and at the end
    assert seen[0] == ("running", 1) and seen[1] == ("running", 2) and seen[2] == ("running", 3)
    assert seen[-1] == ("finished", 4) and len(seen) == 4 and result.steps == 6


def test_the_checkpoint_loads_with_transformers_as_it_is(trained: api.TrainResult) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, info = AutoModelForCausalLM.from_pretrained(trained.model, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    tokenizer = AutoTokenizer.from_pretrained(trained.model)
    ids = tokenizer("Ask 1: may I", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=3).shape[1] == ids.shape[1] + 3
    assert "penchant" not in (trained.model / "config.json").read_text()


@pytest.mark.parametrize("kind", ["frozen", "cached"])
def test_every_reference_gives_the_same_run(base: dict[str, Any], trained: api.TrainResult, kind: str) -> None:
    other = api.train(base, f"reference.kind={kind}", quiet=True)  # of itself it takes one of the two
    assert other.after["eval/loss"] == pytest.approx(trained.after["eval/loss"], rel=1e-4)


def test_lora_trains_the_adapter_only_and_loads_with_peft(base: dict[str, Any]) -> None:
    from peft import AutoPeftModelForCausalLM

    base |= {"lora": {"r": 4, "alpha": 16}}
    base["train"]["lr"] = 2e-2
    result = api.train(base, quiet=True)
    assert result.after["eval/rewards/accuracies"] == 1.0
    assert (result.model / "adapter_model.safetensors").exists()
    names = set(_weights(result.model))
    assert names and all("lora_" in n for n in names)
    assert all(float(v.abs().max()) > 0 for n, v in _weights(result.model).items() if "lora_B" in n)
    model = AutoPeftModelForCausalLM.from_pretrained(result.model)
    assert model.peft_config["default"].r == 4


def test_lora_dropout_is_not_ignored(base: dict[str, Any], tmp_path: Path) -> None:
    base |= {"lora": {"r": 4, "alpha": 16}}
    base["train"] |= {"lr": 2e-2, "max_steps": 3}
    without = api.train(base, quiet=True)
    with_dropout = api.train(base, "lora.dropout=0.5", f"output={tmp_path}/dropout", quiet=True)
    assert _lines(without.folder)[-2]["loss"] != _lines(with_dropout.folder)[-2]["loss"]


def test_sft_on_pairs_learns_the_chosen_answer(base: dict[str, Any]) -> None:
    base["loss"] = {"name": "sft"}
    result = api.train(base, quiet=True)
    assert result.after["eval/nll"] < result.before["eval/nll"] - 0.5
    assert result.after["eval/perplexity"] == pytest.approx(math.exp(result.after["eval/nll"]))


def test_only_the_first_process_keeps_the_starts_losses_and_all_read_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If only one process finds a damaged file, it must not enter passes that need the others alone."""
    path, unused = tmp_path / "start.losses.json", cast(Any, SimpleNamespace())
    losses = {0: (1.0, 1.0), 1: (3.0, 1.0)}
    first_says = {row: (v - 1.0, w) for row, (v, w) in losses.items()}
    monkeypatch.setattr(evaluating, "row_losses", lambda *_: losses)
    monkeypatch.setattr(evaluating, "current", lambda: SimpleNamespace(leads=False, share=lambda _: first_says))
    config: Any = SimpleNamespace(evaluation=SimpleNamespace(at_start=True))
    trees = [make_tree(0, 2, (2, 2)), make_tree(1, 3, (2, 2))]
    second = evaluating.HeldOut(config, unused, unused, tmp_path, unused, unused, 1, keep=True)
    assert second.loss_change(unused, unused, trees) == {} and not list(tmp_path.iterdir())
    write_summed(path, "{}")
    path.write_text("damaged, as the second process sees it")
    assert replace(second, step=1).loss_change(unused, unused, trees)["eval/loss_change"] == 1.0


def test_a_loss_is_compared_with_the_start_row_by_row(base: dict[str, Any]) -> None:
    """Differences between rows do not widen the change's interval; damaged start losses are computed again."""
    base["loss"] = {"name": "sft"}
    base["train"] |= {"lr": 3e-5, "epochs": 2}
    base["data"]["validation_rows"] = 12
    result = api.train(base, "checkpoint.every=2", quiet=True)
    before, after = result.before, result.after
    low, high = after["eval/loss_change/ci"]
    assert after["eval/loss_change"] == pytest.approx(after["eval/loss"] - before["eval/loss"], abs=1e-6)
    assert low < high < 0 and after["eval/loss/ci"][0] < before["eval/loss/ci"][1]  # unpaired, they would overlap
    assert "better than the start" in headline(result.folder)
    path = result.folder / "start.losses.json"
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"1", b"2", 1))
    shutil.rmtree(result.model.parent)
    again = api.train(base, "checkpoint.every=2", quiet=True)
    assert again.after["eval/loss_change/ci"] == pytest.approx([low, high], abs=1e-6)
    assert [*json.loads(path.read_text())] == [*json.loads(whole)]  # saved again


def test_sft_from_scratch_on_plain_text(base: dict[str, Any], tmp_path: Path) -> None:
    base["data"] = {
        "path": write_jsonl(
            tmp_path / "text.jsonl", [{"text": f"mat {i}: " + "the cat sat on the mat. " * 9} for i in range(30)]
        ),
        "validation_rows": 4,
        "max_length": 64,
    }
    base["loss"] = "sft"
    base["model"]["init"] = "random"
    result = api.train(base, quiet=True)
    assert result.after["eval/perplexity"] < result.before["eval/perplexity"] / 4


def test_a_new_learning_rate_or_folder_reuses_the_cache_but_a_new_token_or_template_does_not(
    base: dict[str, Any], tmp_path: Path
) -> None:
    base["train"]["max_steps"] = 1
    base["evaluation"] = {"samples": 0, "kl_prompts": 0}
    cache = tmp_path / "cache" / "reference"

    def caches_after(*overrides: str) -> int:
        api.train(base, "reference.kind=cached", *overrides, quiet=True)
        return len(list(cache.glob("*.safetensors")))

    assert caches_after() == 2  # train and held out
    assert caches_after("train.lr=1e-4", f"output={tmp_path}/b") == 2
    assert caches_after("loss.beta=0.1", f"output={tmp_path}/c") == 2
    rows = polite_rows()
    rows[0]["chosen"] += "!"
    changed = write_jsonl(tmp_path / "changed.jsonl", rows)
    assert caches_after(f"data.path={changed}", f"output={tmp_path}/d") > 2
    before = len(list(cache.glob("*.safetensors")))
    other = tiny_model_folder(tmp_path / "other", seed=1)
    assert caches_after(f"model.path={other}", f"output={tmp_path}/e") == before + 2
    # case 18: the same weights give other outputs if the config changes the computation
    config = json.loads((Path(other) / "config.json").read_text())
    config["rms_norm_eps"] = 1.0
    (Path(other) / "config.json").write_text(json.dumps(config))
    assert caches_after(f"model.path={other}", f"output={tmp_path}/f") == before + 4


def test_a_short_run_says_that_the_cache_is_for_all_rows(
    base: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    base["evaluation"] = {"samples": 0, "kl_prompts": 0}

    def advice(name: str, *overrides: str) -> bool:
        api.train(base, f"output={base['output']}/{name}", *overrides)
        return "this short run uses" in capsys.readouterr().err

    one_row = "train.max_steps=1", "train.batch_size=1"
    assert not advice("frozen", *one_row, "reference.kind=frozen")
    assert advice("cached", *one_row, "reference.kind=cached")
    assert not advice("read", *one_row, "reference.kind=cached")  # the cache exists now
    assert advice("part", "train.epochs=0.3", "reference.kind=cached", "data.limit=20")
    assert not advice("all", "train.max_steps=1", "train.batch_size=1000", "reference.kind=cached", "data.limit=30")


def test_kill_9_then_the_same_command_ends_bit_for_bit_the_same(base: dict[str, Any], tmp_path: Path) -> None:
    """A real process, killed at an arbitrary moment."""
    base["train"] |= {"epochs": 3, "batch_size": 3}
    base["checkpoint"] = {"every": 3}
    base["evaluation"] |= {"every": 5}
    whole = api.train(base, quiet=True)
    base["output"] = str(tmp_path / "killed")
    log = tmp_path / "killed/metrics.jsonl"
    ends = []
    for killed in (True, True, False):
        seen = log.read_bytes().count(b"\n") if log.exists() else 0
        process = forked(lambda: api.train(base, quiet=True))
        while killed and process.is_alive() and (not log.exists() or log.read_bytes().count(b"\n") < seen + 6):
            time.sleep(0.002)
        if killed:
            process.kill()
        process.join()
        ends.append(process.exitcode)
    assert ends == [-signal.SIGKILL, -signal.SIGKILL, 0]
    assert (whole.folder / "metrics.jsonl").read_bytes() == log.read_bytes()
    last = whole.model.parent.name
    for name in ("state.safetensors", "model/model.safetensors"):
        a, b = whole.folder / "checkpoints" / last / name, tmp_path / "killed/checkpoints" / last / name
        assert a.read_bytes() == b.read_bytes(), name


def test_gradient_checkpointing_changes_nothing(
    base: dict[str, Any], trained: api.TrainResult, recwarn: pytest.WarningsRecorder
) -> None:
    other = api.train(base, "train.gradient_checkpointing=true", quiet=True)
    assert not [str(w.message) for w in recwarn if "gradient_checkpointing_enable" in str(w.message)]
    assert other.after["eval/loss"] == pytest.approx(trained.after["eval/loss"], rel=1e-4)


@pytest.mark.parametrize("packing", ["separate", "padded"])
def test_packings_train_alike(base: dict[str, Any], trained: api.TrainResult, packing: str) -> None:
    other = api.train(base, f"train.packing={packing}", quiet=True)
    assert other.after["eval/loss"] == pytest.approx(trained.after["eval/loss"], rel=1e-3)


def test_two_passes_of_attention_train_alike(base: dict[str, Any], trained: api.TrainResult) -> None:
    other = api.train(base, "model.attention=varlen", quiet=True)
    assert other.after["eval/loss"] == pytest.approx(trained.after["eval/loss"], rel=1e-3)
    kinds = [json.loads((r.folder / "manifest.json").read_text())["attention"] for r in (trained, other)]
    assert kinds == ["groups", "varlen"]


def test_a_run_can_be_read_from_anywhere(base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    base["train"]["max_steps"] = 1
    base["data"]["path"], base["output"] = "pairs.jsonl", "run"
    base["model"]["path"] = "model"
    result = api.train(base, quiet=True)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert api.evaluate(tmp_path / "run", quiet=True)["eval/loss"] == pytest.approx(result.after["eval/loss"], rel=1e-6)


OPTIONS = (
    "train.batch_size=4 train.lr=1e-3 train.schedule=constant train.warmup_fraction=0.5 train.min_lr_fraction=0.5 "
    "train.weight_decay=0.5 train.adam_beta1=0.5 train.adam_beta2=0.9 train.adam_eps=0.1 train.max_grad_norm=0.01 "
    "train.seed=1 train.shuffle=false data.split_seed=1 data.validation_rows=12 data.max_length=40 data.add_eos=false "
    "loss.beta=0.1 loss.label_smoothing=0.2 loss.nll_weight=0.5 loss.average_log_prob=true reference.ema=0.5 "
    "lora.r=2 lora.alpha=32 lora.dropout=0.3 lora.target_modules=[q_proj] lora.rslora=true lora.dora=true lora.lr_ratio=4"
)


def test_no_option_is_silently_ignored(base: dict[str, Any]) -> None:
    """Each option, if not at its default, gives other weights after two steps of three."""
    base["train"] |= {"max_steps": 3, "threads": 1}
    shared = ObjectCache()

    def trained(*overrides: str) -> torch.Tensor:
        lora = {"lora": {"r": 4, "alpha": 16}} if any(o.startswith("lora") for o in overrides) else {}
        run = Run(api.as_config({**base, **lora}, [o for o in overrides if o != "lora"]), quiet=True, shared=shared)
        loop = run.make_loop()
        for step in range(2):
            loop.take_step(step, loop.schedule)
        return torch.cat([m.detach().flatten() for m in loop.optimizer.masters.values()])

    plain, adapter = trained(), trained("lora")
    assert torch.equal(plain, trained())
    without_effect = [
        option
        for option in OPTIONS.split()
        if torch.equal(trained(option), adapter if option.startswith("lora") else plain)
    ]
    assert without_effect == []


def test_a_moving_reference_is_the_mean_that_its_option_says(base: dict[str, Any]) -> None:
    """ema=0.9: after the first step, 0.9 of the old reference plus 0.1 of the policy."""
    run = Run(api.as_config({**base, "reference": {"ema": 0.9}}), quiet=True)
    loop = run.make_loop()
    start = {n: m.detach().clone() for n, m in loop.optimizer.masters.items()}
    loop.take_step(0, loop.schedule)
    moved = loop.algorithm.state_tensors()
    for name, policy in loop.optimizer.masters.items():
        assert torch.allclose(
            moved[f"reference/{name}"], 0.9 * start[name] + 0.1 * policy.detach(), rtol=1e-5, atol=1e-7
        )
        assert not torch.equal(start[name], policy)


def test_an_evaluation_is_with_the_values_of_the_step_before_it(
    base: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In three steps with progress 0, 1/2 and 1, evaluations use a scheduled value of the last training step."""
    begin, seen = Offline.begin_step, []

    def spied(self: Offline, step: int, progress: float, trees: Any) -> Any:
        if not self.scorer.model.training:
            seen.append(progress)
        return begin(self, step, progress, trees)

    monkeypatch.setattr(Offline, "begin_step", spied)
    base["train"]["max_steps"] = 3
    base["evaluation"] |= {"every": 1, "samples": 0, "kl_prompts": 0}
    api.train(base, quiet=True)
    assert seen[-3:] == [0.0, 0.5, 1.0] and set(seen[:-3]) <= {0.0}


def test_rows_that_changed_are_another_run(base: dict[str, Any]) -> None:
    base["train"]["max_steps"] = 1
    api.train(base, quiet=True)
    rows = polite_rows()
    rows[3]["chosen"] += "!"
    write_jsonl(Path(base["data"]["path"]), rows)
    with pytest.raises(CheckpointError, match="data: "):
        api.train(base, quiet=True)


def test_another_model_at_the_same_path_is_another_run(
    base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base |= {"lora": {"r": 4}, "checkpoint": {"every": 1}, "evaluation": {"samples": 0, "kl_prompts": 0}}
    real = Loop._after_step

    def stop(self: Loop, *args: Any) -> None:
        real(self, *args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_after_step", stop)
        with pytest.raises(KeyboardInterrupt):
            api.train(base, quiet=True)
    tiny_model_folder(tmp_path / "model", seed=5)
    with pytest.raises(CheckpointError):
        api.train(base, quiet=True)


# ---- bad input ------------------------------------------------------------------------------------------------------


def test_a_different_run_in_the_folder_is_refused_and_the_difference_shown(base: dict[str, Any]) -> None:
    base["train"]["max_steps"] = 1
    api.train(base, quiet=True)
    with pytest.raises(CheckpointError, match=r"config\.train\.lr: 0\.003 -> 0\.01"):
        api.train(base, "train.lr=0.01", quiet=True)


def test_prompt_longer_than_the_context_is_refused(base: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="beyond the model's context of 256"):
        api.train(base, "data.max_length=512", quiet=True)


def test_a_missing_model_folder(base: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such folder"):
        api.train(base, f"model.path={tmp_path}/nowhere", quiet=True)
    with pytest.raises(ModelError, match=f"is a file, .*did you mean its folder, {base['model']['path']}"):
        api.train(base, f"model.path={base['model']['path']}/config.json", quiet=True)


def test_dpo_on_plain_text_is_refused(base: dict[str, Any], tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "text.jsonl", [{"text": "hello there"}] * 3)
    with pytest.raises(DataError, match="needs pairs"):
        api.train(base, f"data.path={path}", quiet=True)


def test_nothing_held_out_to_evaluate(base: dict[str, Any]) -> None:
    base["data"].pop("validation_rows")
    with pytest.raises(ConfigError, match="nothing held out"):
        api.evaluate(base, quiet=True)


def test_prompts_of_files_with_one_name_are_told_apart_or_not_at_all(base: dict[str, Any], tmp_path: Path) -> None:
    """A row's source is its file's name and line. If two rows have the same source, their prompts are not confused."""
    for name, rows in (("a", polite_rows(3)), ("b", [*polite_rows(1), *polite_rows(4)[2:]])):
        (tmp_path / name).mkdir()
        write_jsonl(tmp_path / name / "x.jsonl", rows)
    base["data"] = {"path": str(tmp_path / "a/x.jsonl"), "eval_path": str(tmp_path / "b/x.jsonl")}
    prompts = Run(api.as_config(base), quiet=True).rows.prompts_by_source
    first, *others = (row and row.prompt for row in prompts.values())
    assert list(prompts) == [f"x.jsonl:{i}" for i in (1, 2, 3)]
    assert first == polite_rows()[0]["prompt"] and others == [None, None]
