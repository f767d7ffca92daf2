"""The command line: fast help, one message per user error, and the documented exit codes."""

from __future__ import annotations

import inspect
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from tiny import polite_rows, tiny_model_folder, write_jsonl

from penchant import api
from penchant.cli import main
from penchant.errors import ConfigError
from penchant.requests import CompareRequest, EvalRequest, ExportRequest, GetRequest, request_of


def _config(tmp_path: Path, **data: Any) -> str:
    config = {
        "model": {"path": tiny_model_folder(tmp_path / "model"), "dtype": "fp32"},
        "data": {
            "path": write_jsonl(tmp_path / "pairs.jsonl", polite_rows()),
            "validation_rows": 6,
            "max_length": 128,
            **data,
        },
        "train": {"batch_size": 9, "lr": 3e-3, "tokens_per_step": 900},
        "evaluation": {"samples": 1, "sample_tokens": 3},
        "output": str(tmp_path / "run"),
    }
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(config, indent=1))  # JSON is YAML
    return str(path)


def test_help_imports_nothing_heavy() -> None:
    script = "import sys; from penchant.cli import build_parser; build_parser().format_help(); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "transformers", "numpy", "pydantic", "yaml", "jinja2", "rich"} & set(loaded)


@pytest.mark.usefixtures("live_reports")
def test_train_eval_audit_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = _config(tmp_path)
    assert main(["train", config, "train.epochs=2"]) == 0
    out, err = capsys.readouterr()
    assert (out + err).count("report.html") == 1
    assert "before: preference accuracy 0.5000" in out and "after: preference accuracy" in out
    assert main(["eval", str(tmp_path / "run"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["eval/rows"] == 6
    assert main(["eval", str(tmp_path / "run"), "--step", "best"]) == 0
    assert "eval/rewards/accuracies" in capsys.readouterr().out
    assert main(["data", "audit", config, "--all"]) == 0
    assert "leakage: prompts of held out that are also in train" in capsys.readouterr().out
    assert main(["data", "audit", str(tmp_path / "pairs.jsonl"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["findings"]["duplicates"]["count"] == 0
    (tmp_path / "run/report.html").unlink()
    assert main(["report", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run/report.html").exists()
    both = ["report", str(tmp_path / "run"), str(tmp_path / "run"), "--output", str(tmp_path / "page.html")]
    assert main(both) == 0 and (tmp_path / "page.html").exists()
    capsys.readouterr()
    assert main(["report", str(tmp_path / "nowhere")]) == 2
    assert "no such run folder" in capsys.readouterr().err
    assert main(["losses"]) == 0
    assert "label_smoothing" in capsys.readouterr().out


def _bad(name: str, content: bytes) -> Any:
    return pytest.param(name, content, id=name)


@pytest.mark.parametrize(
    "name,content",
    [
        _bad("missing.jsonl", b"-"),
        _bad("empty.jsonl", b""),
        _bad("cut.jsonl", b'{"prompt": "p", "chosen": "c", "rejected": "r"}\n{"prompt": "p", "cho'),
        _bad("nul.jsonl", b'{"prompt": "p\x00", "chosen": "c", "rejected": "r"}\n'),
        _bad("latin1.jsonl", b'{"prompt": "caf\xe9", "chosen": "c", "rejected": "r"}\n'),
        _bad("null.jsonl", b'{"prompt": "p", "chosen": null, "rejected": "r"}\n'),
        _bad("number.jsonl", b'{"prompt": "p", "chosen": 3, "rejected": "r"}\n'),
        _bad("equal.jsonl", b'{"prompt": "p", "chosen": "r", "rejected": "r"}\n'),
        _bad("scalar.jsonl", b"3\n"),
    ],
)
def test_bad_data_is_one_paragraph_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes
) -> None:
    if name != "missing.jsonl":
        (tmp_path / name).write_bytes(content)
    assert main(["train", _config(tmp_path), f"data.path={tmp_path / name}", "--quiet"]) == 2
    captured = capsys.readouterr()
    message = [line for line in captured.err.splitlines() if line.startswith("penchant: ")]
    assert len(message) == 1 and name in message[0] and ";" in message[0]
    assert "Traceback" not in captured.err


def test_a_bom_is_read(tmp_path: Path) -> None:
    path = tmp_path / "bom.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "".join(json.dumps(r) + "\n" for r in polite_rows()).encode())
    assert main(["train", _config(tmp_path), f"data.path={path}", "train.max_steps=1", "--quiet"]) == 0


def test_a_mistyped_command_ends_with_code_2() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "penchant", "trian", "x"],
        capture_output=True,
        text=True,
        env={**os.environ, "PENCHANT_REEXECUTED": "1"},
    )
    assert done.returncode == 2
    assert 'did you mean "train"' in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("when", "code"),
    [("Run.make_loop", 130), ("Run._evaluate_in_training", 130), ("Run._samples", 130), ("join_samples", 4)],
)
def test_a_signal_outside_the_loop_is_answered_by_a_sentence_and_the_same_command_goes_on(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    when: str,
    code: int,
    number: signal.Signals,
) -> None:
    command = ["train", _config(tmp_path), "train.max_steps=1", "--quiet"]
    handler = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(f"penchant.runs.{when}", lambda *_: os.kill(os.getpid(), number))
        assert main(command) == code
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("penchant: ") and ("a checkpoint" in said) == (code == 4)
    assert signal.getsignal(number) == handler
    assert main(command) == 0


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["train", "nowhere.yaml"], "nowhere.yaml: no such file"),
        (["eval", "nowhere"], "nowhere: no such run or config"),
        (["report", "nowhere"], "no such run folder"),
        (["data", "audit", "nowhere.jsonl"], "no such file"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said


def test_tokenizers_without_eos_or_pad(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = _config(tmp_path)
    from tiny import tiny_tokenizer

    tiny_tokenizer(eos=False).save_pretrained(tmp_path / "no-eos")
    assert main(["train", config, f"model.tokenizer={tmp_path / 'no-eos'}", "--quiet"]) == 2
    assert "no EOS token" in capsys.readouterr().err
    tiny_tokenizer(pad=False).save_pretrained(tmp_path / "no-pad")
    assert main(["train", config, f"model.tokenizer={tmp_path / 'no-pad'}", "train.max_steps=1", "--quiet"]) == 0


def test_an_output_that_is_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "taken").write_text("")
    assert main(["train", _config(tmp_path), f"output={tmp_path / 'taken'}", "--quiet"]) == 2
    assert "is a file" in capsys.readouterr().err


KINDS = {
    "train": "model: {path: m}\ndata: {path: d.jsonl}\noutput: out\n",
    "sweep": "output: out\nbase: {model: {path: m}, data: {path: d.jsonl}}\ngrid: {loss.beta: [0.1, 0.3]}\n",
    "pipeline": "output: out\ndefaults: {model: {path: m}, data: {path: d.jsonl}}\nstages: {sft: {loss: sft}}\n",
}


@pytest.mark.parametrize(
    ("command", "kind"),
    [(c, k) for c in ("train", "plan", "eval", "data audit") for k in ("sweep", "pipeline")]
    + [("sweep", "pipeline"), ("pipeline", "train"), ("pipeline", "sweep")],
)
def test_the_config_of_another_command_names_that_command(
    command: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "it.yaml"
    file.write_text(KINDS[kind])
    assert main([*command.split(), str(file)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"`penchant {kind} {file}`" in line


@pytest.mark.parametrize("key", ["base", "search", "stages"])
def test_a_key_of_another_command_in_a_runs_config_is_named_with_its_line(
    key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "it.yaml"
    file.write_text(f"{KINDS['train']}{key}: 3\n")
    assert main(["plan", str(file)]) == 2
    assert f'{file}:4: unknown key "{key}"' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "needed"), [("eval", "MODEL"), ("train", "CONFIG"), ("sweep", "CONFIG"), ("pipeline", "CONFIG")]
)
def test_overrides_are_not_called_required(command: str, needed: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command])
    assert capsys.readouterr().err == f"penchant: the following arguments are required: {needed}\n"


@pytest.mark.parametrize(("command", "meant"), [(["trian"], "train"), (["data", "gett"], "get")])
def test_a_mistyped_command_is_named(command: list[str], meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(command)
    said = capsys.readouterr().err
    assert repr(command[-1]) in said and f'did you mean "{meant}"' in said


@pytest.mark.parametrize("command", [["train"], ["data", "audit"]])
def test_the_help_of_a_command_says_what_it_does(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    said = []
    for asked in (command[:-1], command):
        with pytest.raises(SystemExit):
            main([*asked, "--help"])
        said.append(" ".join(capsys.readouterr().out.split()))
    listed = said[0].split(f" {command[-1]} ", 1)[1]
    about = said[1].split("] ", 1)[1]
    (sentence,) = re.findall(r"([A-Z][^.\[\]]*)\. positional arguments", about)
    assert sentence[0].lower() + sentence[1:] in listed


def test_an_unknown_option_says_whose_help_lists_them(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["data", "fix", "a.jsonl", "b.jsonl", "--rules", "pii"])
    assert "`penchant data fix --help`" in capsys.readouterr().err


def test_eval_of_a_sweeps_folder_names_its_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("dpo-seed-0", "ipo-seed-0"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.resolved.yaml").write_text("{}\n")
    assert main(["eval", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "a folder of runs" in said and f"{tmp_path}/dpo-seed-0, {tmp_path}/ipo-seed-0" in said


@pytest.mark.parametrize(
    ("call", "request_kind"),
    [
        (api.evaluate, EvalRequest),
        (api.compare, CompareRequest),
        (api.export, ExportRequest),
        (api.get_data, GetRequest),
    ],
)
def test_an_option_stands_once(call: Callable[..., object], request_kind: type) -> None:
    """A function's keywords and the command-line options are the fields of the request."""
    shown = inspect.signature(call).parameters
    assert {f.name for f in fields(request_kind)} <= set(shown)
    assert shown["seed" if "seed" in shown else "step"].default == (0 if "seed" in shown else "last")
    with pytest.raises(ConfigError, match="did you mean"):
        call("x", **{f"{fields(request_kind)[-1].name}x": 1})


def test_bounds_of_a_number(capsys: pytest.CaptureFixture[str]) -> None:
    for command in (
        ["chat", "m", "--top-p", "0"],
        ["chat", "m", "--temperature", "nan"],
        ["serve", "m", "--port", "70000"],
        ["eval", "m", "--generate", "0"],
        ["eval", "m", "--temperature", "-1"],
        ["eval", "m", "--beta", "0"],
        ["compare", "m", "--seed", "-1"],
        ["data", "get", "hh", "--seed", "-1"],
        ["data", "audit", "a.jsonl", "--places", "-1"],
        ["demo", "--seed", "-1"],
        ["sweep", "run.yaml", "--plan", "--jobs", "0"],
    ):
        with pytest.raises(SystemExit) as end:
            main(command)
        assert end.value.code == 2 and f"{command[-2]}: {command[-1]} is not" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("request_kind", "asked"),
    [
        (EvalRequest, {"beta": 0.0}),
        (EvalRequest, {"generate": 0}),
        (CompareRequest, {"seed": -1}),
        (GetRequest, {"seed": -1}),
    ],
)
def test_bounds_hold_in_python_too(request_kind: type, asked: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=f"^{next(iter(asked))}: is .*; give (at least|more than)"):
        request_of(request_kind, asked, "x")


def test_gpus_that_are_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for there, told in ((0, "no GPU .* --processes N"), (1, "1 GPU; give at most 1")):
        monkeypatch.setattr("torch.cuda.device_count", lambda there=there: there)
        assert main(["train", _config(tmp_path), "--gpus", "2"]) == 2
        assert re.search(told, capsys.readouterr().err)
    monkeypatch.setattr("penchant.cli.train.cores", lambda: 2)
    assert main(["train", _config(tmp_path), "--processes", "17"]) == 2  # nothing is started
    assert "is 17, and this machine has 2 cores; give at most 16" in capsys.readouterr().err
