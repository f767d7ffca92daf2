"""`penchant eval` on every kind of model: the same figures however it is named, and one message for every user error."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import polite_rows, tiny_model_folder, tiny_tokenizer, write_jsonl

from penchant import api
from penchant.cli import main
from penchant.errors import CheckpointError, ConfigError, DataError, ModelError
from penchant.evaluate.output import format_table

Paths = dict[str, str]
FP32 = "model.dtype=fp32"


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Paths:
    """A base model, a run, a LoRA run, rows and texts."""
    folder = tmp_path_factory.mktemp("eval")
    base = tiny_model_folder(folder / "base")
    pairs = write_jsonl(folder / "pairs.jsonl", polite_rows())
    config: dict[str, Any] = {
        "model": {"path": base, "dtype": "fp32"},
        "data": {"path": pairs, "validation_rows": 6, "max_length": 128},
        "loss": {"name": "dpo", "beta": 0.5},
        "train": {"batch_size": 9, "tokens_per_step": 900, "lr": 3e-3, "warmup_fraction": 0.0},
        "evaluation": {"samples": 0, "kl_prompts": 0},
        "reference": {"kind": "frozen"},
        "output": str(folder / "runs/full"),
    }
    api.train(config, quiet=True)
    lora = {"lora": {"r": 4, "alpha": 16}, "output": str(folder / "runs/lora"), "reference": {}}
    api.train({**config, **lora, "train": {**config["train"], "lr": 2e-2}}, quiet=True)
    rows = polite_rows(30)[24:]
    return {
        "folder": str(folder),
        "base": base,
        "pairs": pairs,
        "run": config["output"],
        "lora": lora["output"],
        "test": write_jsonl(folder / "test.jsonl", [*rows, {**rows[0], "chosen": " Sure, here you are."}]),
        "text": write_jsonl(folder / "text.jsonl", [{"text": f"The cat {i} sat." * (1 + i)} for i in range(12)]),
        "prompts": write_jsonl(folder / "prompts.jsonl", [{"prompt": f"Ask {i}"} for i in range(3)]),
    }


def close(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Check that common figures agree, and that there are some."""
    names = [n for n in one if n.startswith("eval/") and n in other]
    assert len(names) > 5
    for name in names:
        assert other[name] == pytest.approx(one[name], rel=2e-4, abs=2e-5), name


def test_the_full_figures_are_the_runs_own_where_both_have_them(there: Paths) -> None:
    own = api.evaluate(there["run"], quiet=True)
    full = api.evaluate(there["run"], quiet=True, exact_kl=True)
    shared = {n for n in own if n in full and n.startswith("eval/")}
    assert {"eval/logps/chosen", "eval/logratios/rejected", "eval/perplexity/chosen"} <= shared
    # DPO's own reward is the implicit one, but under another name
    assert not any(n.startswith("eval/rewards/") for n in full) and not any("implicit_reward" in n for n in own)
    rewards = {n: v for n, v in own.items() if n.startswith("eval/rewards/") and not n.endswith("/ties")}
    as_implicit = {n.replace("eval/rewards/", "eval/implicit_reward/"): v for n, v in rewards.items()}
    assert len(as_implicit) > 3 and as_implicit.keys() <= full.keys()
    # intervals differ, because prompts are numbered differently in the bootstrap
    close({n: v for n, v in (own | as_implicit).items() if not n.endswith("/ci")}, full)
    assert full["checkpoint"] == own["checkpoint"] == "step-2" and full["reference"] == "start"
    assert full["eval/implicit_reward/margins"] > 0 and "beta = 0.5" in " ".join(full["notes"])
    assert full["eval/implicit_reward/margins/n"] == own["eval/rows"] == 6
    assert full["eval/answers/kl/policy_ref"] > full["eval/answers/kl/policy_ref_per_token"] > 0


def test_a_model_is_the_same_by_every_name(there: Paths) -> None:
    asked: dict[str, Any] = {"data": there["test"], "quiet": True}
    run = api.evaluate(there["run"], step="best", **asked)
    checkpoint = Path(there["run"]) / "checkpoints" / run["checkpoint"]
    close(run, api.evaluate(checkpoint, **asked))
    close(run, api.evaluate(checkpoint / "model", **asked))
    alone = Path(there["folder"]) / "alone"
    shutil.copytree(checkpoint / "model", alone, dirs_exist_ok=True)
    close(run, api.evaluate(alone, FP32, reference=there["base"], beta=0.5, **asked))
    without = api.evaluate(alone, FP32, **asked)  # its start is unknown
    assert "reference" not in without and "eval/implicit_reward/margins" not in without
    assert without["eval/logps/chosen"] == pytest.approx(run["eval/logps/chosen"], rel=1e-5)


def test_rows_may_be_in_several_files(there: Paths, tmp_path: Path) -> None:
    lines = Path(there["test"]).read_text().splitlines(keepends=True)
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    files[0].write_text("".join(lines[:4]))
    files[1].write_text("".join(lines[4:]))
    close(*(api.evaluate(there["base"], FP32, data=data, quiet=True) for data in (there["test"], files)))
    texts = [shutil.copy(there["text"], tmp_path / name) for name in ("c.jsonl", "d.jsonl")]
    with pytest.raises(DataError, match=f"^{texts[0]}, {texts[1]}: holds texts"):
        api.evaluate(there["base"], FP32, data=texts, quiet=True)


def test_an_adapter_is_the_same_by_every_name(there: Paths, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"data": there["test"], "quiet": True}
    run = api.evaluate(there["lora"], **asked)
    assert run["eval/implicit_reward/margins"] > 0
    shutil.copytree(Path(there["lora"]) / "checkpoints" / run["checkpoint"] / "model", tmp_path / "adapter")
    adapter = api.evaluate(tmp_path / "adapter", FP32, beta=0.5, **asked)
    close(run, adapter)
    assert adapter["reference"] == there["base"]
    settings = tmp_path / "adapter/adapter_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"base_model_name_or_path": "/gone"}))
    with pytest.raises(ModelError, match="'/gone' is not there; name the base with --base"):
        api.evaluate(tmp_path / "adapter", FP32, **asked)
    close(run, api.evaluate(tmp_path / "adapter", FP32, beta=0.5, base=there["base"], **asked))
    # the adapter has an effect: its base alone gives other figures
    base = api.evaluate(there["base"], FP32, **asked)
    assert base["eval/logps/chosen"] == pytest.approx(run["eval/ref_logps/chosen"], rel=1e-5)
    assert abs(base["eval/logps/chosen"] - run["eval/logps/chosen"]) > 0.1


def test_the_start_of_a_run_and_another_reference(there: Paths) -> None:
    start = api.evaluate(there["run"], data=there["test"], step="0", quiet=True)
    assert start["checkpoint"] == "start" and "reference" not in start
    other = api.evaluate(there["base"], FP32, data=there["test"], reference=there["run"], quiet=True)
    run = api.evaluate(there["run"], data=there["test"], quiet=True)
    assert other["eval/ref_logps/chosen"] == pytest.approx(run["eval/logps/chosen"], rel=1e-5)
    # beta 1, not 0.5
    assert other["eval/implicit_reward/margins"] == pytest.approx(-2 * run["eval/implicit_reward/margins"], rel=1e-4)
    # KL(base || run) is KL(run || base) with the models swapped
    assert other["eval/answers/kl/policy_ref"] == pytest.approx(run["eval/answers/kl/ref_policy"], rel=1e-4)
    plain = api.evaluate(there["run"], data=there["test"], exact_kl=False, quiet=True)
    assert "eval/answers/kl/policy_ref" not in plain
    assert plain["eval/implicit_reward/margins"] == pytest.approx(run["eval/implicit_reward/margins"], rel=1e-4)
    alone = api.evaluate(there["run"], data=there["test"], reference="none", quiet=True)
    assert "eval/implicit_reward/margins" not in alone


def test_perplexity_is_of_the_texts_tokens_and_bytes(there: Paths) -> None:
    from transformers import AutoModelForCausalLM

    found = api.evaluate(there["base"], FP32, text=there["text"], quiet=True)
    model = AutoModelForCausalLM.from_pretrained(there["base"], dtype=torch.float32).eval()
    nats, tokens = 0.0, 0
    for line in Path(there["text"]).read_text().splitlines():
        ids = tiny_tokenizer()(json.loads(line)["text"], add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logps = torch.log_softmax(model(torch.tensor([[0, *ids]])).logits[0, :-1].double(), -1)
        nats -= float(logps.gather(1, torch.tensor(ids)[:, None]).sum())
        tokens += len(ids)
    assert found["eval/text/perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-5)
    assert found["eval/text/bits_per_byte"] == pytest.approx(nats / math.log(2) / tokens, rel=1e-5)  # a byte a token
    assert found["eval/text/perplexity/n"] == 12
    low, high = found["eval/text/perplexity/ci"]
    assert low < found["eval/text/perplexity"] < high
    short = api.evaluate(there["base"], FP32, "data.max_length=32", text=there["text"], quiet=True)
    assert "read in parts" in " ".join(short["notes"])
    against = api.evaluate(there["run"], "data.max_length=256", text=there["text"], quiet=True)
    assert against["eval/text/ref_perplexity"] == pytest.approx(found["eval/text/perplexity"], rel=1e-5)
    ratio = against["eval/text/perplexity"] / against["eval/text/ref_perplexity"]
    assert not any(name.startswith("eval/logps") for name in against)  # only texts were given
    assert against["eval/text/perplexity_ratio"] == pytest.approx(ratio, rel=1e-6)


def test_what_is_written_is_judged_measured_and_kept(there: Paths, tmp_path: Path) -> None:
    pytest.importorskip("sacrebleu")
    pytest.importorskip("rouge_score")
    asked: dict[str, Any] = {"generate": 5, "samples": 2, "max_new_tokens": 6, "seed": 3, "quiet": True}
    out = tmp_path / "rows.jsonl"
    found = api.evaluate(
        there["run"], data=there["test"], reward="words", also=["matches:a"], samples_output=out, **asked
    )
    rows = [json.loads(line) for line in out.read_text().split("\n") if line]
    assert len(rows) == 10 == found["eval/generated/reward/n"]
    assert found["eval/generated/reward"] == pytest.approx(np.mean([len(r["completion"].split()) for r in rows]))
    assert found["eval/generated/reward[matches:a]"] == pytest.approx(np.mean(["a" in r["completion"] for r in rows]))
    assert found["eval/generated/length"] == pytest.approx(np.mean([r["tokens"] for r in rows]))
    assert [r["sample"] for r in rows] == [0, 1] * 5
    # the prompt that occurs twice has both answers as references
    assert rows[0]["references"] == ["Of course, here is tea.", "Sure, here you are."]
    for name in ("bleu", "rouge_1", "rouge_2", "rouge_L", "distinct_1", "distinct_2", "repetition", "ended"):
        assert f"eval/generated/{name}" in found
    assert found["eval/generated/kl/policy_ref"] > 0 and "eval/generated/kl/k1" in found
    assert ("eval/generated/length/ci" in found) != any("the same for every prompt" in note for note in found["notes"])
    assert "tok:13a" in " ".join(found["notes"]) and "fewer than 10 prompts" in " ".join(found["notes"])
    again = api.evaluate(there["run"], data=there["test"], reward="words", **asked)
    assert again["eval/generated/reward"] == found["eval/generated/reward"]  # the same seed
    greedy = api.evaluate(
        there["run"], data=there["prompts"], **{**asked, "generate": 9, "samples": 1}, temperature=0, overlap=True
    )
    assert "eval/generated/kl/k1" not in greedy and "eval/generated/kl/policy_ref" in greedy
    assert "There are 3 prompts, not 9." in greedy["notes"] and "eval/generated/bleu" not in greedy


def test_a_run_keeps_a_line_of_each_evaluation_and_others_keep_none(there: Paths, tmp_path: Path) -> None:
    run = tmp_path / "moved"
    shutil.copytree(there["run"], run)
    (run / "evaluations.jsonl").unlink(missing_ok=True)
    api.evaluate(run, quiet=True)
    found = api.evaluate(run, data=there["test"], output=tmp_path / "all.json", quiet=True)
    first, second = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    assert first["step"] == second["step"] == 2
    assert first["what"]["data"] == "held out" and second["what"]["data"] == there["test"]
    assert second["what"]["rows"] == 7 and len(second["what"]["fingerprint"]) == 64
    assert second["metrics"]["eval/implicit_reward/margins"] == found["eval/implicit_reward/margins"]
    assert second["n"]["eval/implicit_reward/margins"] == 7 and not any(
        name.endswith("/n") for name in second["metrics"]
    )
    assert second["time"] and second["notes"] == found["notes"]
    whole = json.loads((tmp_path / "all.json").read_text())
    more = ("time", "sha256")  # a log line has its own checksum
    assert {k: v for k, v in whole.items() if k not in more} == {k: v for k, v in second.items() if k not in more}
    api.evaluate(there["base"], FP32, data=there["test"], quiet=True)
    assert not (Path(there["base"]) / "evaluations.jsonl").exists()


def test_bad_rows_are_counted(there: Paths, tmp_path: Path) -> None:
    rows = [*polite_rows(12), {"prompt": "p", "chosen": "same", "rejected": "same"}]
    path = write_jsonl(tmp_path / "bad.jsonl", rows)
    found = api.evaluate(there["base"], FP32, "data.on_bad_row=skip", data=path, quiet=True)
    assert "Kept aside: 1 bad row of 13." in found["notes"] and found["eval/logps/chosen/n"] == 12


def test_the_table_has_every_figure_its_interval_and_what_it_is(
    there: Paths, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--data", there["test"], "--generate", "2", "--max-new-tokens", "4", "--no-overlap", "--explain"]
    assert main(["eval", there["run"], *asked, "--also", "words"]) == 0
    out = capsys.readouterr().out
    table, notes, explained = out.split("\n\n")
    lines = {line.split()[0]: line for line in table.splitlines()}
    assert (
        lines["eval/implicit_reward/accuracies"].endswith("n=7 pairs")
        and "fewer than 10: no interval" in lines["eval/implicit_reward/accuracies"]
    )
    assert lines["eval/generated/reward[words]"].endswith("n=2 completions")
    assert "beta = 0.5" in notes
    assert all(name in explained for name in lines if name.startswith("eval/"))
    assert "the whole vocabulary" in explained and not any("/ci" in line or "/n " in line for line in out.splitlines())
    tiny = {"eval/generated/kl/k3": 1.2e-5, "eval/generated/kl/k3/ci": [1e-5, 2e-5]}
    table = format_table({"eval/generated/reward[words]": 8.5, **tiny}, whole=False)
    assert "reward[words]" in table and "1.20e-05  [1.00e-05, 2.00e-05]" in table  # --also was asked for
    assert main(["eval", there["run"]]) == 0
    assert "n=6 rows" in capsys.readouterr().out
    assert main(["eval", there["run"], "--data", there["test"], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["eval/implicit_reward/margins/n"] == 7


MISTAKES = {
    "a model that is not there": (["{folder}/nothing", "--data", "{test}"], "no such run or config, nor a model"),
    "a mistyped run": (["{folder}/runs/ful", "--data", "{test}"], "did you mean {folder}/runs/full?"),
    "a file": (["{test}", "--data", "{test}"], "is a file"),
    "a folder with nothing in it": (["{folder}", "--data", "{test}"], "it must hold a transformers model"),
    "nothing to evaluate on": (["{base}"], "give --data FILE or --text FILE"),
    "no such run": (["runs/frist"], "no such run here; check the path"),
    "nothing to evaluate on, but a reference": (["{base}", "--reference", "{run}"], "nothing to evaluate on"),
    "no such data": (["{base}", "--data", "{folder}/tst.jsonl"], "did you mean {folder}/test.jsonl?"),
    "texts as rows": (["{base}", "--data", "{text}"], "give it as --text"),
    "rows as texts": (["{base}", "--text", "{test}"], '"text" is missing'),
    "prompts without answers": (["{base}", "--data", "{prompts}"], "add --generate 100"),
    "prompts without answers beside a text": (["{base}", "--data", "{prompts}", "--text", "{text}"], "add --generate"),
    "nothing to write to": (["{base}", "--text", "{text}", "--generate", "4"], "there are no prompts"),
    "an unknown reward": (["{base}", "--data", "{test}", "--generate", "2", "--reward", "wrds"], "is not a reward"),
    "a reward of nothing": (["{base}", "--data", "{test}", "--reward", "words"], "add --generate 100"),
    "a reward that is not a number": (
        ["{base}", "--data", "{test}", "--generate", "2", "--reward", "{{words: many}}"],
        "give each reward a number",
    ),
    "completions of nothing": (["{base}", "--data", "{test}", "--samples-output", "x"], "--samples-output"),
    "many greedy ones": (
        ["{base}", "--data", "{test}", "--generate", "2", "--temperature", "0", "--samples", "2"],
        "all alike",
    ),
    "steps of a model": (["{base}", "--data", "{test}", "--step", "3"], "is not a run, so it has no steps"),
    "a step that is not there": (["{run}", "--data", "{test}", "--step", "7"], "there are step-"),
    "two steps": (["{run}/checkpoints/step-2", "--data", "{test}", "--step", "1"], "is step 2 already"),
    "a base of what is not an adapter": (["{base}", "--data", "{test}", "--base", "{run}"], "is not an adapter"),
    "a base of a run without adapter": (["{run}", "--data", "{test}", "--base", "{base}"], "is not an adapter"),
    "a reference that is not there": (["{base}", "--data", "{test}", "--reference", "./no"], "no such run or config"),
    "an output in no folder": (["{base}", "--data", "{test}", "--output", "{folder}/no/x.json"], "no such folder"),
    "an output that is a folder": (["{base}", "--data", "{test}", "--output", "{folder}"], "is a folder"),
    "too long": (["{base}", "--data", "{test}", "data.max_length=999"], "set it to at most 256"),
    "too long to write": (
        ["{base}", "--data", "{test}", "--generate", "2", "--max-new-tokens", "400", "--no-overlap"],
        "beyond the context",
    ),
    "a setting of training for a trained run": (["{run}", "train.lr=3"], "train.lr: changes nothing"),
    "a setting of checkpoints for a trained run": (
        ["{run}/checkpoints/step-2", "--data", "{test}", "checkpoint.every=2"],
        "changes nothing",
    ),
    "a mistyped key": (["{base}", "--data", "{test}", "data.max_lenth=9"], 'did you mean "max_length"?'),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_sentence_and_exit_code_2(there: Paths, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    args, expected = MISTAKES[name]
    assert main(["eval", *(a.format(**there) for a in args)]) == 2
    error = capsys.readouterr().err
    last = error.strip().splitlines()[-1]
    assert last.startswith("penchant: ") and "Traceback" not in error
    assert expected.format(**there) in last, last


def test_another_tokenizer_is_no_reference(there: Paths, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    shutil.copytree(there["base"], tmp_path / "other")
    vocab = {"<unk>": 0, "</s>": 1, "a": 2}
    words = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocab, unk_token="<unk>")), eos_token="</s>", unk_token="<unk>"
    )
    words.save_pretrained(tmp_path / "other")
    with pytest.raises(ConfigError, match="has another tokenizer"):
        api.evaluate(there["base"], FP32, data=there["test"], reference=str(tmp_path / "other"), quiet=True)


def test_a_reward_models_run_is_told_where_it_is_measured(there: Paths, tmp_path: Path) -> None:
    config = {
        "model": {"path": there["base"], "dtype": "fp32"},
        "data": {"path": there["pairs"], "validation_rows": 6, "max_length": 128},
        "algorithm": "reward_model",
        "train": {"max_steps": 1},
        "evaluation": {"samples": 0},
        "output": str(tmp_path / "reward"),
    }
    api.train(config, quiet=True)
    with pytest.raises(ConfigError, match="is a reward model"):
        api.evaluate(tmp_path / "reward", data=there["test"], quiet=True)
    assert "eval/rewards/accuracies" in api.evaluate(tmp_path / "reward", quiet=True)
    shutil.copytree(tmp_path / "reward/checkpoints/step-1/model", tmp_path / "alone")
    with pytest.raises(ModelError, match="classifier or reward model"):
        api.evaluate(tmp_path / "alone", FP32, data=there["test"], quiet=True)


def test_what_it_started_from_may_be_gone(there: Paths, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(there["run"], run)
    config = run / "config.resolved.yaml"
    config.write_text(config.read_text().replace(there["base"], "/gone/base"))
    (run / "sums.json").unlink()
    found = api.evaluate(run, data=there["test"], quiet=True)
    assert "name one with --reference" in " ".join(found["notes"]) and "eval/implicit_reward/margins" not in found


def test_without_the_extra_bleu_is_a_sentence_and_the_rest_goes_on(
    there: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    asked: dict[str, Any] = {"data": there["test"], "generate": 2, "max_new_tokens": 3, "quiet": True}
    with pytest.raises(ConfigError, match=r"pip install 'penchant\[eval\]'"):
        api.evaluate(there["base"], FP32, overlap=True, **asked)
    by_default, without = (api.evaluate(there["base"], FP32, overlap=overlap, **asked) for overlap in (None, False))
    assert "eval/generated/length" in by_default and "eval/generated/bleu" not in by_default
    assert [n for n in by_default["notes"] if "penchant[eval]" in n]
    assert not [n for n in without.get("notes", []) if "penchant[eval]" in n]


def test_a_step_where_there_is_no_checkpoint(there: Paths, tmp_path: Path) -> None:
    config = {"model": {"path": there["base"]}, "data": {"path": there["pairs"], "validation_rows": 6}}
    whole = {**config, "output": str(tmp_path / "never"), "evaluation": {"kl_prompts": 0}, "loss": "dpo"}
    with pytest.raises(CheckpointError, match="there is no checkpoint, so no step 5"):
        api.evaluate(whole, "data.max_length=128", step="5", quiet=True)
    with pytest.raises(ConfigError, match='did you mean "generate"'):
        api.evaluate(whole, genrate=3)
    start = api.evaluate(whole, "data.max_length=128", data=there["test"], quiet=True)
    assert start["checkpoint"] == "start"
