"""The runs of a comparison: grouping by setting, common start, training prompts, budgets, and readings of the test set."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from penchant.base.files import file_sha256
from penchant.base.machine import why_not
from penchant.base.text import counted
from penchant.compare.models import trained_prompts
from penchant.config import RunConfig, load_config, result_settings, with_absolute_paths
from penchant.errors import CheckpointError, ConfigError, DataError, ModelError, PenchantError
from penchant.models.load import cast_parameters, load_causal_model, resolve_device, source_sha256
from penchant.models.lora import is_adapter
from penchant.models.merge import model_sha256
from penchant.runfolder import CONFIG, IDENTITY, MANIFEST, PIPELINE, check_intact
from penchant.runfolder.read import read_folder
from penchant.runs import Run
from penchant.runs.find import START, Source, check_config, trained_source
from penchant.runs.state import model_folder

# ---- Runs of a comparison: reading them, grouping seeds of one setting, and their common start ----


@dataclass(frozen=True)
class TrainedRun:
    """A run as read from its folder.

    Args:
        manifest: `manifest.json`; contents: SHA-256 of the files behind its rewards; model: model folder of the checkpoint to compare.
    """

    name: str
    folder: Path
    config: RunConfig
    manifest: Mapping[str, Any]
    contents: Mapping[str, Any]
    model: Path

    @property
    def step(self) -> int:
        return int(self.model.parent.name.removeprefix("step-"))

    @property
    def seed(self) -> int:
        return self.config.train.seed

    @property
    def setting(self) -> str:
        """Everything that a run's result depends on except its seed, as JSON; equal for runs of one setting."""
        values = result_settings(self.config)
        values["train"].pop("seed")
        data = self.manifest["data"]
        fingerprints = {name: data[name]["fingerprint"] for name in ("train", "heldout") if name in data}
        start = self.manifest["model"]["sha256"] if self.config.model.init == "pretrained" else None
        return json.dumps([values, fingerprints, start, dict(self.contents)], sort_keys=True)

    @cached_property
    def data(self) -> Run:
        """The run built from its config, for its rows, tokens and precision; on device ``auto`` if its own is not available."""
        model = self.config.model
        if model.device != "auto" and why_not(model.device):
            model = model.model_copy(update={"device": "auto", "attention": "auto"})
        return Run(self.config.model_copy(update={"model": model}), quiet=True)

    @property
    def source(self) -> Source:
        """The model to compare."""
        return trained_source(self.name, self.model, self.config)


def read_runs(paths: Sequence[str | Path], step: str | None) -> list[TrainedRun]:
    """Read runs from their folders. Each is named after its folder, with as many parents as needed to be unique.

    Raises:
        CheckpointError: not a run, a pipeline's folder, no such checkpoint, or the same run twice. ConfigError: a reward model.
    """
    folders = [Path(p).expanduser().resolve() for p in paths]
    for i, folder in enumerate(folders):
        if folder in folders[:i]:
            raise CheckpointError(str(paths[i]), "is given twice", "give each run once")
    return [_read(f, name, step) for f, name in zip(folders, _names(folders), strict=True)]


def _names(folders: Sequence[Path]) -> list[str]:
    def tail(folder: Path, parts: int) -> str:
        return "/".join(folder.parts[-parts:])

    names = []
    for folder in folders:
        others = [f for f in folders if f != folder]
        parts = 1
        while tail(folder, parts) in {START, *(tail(o, parts) for o in others)} and parts < len(folder.parts):
            parts += 1
        names.append(tail(folder, parts))
    return names


def _read(folder: Path, name: str, step: str | None) -> TrainedRun:
    missing = [file for file in (CONFIG, MANIFEST) if not (folder / file).exists()]
    if len(missing) == 1:
        raise CheckpointError(str(folder), f"has no {missing[0]}", "restore it, or train the run again")
    if missing:
        how = "give a folder that penchant train has written"
        if (folder / PIPELINE).exists():
            stages = sorted(p.parent.name for p in folder.glob(f"*/{MANIFEST}"))
            how = f"it is a pipeline: give its stages, such as {folder / stages[0] if stages else 'PIPELINE/STAGE'}"
        if (folder / "config.json").exists() or is_adapter(folder):
            how = f"it is a model: a run's start is compared with it anyway, and penchant eval {folder} --data FILE has its figures"
        raise CheckpointError(str(folder), "is not a run" if folder.is_dir() else "no such run", how)
    check_config(folder / CONFIG)
    config = load_config(folder / CONFIG)
    if config.method.learns_reward:
        raise ConfigError(str(folder), "is a reward model, which writes nothing", "leave it out; it can be --reward")
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        _ = manifest["data"]["train"]["fingerprint"], manifest["model"]["sha256"], manifest["tokenizer_sha256"]
    except TypeError as error:
        raise CheckpointError(str(folder / MANIFEST), "is not a run's manifest", "train the run again") from error
    except (ValueError, KeyError) as error:
        raise CheckpointError(str(folder / MANIFEST), f"cannot be read ({error})", "train the run again") from error
    for file in (MANIFEST, IDENTITY):
        check_intact(folder / file)
    contents = {k: v for k, v in read_folder(folder).identity.items() if k.startswith("content of reward")}
    return TrainedRun(name, folder, with_absolute_paths(config), manifest, contents, model_folder(folder, step))


def group_by_setting(runs: Sequence[TrainedRun]) -> dict[str, list[TrainedRun]]:
    """Group runs that differ only in their seed into settings, each named after the shortest name of its runs.

    Raises:
        CheckpointError: two runs of one setting have the same seed.
    """
    groups: dict[str, list[TrainedRun]] = {}
    for run in runs:
        groups.setdefault(run.setting, []).append(run)
    for group in groups.values():
        seeds: dict[int, str] = {}
        for run in group:
            if run.seed in seeds:
                what = f"has the setting and seed of {seeds[run.seed]} (seed {run.seed}), so it adds nothing"
                raise CheckpointError(str(run.folder), what, "give one of them")
            seeds[run.seed] = run.name
    return {min((r.name for r in group), key=len): group for group in groups.values()}


# ---- the common start ----


def check_tokenizers(runs: Sequence[TrainedRun]) -> None:
    """Raise a ConfigError if the runs have different tokenizers."""
    first = runs[0]
    for run in runs[1:]:
        if run.manifest["tokenizer_sha256"] != first.manifest["tokenizer_sha256"]:
            raise ConfigError(
                "compare",
                f"{run.name} and {first.name} have different tokenizers, so their tokens, KL and likelihoods cannot be compared",
                "compare runs that have the same one",
            )


def common_start(runs: Sequence[TrainedRun]) -> Source:
    """Return the model that all runs start from, after checking that it has not changed.

    Raises:
        ConfigError: they start from different weights. ModelError: the start has changed since.
    """
    first = runs[0]
    dtype_of = {r.name: r.manifest["hardware"]["dtype"] for r in runs}
    starts: dict[tuple[str, str], TrainedRun] = {}
    for run in runs:
        starts.setdefault((run.manifest["model"]["sha256"], dtype_of[run.name]), run)
    for (sha256, dtype), run in starts.items():
        # in another precision the same weights have a different sum; the check below compares them in fp32
        if dtype == dtype_of[first.name] and sha256 != first.manifest["model"]["sha256"]:
            raise _different_start(first, run)
    fp32_sha256 = {run.name: start_sha256(run) for run in starts.values()}
    for name, sha256 in fp32_sha256.items():
        if sha256 != fp32_sha256[first.name]:
            raise _different_start(first, next(r for r in runs if r.name == name))
    adapters = {run.name: None if (a := run.config.model.adapter) is None else model_sha256(Path(a)) for run in runs}
    for name, adapter in adapters.items():
        if adapter != adapters[first.name]:
            raise _different_start(first, next(r for r in runs if r.name == name))
    model = first.data.config.model
    return Source(START, model, adapter=None if model.adapter is None else Path(model.adapter), seed=first.seed)


def _different_start(one: TrainedRun, other: TrainedRun) -> ConfigError:
    return ConfigError(
        "compare",
        f"{one.name} and {other.name} start from different weights, so there is no common start to compare with",
        f"give --against RUN, for instance --against {one.folder}: all others are compared with that one",
    )


def start_sha256(run: TrainedRun) -> str:
    """SHA-256 in fp32 of the weights that a run starts from; ModelError if they have changed."""
    config = run.data.config.model
    model = load_causal_model(config, resolve_device("cpu"), run.seed)
    fp32_sha256 = source_sha256(config, model)
    cast_parameters(model, getattr(torch, run.manifest["hardware"]["dtype"]))
    if source_sha256(config, model) != run.manifest["model"]["sha256"]:
        raise ModelError(config.path, f"is no longer the model that {run.name} started from", "restore it")
    return fp32_sha256


def check_bases(runs: Sequence[TrainedRun]) -> None:
    """Raise a ModelError if the base model of an adapter has changed."""
    seen = set()
    for run in runs:
        key = (run.config.model.path, run.config.model.revision, run.manifest["model"]["sha256"])
        if is_adapter(run.model) and key not in seen:
            seen.add(key)
            start_sha256(run)


# ---- training prompts ----


def lineage(run: TrainedRun) -> list[RunConfig]:
    """Configs of the chain of runs that a run started from, nearest first, up to a model that no run made."""
    configs: list[RunConfig] = []
    seen = {run.folder}
    path = run.config.model.adapter or run.config.model.path
    while (folder := _find_run(Path(path))) is not None and folder not in seen:
        seen.add(folder)
        configs.append(with_absolute_paths(load_config(folder / CONFIG)))
        path = configs[-1].model.adapter or configs[-1].model.path
    return configs


def _find_run(model: Path) -> Path | None:
    """The run that a model folder belongs to, ``RUN/checkpoints/step-N/model`` or ``RUN/merged/step-N``; None if there is none."""
    for parents in (3, 2):
        folder = model.parents[parents - 1] if len(model.parents) >= parents else None
        if folder is not None and (folder / CONFIG).exists():
            return folder
    return None


def all_trained_prompts(runs: Sequence[TrainedRun], *, lenient: bool) -> tuple[set[str], list[str]]:
    """Keys of the prompts that the runs and their ancestors were trained on, and notes on data that could not be read.

    Args:
        lenient: report a run's missing or changed rows in a note rather than raise; rows of its ancestors are always reported.

    Raises:
        CheckpointError: the data is not what a run was trained on.
    """
    trained: set[str] = set()
    notes: list[str] = []
    for run in runs:
        try:
            _check_data(run)
            trained |= trained_prompts(run.data)
        except PenchantError as error:
            if not lenient:
                raise
            notes.append(f"The training data of {run.name} cannot be read, so its prompts are not left out ({error}).")
        for config in lineage(run):
            try:
                trained |= trained_prompts(Run(config, quiet=True))
            except PenchantError as error:
                notes.append(
                    f"The training data of the start of {run.name} cannot be read, so its prompts are not left out ({error})."
                )
    return trained, list(dict.fromkeys(notes))


def _check_data(run: TrainedRun) -> None:
    fingerprint = run.manifest["data"].get("train split", run.manifest["data"]["train"])["fingerprint"]
    if run.data.rows.datasets[0].fingerprint != fingerprint:
        what = f"no longer holds the rows that {run.name} was trained on, so it is unknown which rows are held out"
        raise CheckpointError(str(run.config.data.path), what, "restore the file, or give --data with other rows")


# ---- Training budgets from a run's own files: steps, rows, completions, tokens, learning rates, data; and notes on differences ----

TOLERANCE = 0.05  # relative differences up to this count as equal

NUMBERS = {  # field: in words
    "steps": "Optimizer steps",
    "rows": "Rows seen in training",
    "completions": "Completions written in training",
    "tokens": "Tokens computed in training",
    "peak_lr": "Peak learning rates",
    "warmup": "Shares of the steps that warm up",
    "min_lr": "Last learning rates, as a share of the peak,",
    "trainable": "Trained parameters",
}
WORDS = {"schedule": "Learning-rate schedules", "template": "Prompt templates", "dtype": "Precisions"}


Budget = Mapping[str, Any]  # by the names of `NUMBERS` and `WORDS`, and `finished`


def training_budget(run: TrainedRun, up_to: int | None = None) -> Budget:
    """A run's training budget, in total or up to a step.

    Rows (prompts of an online method) count every time they are used; the tokens of a shared prompt count once.
    """
    lines = [line for line in read_folder(run.folder).metrics if line.get("kind") == "train"]
    lines = [line for line in lines if up_to is None or line["step"] <= up_to]
    last: Mapping[str, Any] = lines[-1] if lines else {"step": 0, "epoch": 0.0, "tokens": 0}
    data = run.manifest["data"]
    split_rows = data["train split"]["rows"] if "train split" in data else data["train"]["accepted"]
    rows = last["epoch"] * split_rows
    rollouts = run.config.method.rollouts
    t = run.config.train
    return {
        "steps": float(last["step"]),
        "rows": float(round(rows)),
        "completions": 0.0 if rollouts is None else float(round(rows * rollouts.samples)),
        "tokens": float(last["tokens"]),
        "peak_lr": max((line["lr"] for line in lines if line.get("lr")), default=0.0),
        "warmup": t.warmup_fraction,
        "min_lr": t.min_lr_fraction,
        "trainable": float(run.manifest["model"]["trainable_parameters"]),
        "schedule": t.schedule,
        "template": run.config.data.template,
        "dtype": run.manifest["hardware"]["dtype"],
        "finished": run.manifest["status"] == "finished",
    }


def budget_sentences(budgets: Mapping[str, Sequence[Budget]]) -> list[str]:
    """One sentence for each difference: numbers by more than 5% between settings (means over seeds) or within one, words at all."""
    sentences = []
    for field, words in NUMBERS.items():
        means = {name: float(np.mean([b[field] for b in by_seed])) for name, by_seed in budgets.items()}
        if _differs(list(means.values())):
            sentences.append(f"{words} differ: {_join_named({n: _format_number(v) for n, v in means.items()})}.")
        for name, by_seed in budgets.items():
            values = [b[field] for b in by_seed]
            if _differs(values):
                sentences.append(f"{words} differ among the seeds of {name}: {', '.join(map(_format_number, values))}.")
    for field, words in WORDS.items():
        values_by_name = {
            name: ", ".join(dict.fromkeys(b[field] for b in by_seed)) for name, by_seed in budgets.items()
        }
        if len(set(values_by_name.values())) > 1:
            sentences.append(f"{words} differ: {_join_named(values_by_name)}.")
    return sentences


def data_sentences(settings: Mapping[str, Sequence[TrainedRun]]) -> list[str]:
    """A sentence for each setting trained on other rows than the first; the same prompts in another shape do not count."""
    first, *others = settings
    sentences = []
    for name in others:
        one, other = settings[first][0], settings[name][0]
        if one.manifest["data"]["train"]["fingerprint"] == other.manifest["data"]["train"]["fingerprint"]:
            continue
        try:
            a, b = (trained_prompts(r.data) for r in (one, other))
            shapes = {r.data.rows.datasets[0].kind for r in (one, other)}
        except PenchantError:
            sentences.append(f"The data of {name} is not that of {first}.")
            continue
        if a != b:
            sentences.append(
                f"The data differs: {first} was trained on {counted(len(a), 'prompt')}, {name} on {len(b):,}, and {len(a & b):,} are the same."
            )
        elif len(shapes) == 1:
            sentences.append(
                f"The data differs: {first} and {name} were trained on the same prompts with other answers."
            )
    return sentences


def unfinished_notes(budgets: Mapping[str, Budget]) -> list[str]:
    """A sentence for each run that did not finish."""
    return [
        f"{name} did not finish: it stopped at step {b['steps']:.0f}."
        for name, b in budgets.items()
        if not b["finished"]
    ]


def _differs(values: Sequence[float]) -> bool:
    return max(values) > (1 + TOLERANCE) * min(values)


def _format_number(value: float) -> str:
    return f"{value:,.0f}" if value == round(value) else f"{value:.3g}"


def _join_named(values: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


# ---- Readings of a test set: each is recorded next to the file, and later comparisons report it ----
# A test set gives an unbiased result only once: after changing something because of it, the next reading is a selection.

READINGS = "test_readings.jsonl"


@dataclass(frozen=True, slots=True)
class Readings:
    """The log of readings of a test file.

    Args:
        file: absolute; fingerprint: SHA-256 of its rows, independent of the file's name and layout.
    """

    file: Path
    fingerprint: str

    @property
    def log(self) -> Path:
        """Path of the log: in the folder of the file, so that every comparison on it finds it."""
        return self.file.parent / READINGS

    def earlier(self) -> list[dict[str, Any]]:
        """Earlier readings of the same rows or of a file with the same name, oldest first."""
        if not self.log.exists():
            return []
        readings = []
        for number, line in enumerate(self.log.read_text(encoding="utf-8").split("\n"), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                _ = row["time"], row["runs"], row["fingerprint"], row["file"]
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(f"{self.log}:{number}", "is not a reading of a test set", "restore the line") from error
            if row["fingerprint"] == self.fingerprint or row["file"] == self.file.name:
                readings.append(row)
        return readings

    def check_writable(self) -> None:
        """Raise a DataError if the log cannot be written, because later comparisons would not know of this reading."""
        try:
            existed = self.log.exists()
            with self.log.open("ab"):
                pass
            if not existed:  # no reading has happened yet
                self.log.unlink()
        except OSError as error:
            what = f"cannot be written ({error.strerror}), so nobody would know that the test set was read"
            raise DataError(str(self.log), what, "put the file into a folder that you can write") from error

    def record(self, runs: Sequence[str], details: Mapping[str, Any]) -> None:
        """Append a reading; it is on disk when this returns."""
        row = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "file": self.file.name,
            "sha256": file_sha256(self.file),
            "fingerprint": self.fingerprint,
            "runs": list(runs),
            **details,
        }
        with self.log.open("ab") as out:
            out.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
            out.flush()
            os.fsync(out.fileno())

    def sentence(self, earlier: Sequence[Mapping[str, Any]]) -> str:
        """Say how often the test set was read before."""
        if not earlier:
            return f"This test set is read for the first time; the reading is recorded in {self.log}."
        times = "once" if len(earlier) == 1 else f"{len(earlier)} times"
        first, last = earlier[0], earlier[-1]
        text = (
            f"This test set has been read {times} before, first on {first['time'][:10]} for {', '.join(first['runs'])}"
        )
        if len(earlier) > 1:
            text += f", last on {last['time'][:10]} for {', '.join(last['runs'])}"
        other_rows = sum(row["fingerprint"] != self.fingerprint for row in earlier)
        suffix = f" ({other_rows} of them with other rows in the file)" if other_rows else ""
        return f"{text}{suffix}: what is chosen by it is no longer tested by it."
