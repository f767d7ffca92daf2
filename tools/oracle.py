"""Record the output of every `penchant` command, to compare it before and after a change of the code.

    PYTHONPATH=src python tools/oracle.py record before          # all steps, under ten minutes on one core
    PYTHONPATH=src python tools/oracle.py record after --only dpo,eval
    python tools/oracle.py compare before after                  # prints the differences; exit code 1 if there are any

It only calls `python -m penchant`, on the bundled model with one thread. Every step writes a folder with the exit code, stdout and
stderr of each command, every text file that the commands wrote, and the SHA-256 of every other file (weights, exports). Times,
speeds, memory, paths, versions and dates are masked. Numbers depend on the machine, so compare recordings of the same machine.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# ---------------------------------------------------------------------------------------------------------------------
# steps

BASE: dict[str, Any] = {
    "model": {"path": "model", "dtype": "fp32"},
    "data": {"path": "pairs.jsonl", "validation_rows": 8, "max_length": 96, "add_eos": False},
    "train": {
        **{"threads": 1, "max_steps": 3, "batch_size": 8, "tokens_per_step": 512, "lr": 1e-3, "schedule": "linear"},
    },
    "evaluation": {"samples": 2, "sample_tokens": 8, "kl_prompts": 4},
}
ONLINE = {"samples": 4, "max_new_tokens": 12, "temperature": 1.0}
UNPAIRED = {"data": {"path": "unpaired.jsonl"}}

# one run per method, then runs that take other paths through the engine
RUNS: dict[str, dict[str, Any]] = {
    "dpo": {"loss": {"name": "dpo", "beta": 0.1}, "evaluation": {"every": 2, "reward": "sentiment"}},
    "dpo-shift": {"loss": {"name": "dpo_shift"}},
    "kto": {**UNPAIRED, "loss": "kto"},
    "orpo": {"loss": "orpo"},
    "sft": {"loss": "sft"},
    "ipo": {"loss": "ipo"},
    "simpo": {"loss": "simpo"},
    "pmpo": {**UNPAIRED, "loss": "pmpo"},
    "rloo": {"algorithm": {"name": "rloo", **ONLINE}, "reward": "sentiment"},
    "grpo": {"algorithm": {"name": "grpo", **ONLINE}, "reward": "sentiment"},
    "ppo": {"algorithm": {"name": "ppo", **ONLINE}, "reward": {"sentiment": 1.0, "words": -0.01}},
    "online-dpo": {"algorithm": {"name": "online_dpo", **ONLINE}, "reward": "sentiment"},
    "reward-model": {"algorithm": {"name": "reward_model", "centring": 0.01}},
    "lora": {"lora": {"r": 4, "alpha": 8, "dropout": 0.1}},
    "bf16": {"model": {"dtype": "bf16"}},
    "reference-cached": {"reference": {"kind": "cached"}},
    "reference-frozen": {"reference": {"kind": "frozen"}},
    "reference-moving": {"reference": {"ema": 0.9}},
    "mixed-loss": {"loss": {"mix": [{"name": "dpo", "weight": 1.0}, {"name": "sft", "weight": 0.1}]}},
    "separate": {"train": {"packing": "separate", "gradient_checkpointing": True}},
    "resumed": {
        "train": {"max_steps": 24, "batch_size": 4, "epochs": 6},
        "checkpoint": {"every": 2, "keep_last": 1, "keep_best": False},
    },
}

SWEEP = {
    "output": "runs/sweep",
    "base": {**BASE, "loss": {"name": "dpo"}, "train": {**BASE["train"], "max_steps": 2}},
    "grid": {"loss.beta": [0.1, 0.5], "train.seed": [0, 1]},
}
PIPELINE = {
    "output": "runs/pipeline",
    "defaults": {**BASE, "train": {**BASE["train"], "max_steps": 2}},
    "stages": {"sft": {"loss": "sft"}, "dpo": {"model": {"path": "stage:sft"}, "loss": {"name": "dpo", "beta": 0.2}}},
    "compare": {"models": ["sft", "dpo"], "reward": "sentiment", "prompts": 6, "samples": 2, "max_new_tokens": 8},
}
TRL = {
    **{"model_name_or_path": "model", "dataset_name": "pairs.jsonl", "trainer": "dpo", "loss_type": "sigmoid"},
    **{"beta": 0.2, "learning_rate": 5.0e-6, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    **{"num_train_epochs": 2, "max_length": 256, "use_peft": True, "lora_r": 8, "output_dir": "runs/trl"},
}
LLAMA_FACTORY = {
    **{"model_name_or_path": "model", "stage": "dpo", "do_train": True, "finetuning_type": "lora", "lora_rank": 8},
    **{"pref_beta": 0.1, "pref_loss": "sigmoid", "dataset": "pairs", "cutoff_len": 256, "learning_rate": 5.0e-6},
    **{"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, "num_train_epochs": 3.0},
    **{"output_dir": "runs/factory", "template": "default"},
}
COMMANDS = (
    *("demo", "init", "plan", "train", "pipeline", "sweep", "eval", "compare", "data", "data get", "data formats"),
    *("data show", "data audit", "data fix", "report", "flags", "watch", "export", "track", "chat", "serve"),
    *("losses", "config", "import"),
)


@dataclass(frozen=True)
class Step:
    """Commands in order, the steps they need, and the paths (in the work folder) that they write.

    Args:
        plain: the output contains no times or speeds, so only paths, dates and versions are masked.
        by_hand: runs before `commands`, and yields (file name, text to record).
    """

    commands: tuple[str, ...]
    needs: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    plain: bool = False
    by_hand: Callable[[Work], Iterator[tuple[str, str]]] | None = None


def interrupted(work: Work) -> Iterator[tuple[str, str]]:
    """Interrupt a run with Ctrl-C and resume it. Where it stops varies, but its final state must not."""
    command = [sys.executable, "-m", "penchant", "train", "resumed.yaml", "--quiet"]
    log = work.folder / "runs/resumed/metrics.jsonl"
    process = subprocess.Popen(
        command, cwd=work.folder, env=work.environment("resumed"), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    while process.poll() is None and not (log.exists() and log.read_bytes().count(b"\n") > 4):
        time.sleep(0.02)
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
    process.communicate()
    yield "interrupted.txt", f"exit code {process.returncode}\n"
    yield "resumed.txt", work.run("train resumed.yaml --quiet", "resumed")


def steps() -> dict[str, Step]:
    """Every step by name, ordered so that the steps it needs come first."""
    every_step = {n: Step((f"train {n}.yaml",), writes=(f"runs/{n}",)) for n in RUNS}
    every_step["resumed"] = Step((), writes=("runs/resumed",), by_hand=interrupted)
    every_step["demo"] = Step(("demo --output runs/demo",), writes=("runs/demo",))
    every_step["eval"] = Step(
        (
            "eval runs/dpo --json",
            "eval runs/dpo --step 0",
            "eval runs/dpo --data held.jsonl --json --explain",
            "eval runs/dpo --data held.jsonl --generate 4 --samples 2 --max-new-tokens 8 --reward sentiment --also words"
            " --samples-output eval/samples.jsonl --output eval/figures.json --explain",
            "eval runs/dpo --text book.txt --reference none",
            "eval runs/lora --data held.jsonl --exact-kl --beta 0.5",
            "eval model --data held.jsonl --json",
            "eval runs/reward-model --data held.jsonl --json",
            "eval runs/rloo --json",
        ),
        needs=("dpo", "lora", "reward-model", "rloo"),
        writes=("eval", "runs/dpo/evaluations.jsonl", "runs/lora/evaluations.jsonl"),
    )
    every_step["compare"] = Step(
        (
            "compare runs/dpo runs/ipo --reward sentiment --also words --prompts 6 --samples 2 --max-new-tokens 8"
            " --output comparison",
            "compare runs/dpo runs/simpo --prompts 4 --max-new-tokens 8 --against runs/dpo --output comparison-2 --json",
            "compare runs/dpo runs/ipo --judge judge.py:longer --prompts 4 --max-new-tokens 8 --data held.jsonl"
            " --output comparison-3",
            "flags comparison",
        ),
        needs=("dpo", "ipo", "simpo"),
        writes=("comparison", "comparison-2", "comparison-3"),
    )
    every_step["flags"] = Step(
        (
            "flags runs/dpo",
            "flags runs/ppo --json",
            "flags --rules",
            "watch runs/dpo --once",
            "report runs/dpo runs/ppo",
        ),
        needs=("dpo", "ppo"),
    )
    every_step["sweep"] = Step(
        ("sweep sweep.yaml --plan", "sweep sweep.yaml", "sweep sweep.yaml --quiet", "watch runs/sweep --once"),
        writes=("runs/sweep",),
    )
    every_step["pipeline"] = Step(
        ("pipeline pipeline.yaml --plan", "pipeline pipeline.yaml", "pipeline pipeline.yaml --quiet"),
        writes=("runs/pipeline",),
    )
    every_step["export"] = Step(
        (
            *(f"export runs/dpo --to {form} --output export/{form}" for form in ("safetensors", "pt", "gguf")),
            *(f"export runs/lora --to {form} --output export/{form}" for form in ("merged", "adapter")),
            "export runs/dpo --to gguf --dtype q8_0 --output export/q8_0 --json",
            "export runs/dpo --to safetensors --dtype bf16 --max-shard-size 3MB --output export/sharded",
            "export runs/reward-model --to safetensors --output export/reward",
        ),
        needs=("dpo", "lora", "reward-model"),
        writes=("export",),
    )
    every_step["data"] = Step(
        (
            "data audit pairs.jsonl",
            "data audit dirty.jsonl --json",
            "data audit dpo.yaml --reward sentiment",
            "data formats",
            "data formats pairs",
            "data show dirty.jsonl",
            "data show pairs.jsonl --json",
            "data fix dirty.jsonl fixed/clean.jsonl --drop leakage --redact pii,secrets --against held.jsonl",
        ),
        writes=("fixed",),
        plain=True,
    )
    every_step["plan"] = Step(
        tuple(f"plan {n}.yaml --no-probe" for n in ("dpo", "lora", "ppo", "reward-model", "sft")),
        plain=True,
    )
    every_step["import"] = Step(
        (
            "import trl.yaml --from trl --method dpo",
            "import factory.yaml --from llama-factory",
            "import factory.yaml --output imported.yaml",
        ),
        writes=("imported.yaml",),
        plain=True,
    )
    every_step["init"] = Step(
        tuple(
            f"init --data {data} --model model --goal {goal} --run-folder runs/{goal} --output init/{goal}.yaml"
            for data, goal in (("pairs.jsonl", "dpo"), ("unpaired.jsonl", "kto"))
        ),
        writes=("init",),
        plain=True,
    )
    every_step["help"] = Step(("--help", "", *(f"{name} --help" for name in COMMANDS)), plain=True)
    every_step["losses"] = Step(("losses", "losses dpo", "losses --markdown", "losses dop"), plain=True)
    every_step["config"] = Step(("config", "config --markdown"), plain=True)
    every_step["mistakes"] = Step(
        (
            "trian dpo.yaml",
            "train nowhere.yaml",
            "train dpo.yaml train.lrr=1",
            "train dpo.yaml loss.betaa=1",
            "train dpo.yaml loss.beta=-1",
            "train dpo.yaml loss.name=dop",
            "train dpo.yaml model.path=nowhere output=runs/none",
            "train dpo.yaml data.path=nowhere.jsonl output=runs/none",
            "train dpo.yaml train.lr=0.5",
            "eval runs/nothing",
            "report runs",
            "export runs/dpo --to onnx",
            "data audit nowhere.jsonl",
        ),
        needs=("dpo",),
        plain=True,
    )
    return every_step


def merged(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """`base` overridden by `own`, section by section."""
    return {**base, **{k: {**base[k], **v} if isinstance(v, dict) and k in base else v for k, v in own.items()}}


def pairs(first: int, last: int) -> list[dict[str, Any]]:
    things = ("film", "story", "music", "ending", "cast", "script", "camera", "dialogue")
    good = ("was a joy from start to end", "is warm and honest", "made me smile more than once")
    bad = ("was dull and far too long", "makes no sense", "is the worst that I have seen")
    return [
        {
            "prompt": f"Review {i}: the {things[i % 8]}",
            "chosen": f" {good[i % 3]}, and the {things[(i + 3) % 8]} too.",
            "rejected": f" {bad[i % 3]}, like the {things[(i + 5) % 8]}.",
        }
        for i in range(first, last)
    ]


def write_inputs(folder: Path, model: Path) -> None:
    """Write everything that the commands read into `folder`."""
    shutil.copytree(model, folder / "model")
    rows = pairs(0, 48)
    write_jsonl(folder / "pairs.jsonl", rows)
    write_jsonl(folder / "held.jsonl", pairs(100, 112))
    unpaired = [
        {"prompt": r["prompt"], "completion": r[side], "label": side == "chosen"}
        for r in rows
        for side in ("chosen", "rejected")
    ]
    write_jsonl(folder / "unpaired.jsonl", unpaired)
    dirty = [
        *rows[:12],
        rows[0],
        {**rows[1], "chosen": rows[1]["rejected"], "rejected": rows[1]["chosen"]},
        {**rows[2], "prompt": rows[2]["prompt"] + "!"},
        {**rows[3], "chosen": " write to ann@example.org or call +1 202 555 0143"},
        {**rows[4], "chosen": " the key is AKIAIOSFODNN7EXAMPLE"},
        {**rows[5], "rejected": rows[5]["chosen"]},
        {**rows[6], "chosen": ""},
        pairs(100, 101)[0],
    ]
    write_jsonl(folder / "dirty.jsonl", dirty)
    (folder / "book.txt").write_text(
        "The film was a joy from start to end. The music is lovely, and so is the cast.\n" * 6
    )
    (folder / "judge.py").write_text(
        "def longer(prompts, first, second):\n"
        '    return ["a" if len(a) > len(b) else "b" if len(b) > len(a) else "tie" for a, b in zip(first, second)]\n'
    )
    for name, overrides in RUNS.items():
        write_yaml(folder / f"{name}.yaml", merged({**BASE, "output": f"runs/{name}"}, overrides))
    named = {"sweep": SWEEP, "pipeline": PIPELINE, "trl": TRL, "factory": LLAMA_FACTORY}
    for name, config in named.items():
        write_yaml(folder / f"{name}.yaml", config)
    for name in ("eval", "init", "fixed", "export"):
        (folder / name).mkdir()


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))


def write_yaml(path: Path, config: dict[str, Any]) -> None:
    path.write_text(json.dumps(config, indent=1) + "\n")  # JSON is YAML


# ---------------------------------------------------------------------------------------------------------------------
# recording

TEXT = (".json", ".jsonl", ".yaml", ".yml", ".txt", ".md", ".csv", ".jinja")
NOT_KEPT = ("perf.jsonl", ".lock", "report.html", "log.txt")  # timings, or a page that is expected to change
MASKED_KEYS = re.compile(
    r"(^|[/_.])(seconds|started|ended|finished|time|date|versions?|penchant_version|transformers_version|torch|transformers|peft|safetensors|tokenizers|numpy|hardware|host"
    r"|pid|memory|peak_memory_gb|\w*per_second|python|platform|hours|minutes|total_seconds|rss|free|bytes_free)$"
)
NUMBER = r"\d[\d,]*(?:\.\d+)?"
MASKS = (
    (re.compile(rf"{NUMBER} ?(?:ms|s|sec|seconds?|min|minutes?|h|hours?)\b(?: \d+ ?(?:s|min)\b)?"), "<time>"),
    (re.compile(rf"{NUMBER}k? (?:tokens?|trees?|rows?|tok) ?(?:/ ?s|per second|a second)"), "<speed>"),
    (re.compile(rf"{NUMBER} ?(?:GB|GiB|MB|MiB)\b"), "<memory>"),
    (re.compile(r"\b\d{1,2}:\d{2}(?::\d{2})?\b"), "<time>"),
)
PROGRESS = re.compile(r"^(?:step \d+/\d+ |\s+\d+/\d+, ).*\n", re.MULTILINE)  # printed at time intervals
DATES = re.compile(r"\b20\d\d-\d\d-\d\d(?:[T ]\d\d:\d\d(?::\d\d(?:\.\d+)?)?(?:Z|[+-]\d\d:?\d\d)?)?")


class Work:
    """The folder with all inputs in which the commands run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("PENCHANT_", "HF_"))},
            **{"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "COLUMNS": "120"},
            **{"NO_COLOR": "1", "TERM": "dumb", "PYTHONHASHSEED": "0"},
        }
        if "PYTHONPATH" in os.environ:
            self.env["PYTHONPATH"] = os.pathsep.join(
                str(Path(p).resolve()) for p in os.environ["PYTHONPATH"].split(os.pathsep)
            )
        command = [sys.executable, "-c", "import penchant; print(penchant.__file__, penchant.__version__)"]
        location = subprocess.run(
            command, env=self.env, cwd=folder, capture_output=True, text=True, check=True
        ).stdout.split()
        self.package, self.version = Path(location[0]).parent, location[1]

    def environment(self, step: str) -> dict[str, str]:
        """Environment of a step, with its own cache so that it does not depend on earlier steps."""
        return {**self.env, "PENCHANT_CACHE": str(self.folder / "cache" / step)}

    def run(self, command: str, step: str, plain: bool = False) -> str:
        """Run a command and return its exit code, stdout and stderr, masked."""
        full = [sys.executable, "-m", "penchant", *command.split()]
        process = subprocess.run(
            full, cwd=self.folder, env=self.environment(step), capture_output=True, text=True, stdin=subprocess.DEVNULL
        )
        parts = (
            f"$ penchant {command}\nexit code {process.returncode}",
            "--- stdout",
            process.stdout,
            "--- stderr",
            process.stderr,
        )
        return self.masked("\n".join(p.rstrip("\n") for p in parts) + "\n", plain)

    def masked(self, text: str, plain: bool = False) -> str:
        text = text.replace(str(self.folder.resolve()), "<work>").replace(str(self.folder), "<work>")
        text = text.replace(str(self.package), "<penchant>").replace(self.version, "<version>")
        text = text.replace(sys.executable, "<python>")
        text = DATES.sub("<date>", PROGRESS.sub("", text))
        for pattern, mask in () if plain else MASKS:
            text = pattern.sub(mask, text)
        return "\n".join(line.rstrip() for line in text.split("\n"))

    def read(self, path: Path) -> str:
        """Read a text file and mask it. In JSON, the values of keys for times, versions and the like are masked too."""
        text = path.read_text(encoding="utf-8", errors="replace")
        if path.suffix not in (".json", ".jsonl"):
            return self.masked(text, plain=True)
        try:
            values = [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else [json.loads(text)]
        except ValueError:
            return self.masked(text, plain=True)
        indent = 1 if path.suffix == ".json" else None
        return self.masked("".join(json.dumps(mask_keys(v), indent=indent) + "\n" for v in values), plain=True)


def mask_keys(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: "<masked>" if MASKED_KEYS.search(k) else mask_keys(v) for k, v in value.items()}
    return [mask_keys(v) for v in value] if isinstance(value, list) else value


def record(folder: Path, names: list[str], jobs: int) -> None:
    """Run the named steps and those they need, and record each in a folder below `folder`."""
    all_steps = steps()
    to_record = dict.fromkeys(n for name in names for n in (*all_steps[name].needs, name))
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="penchant-oracle-") as temporary:
        work = Work(Path(temporary))
        write_inputs(work.folder, next(work.package.rglob("model.safetensors")).parent)
        print(f"recording {work.package} into {folder}", flush=True)

        def run_one(name: str) -> None:
            began = time.monotonic()
            record_step(work, all_steps[name], folder / name)
            print(f"{name:<18} {time.monotonic() - began:6.1f} s", flush=True)

        # runs are independent; the steps that compare, export or evaluate them come afterwards
        independent = [n for n in to_record if not all_steps[n].needs]
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(run_one, independent))
        for name in to_record:
            if name not in independent:
                run_one(name)


def record_step(work: Work, step: Step, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if step.by_hand is not None:
        for name, text in step.by_hand(work):
            (folder / name).write_text(text)
    for i, command in enumerate(step.commands):
        (folder / f"{i:02d}.txt").write_text(work.run(command, folder.name, step.plain))
    sums = []
    for path in sorted(
        p
        for w in step.writes
        for p in ((work.folder / w).rglob("*") if (work.folder / w).is_dir() else [work.folder / w])
    ):
        inside = path.relative_to(work.folder)
        if not path.is_file() or path.name in NOT_KEPT:
            continue
        if path.name == "manifest.json" and "checkpoints" in inside.parts:
            continue  # only holds checksums of neighboring files, which are recorded themselves
        if path.suffix in TEXT:
            target = folder / "files" / inside
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(work.read(path))
        else:
            sums.append(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {inside}\n")
    (folder / "sha256.txt").write_text("".join(sums))


# ---------------------------------------------------------------------------------------------------------------------
# comparing


def compare(a: Path, b: Path, only: list[str] | None, lines: int) -> int:
    """Print the differences between two recordings, including steps that only one of them has. Returns the exit code."""
    different = 0
    step_names = [{p.name for p in folder.iterdir() if p.is_dir()} for folder in (a, b)]
    for name in sorted(step_names[0] | step_names[1]):
        if only is not None and name not in only:
            continue
        if name not in step_names[0] or name not in step_names[1]:
            print(f"{name}: only in {a if name in step_names[0] else b}")
            different += only is not None
            continue
        files = sorted({p.relative_to(f / name) for f in (a, b) for p in (f / name).rglob("*") if p.is_file()})
        for file in files:
            one, other = a / name / file, b / name / file
            if not one.exists() or not other.exists():
                print(f"{name}/{file}: only in {a if one.exists() else b}")
                different += 1
            elif one.read_bytes() != other.read_bytes():
                different += 1
                texts = (p.read_text().splitlines() for p in (one, other))
                diff = list(difflib.unified_diff(*texts, f"{a}/{name}/{file}", f"{b}/{name}/{file}", lineterm="", n=0))
                print("\n".join(line[:400] for line in diff[:lines]))
                if len(diff) > lines:
                    print(f"... {len(diff) - lines} more lines")
    print(f"{different} files differ" if different else "no differences")
    return 1 if different else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    recording = verbs.add_parser("record")
    recording.add_argument("folder", type=Path)
    recording.add_argument(
        "--jobs", type=int, default=1, help="number of independent steps to run at a time (default: 1)"
    )
    comparing = verbs.add_parser("compare")
    comparing.add_argument("a", type=Path)
    comparing.add_argument("b", type=Path)
    comparing.add_argument(
        "--lines", type=int, default=12, help="lines to print for each file that differs (default: 12)"
    )
    for verb in (recording, comparing):
        verb.add_argument("--only", help=f"comma-separated list of steps, out of {', '.join(steps())}")
    args = parser.parse_args()
    names = args.only.split(",") if args.only else None
    unknown = [n for n in names or [] if n not in steps()]
    if unknown:
        parser.error(f"no such step: {', '.join(unknown)}")
    if args.verb == "compare":
        return compare(args.a, args.b, names, args.lines)
    record(args.folder, names or list(steps()), args.jobs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
