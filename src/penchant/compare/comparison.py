"""`penchant compare`: evaluate several runs on the same prompts and decide which is better."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from penchant.base.files import PAGE, check_output, writing
from penchant.base.text import counted
from penchant.compare.models import (
    NO_OUTCOME,
    HeldOut,
    Sampling,
    compare_sources,
    comparison_json,
    exclude_prompts,
    format_comparison,
    make_setting,
    tree_key,
    write_files,
)
from penchant.compare.runs import (
    Readings,
    TrainedRun,
    all_trained_prompts,
    budget_sentences,
    check_bases,
    check_tokenizers,
    common_start,
    data_sentences,
    group_by_setting,
    read_runs,
    training_budget,
    unfinished_notes,
)
from penchant.data.load import Dataset, load_preferences
from penchant.errors import ConfigError, DataError
from penchant.flags import comparison_flags, summary
from penchant.flags.rule import Flag
from penchant.judges import ENDPOINT_FLAGS, JudgeOptions, PairJudge, load_judge
from penchant.requests import HUMANS, CompareRequest
from penchant.rewards.functions import reads_columns
from penchant.runfolder import COMPARISON, COMPARISON_ROWS, REPORT, damage_notes, make_folder
from penchant.runfolder.read import read_folder
from penchant.runs.find import Source
from penchant.runs.identity import changed_since
from penchant.runs.state import check_reward, reward_hashes, reward_terms
from penchant.training.checkpoint import checkpoint_state, latest_checkpoint
from penchant.training.console import console
from penchant.training.steps import is_due

__all__ = ["RunComparison", "compare_runs"]


# ---- `penchant compare`: runs against their start and each other, on rows that none of them was trained on ----

MAX_NAMED = 4  # maximum settings in the name of the default folder


@dataclass(frozen=True, slots=True)
class RunComparison:
    """A comparison: its folder, and its figures as written to `comparison.json`."""

    folder: Path
    figures: dict[str, Any]

    def to_text(self) -> str:
        """Format heading, notes, flags, tables and, at the end, the verdict."""
        flags = summary([Flag.from_json(f) for f in self.figures["flags"]])
        return format_comparison(
            self.figures, self.figures["heading"], [*self.figures["notes"], *([flags] if flags else [])]
        )


@dataclass
class RunComparer:
    """One comparison of runs. All checks happen before any model generates.

    Args:
        paths: run folders; question: the options of the comparison; quiet: show no progress.

    Raises:
        CheckpointError, ConfigError, DataError, ModelError, RewardError: the user can fix it.
    """

    paths: Sequence[str | Path]
    question: CompareRequest
    quiet: bool = False
    notes: list[str] = field(default_factory=list)

    # ---- runs -----------------------------------------------------------------------------------------------------

    @cached_property
    def all_runs(self) -> list[TrainedRun]:
        """All runs; `against` is appended if it is not among them."""
        paths = [*self.paths]
        if self.question.against is not None and self._against_path not in [_resolve(p) for p in paths]:
            paths.append(self.question.against)
        return read_runs(paths, self.question.step)

    @property
    def _against_path(self) -> Path:
        assert self.question.against is not None
        return _resolve(self.question.against)

    @cached_property
    def against(self) -> TrainedRun | None:
        if self.question.against is None:
            return None
        return next(r for r in self.all_runs if r.folder == self._against_path)

    @cached_property
    def settings(self) -> dict[str, list[TrainedRun]]:
        """The settings to compare, without `against`, each with its runs by seed."""
        others = [r for r in self.all_runs if r is not self.against]
        if not others:
            raise ConfigError("compare", "there is nothing to compare with --against", "give another run")
        return group_by_setting(others)

    @cached_property
    def first(self) -> Source:
        """The model that all settings are compared with."""
        return common_start(self.all_runs) if self.against is None else self.against.source

    # ---- rows -----------------------------------------------------------------------------------------------------

    @cached_property
    def readers(self) -> list[TrainedRun]:
        """Runs whose config may be used to read rows; runs on pairs come first, because pairs also give likelihood figures."""
        return sorted(self.all_runs, key=lambda r: r.data.method.signal != "pairs")

    @cached_property
    def held_out(self) -> HeldOut:
        """Rows with prompts that no run, nor any run it started from, was trained on."""
        test = self.question.data is not None
        for run in self.all_runs:  # before any of them reads its rows
            run.data.rows.keep_columns |= self._reads_columns
        trained, notes = all_trained_prompts(self.all_runs, lenient=test)
        self.notes += notes + [note for run in self.all_runs for note in changed_since(run.folder, run.config)]
        self.notes += [note for run in self.all_runs for note in damage_notes(run.folder)]
        held_out = exclude_prompts(self.readers[0].name, self.test_rows, trained) if test else self._validation(trained)
        if not held_out.rows.trees:
            raise DataError(
                str(self.question.data) if test else "compare",
                "every prompt there is one that a compared run was trained on",
                "runs with other seeds hold out other rows: set data.eval_path in all of them, or give --data with rows of their own",
            )
        if held_out.leaked:
            self.notes.append(
                f"Left out: {counted(held_out.leaked, 'row')} whose prompts a compared run was trained on."
            )
        return held_out

    def _validation(self, trained: set[str]) -> HeldOut:
        held_out = None
        for run in self.readers:
            rows = run.data.rows.datasets[1]
            if rows is None or rows.kind == "text":
                continue
            held_out = exclude_prompts(run.name, rows, trained)
            if held_out.rows.trees:
                return held_out
        if held_out is None:
            raise DataError("compare", "no run holds out rows with prompts", "give --data with a file of them")
        return held_out

    @cached_property
    def _reads_columns(self) -> bool:
        return any(reads_columns(reward) for reward in (self.question.reward, *self.question.also))

    @cached_property
    def test_rows(self) -> Dataset:
        """The rows of `--data`, read with the data settings of the first reader."""
        file, data = _resolve(str(self.question.data)), self.readers[0].config.data
        how = data.reading(pictures=self._is_vision) | {"limit": None}
        rollouts = self._reads_columns and self.readers[0].config.method.signal == "prompts"
        rows = load_preferences(str(file), keep_columns=self._reads_columns, rollouts=rollouts, **how)
        if rows.kind == "text":
            raise DataError(str(file), "holds texts without prompts", "give rows with prompts")
        if data.weight is not None:
            self.notes.append(
                f"Every row of {file.name} counts once: data.weight is for training and its held-out rows."
            )
        if rows.quarantined:
            self.notes.append(f"Kept aside: {counted(len(rows.quarantined), 'bad row')} of {file.name}.")
        return rows

    def _open_readings(self) -> Readings | None:
        if self.question.data is None:
            return None
        readings = Readings(_resolve(str(self.question.data)), self.test_rows.fingerprint)
        readings.check_writable()
        return readings

    # ---- notes next to the figures --------------------------------------------------------------------------------

    def _budget_notes(self) -> tuple[list[str], dict[str, Any]]:
        step = self.question.step
        up_to = int(step) if step is not None and step.isdigit() else None
        budgets = {r.name: training_budget(r, up_to) for r in self.all_runs}
        by_setting = {name: [budgets[r.name] for r in runs] for name, runs in self.settings.items()}
        compared = {r.name for runs in self.settings.values() for r in runs}  # all but `against`
        by_setting |= {r.name: [budgets[r.name]] for r in self.all_runs if r.name not in compared}
        notes = budget_sentences(by_setting) + data_sentences(self.settings)
        notes += [] if up_to is not None else unfinished_notes(budgets)
        return notes, {name: dict(b) for name, b in budgets.items()}

    def _selection_notes(self) -> list[str]:
        """Notes on checkpoints chosen by held-out rows: on such rows they look better than they are."""
        selected = [r.name for r in self.all_runs if _was_selected(r)]
        if self.question.step == "last" or not selected:
            return []
        if self.question.data is None:
            return [
                f"The checkpoints of {', '.join(selected)} were chosen by held-out rows such as these; use --data TEST for an unbiased result."
            ]
        keys = {tree_key(t) for r in self.all_runs if (rows := r.data.rows.datasets[1]) is not None for t in rows.trees}
        shared = sum(tree_key(t) in keys for t in self.held_out.rows.trees)
        return [f"{shared:,} of the test rows are held-out rows by which checkpoints were chosen."] if shared else []

    @cached_property
    def judge(self) -> PairJudge | None:
        options = _judge_options(self.question)
        return None if options is None else load_judge(options)

    @property
    def sampling(self) -> Sampling:
        q = self.question
        limits = (0, 0) if self._is_vision else (q.samples, q.max_new_tokens)  # no answers are written about pictures
        return Sampling(q.prompts, *limits, q.seed)

    @property
    def _is_vision(self) -> bool:
        return self.all_runs[0].config.model.sees

    def _check_pictures(self) -> None:
        other = next((r.name for r in self.all_runs if r.config.model.sees != self._is_vision), None)
        if other is not None:
            what = f"one of {self.all_runs[0].name} and {other} reads pictures, the other reads text alone"
            raise ConfigError("compare", what, "compare runs on the same rows")
        for name in ("reward", "judge"):
            if self._is_vision and getattr(self.question, name) is not None:
                how = "leave it out: the likelihood of given answers is compared"
                raise ConfigError(
                    f"--{name}", "scores generated answers, but with pictures no answers are generated", how
                )

    def _reward_notes(self) -> list[str]:
        """Notes on runs that were trained on a reward they are judged by."""
        terms = {"this reward": reward_terms(self.question.reward), **{name: [name] for name in self.question.also}}
        notes = []
        for label, names in terms.items():
            judge_names = set(map(_absolute_name, names))
            trained = [
                r.name
                for r in self.all_runs
                if r.config.reward is not None and judge_names & set(map(_absolute_name, r.config.reward.terms))
            ]
            notes += [f"Trained to raise {label}: {', '.join(trained)}."] if trained else []
        return notes

    # ---- running --------------------------------------------------------------------------------------------------

    def run(self) -> RunComparison:
        """Run the comparison, write both files, and record the reading of the test set."""
        self._check_pictures()
        check_tokenizers(self.all_runs)
        for reward in (self.question.reward, *self.question.also):
            check_reward(reward)
        if self.judge is not None:
            note = self.judge.check()
            self.notes += [note] if note else []
        settings, first = self.settings, self.first
        check_bases(self.all_runs)
        held_out = self.held_out
        readings = self._open_readings()
        folder = self._make_folder()
        differences, budgets = self._budget_notes()
        notes = [*self.notes, *self._selection_notes(), *self._reward_notes()]
        owner = next(r for r in self.all_runs if r.name == held_out.owner)
        also = {name: name for name in self.question.also}
        setting = make_setting(
            owner.data,
            owner.data.rows.tokenizer,
            held_out.rows,
            self.question.reward,
            self.sampling,
            console(self.quiet),
            also,
            self.judge,
        )
        if not setting.prompts:
            raise DataError("compare", "no row is left after cutting rows into tokens", "look at data.max_length")
        if self.question.reward is None and self.judge is None and not setting.is_paired:
            console(self.quiet).note(f"{NO_OUTCOME} Give --reward, --judge or rows with chosen and rejected answers.")
        sources = [first, *(r.source for runs in settings.values() for r in runs)]
        seeds = {name: [r.name for r in runs] for name, runs in settings.items()}
        result = compare_sources(sources, owner.data, setting, self.sampling, seeds=seeds, fixed=self.against is None)
        notes += [] if result.judgement is None else result.judgement.sentences()
        earlier = [] if readings is None else readings.earlier()
        if readings is not None:
            notes = [readings.sentence(earlier), *notes]
        message = "Equal budgets: steps, rows, completions, tokens, learning rates and data agree within 5%."
        budget_notes = ["The budgets are not equal:", *(f"- {s}" for s in differences)] if differences else [message]
        figures = comparison_json(result) | {
            "heading": self._heading(len(setting.prompts)),
            "notes": [*budget_notes, *notes],
            "budget": {"equal": not differences, "sentences": differences, "runs": budgets},
            "first": first.name,
            "seeds": {n: {r.name: r.seed for r in runs} for n, runs in settings.items()},
            "checkpoints": {r.name: str(r.model) for r in self.all_runs},
            "prompts": len(setting.prompts),
            "answers": len(setting.answers),
            "left_out": held_out.leaked,
            "test_readings_before": None if readings is None else len(earlier),
            "settings": self._settings_record(),
        }
        figures["flags"] = [f.to_json() for f in comparison_flags(figures, result.rows)]
        if readings is not None:  # before any figure is shown, so that no reading goes unrecorded
            details = {"checkpoints": figures["checkpoints"], "output": str(folder), **self._settings_record()}
            readings.record([r.name for r in self.all_runs], details)
        write_files(folder, figures, result.rows)
        return RunComparison(folder, figures)

    def _settings_record(self) -> dict[str, Any]:
        q = self.question
        return {
            "reward": q.reward,
            "also": list(q.also),
            "judge": None if self.judge is None else self.judge.describe(),
            "rewards": reward_hashes(q.reward) | reward_hashes(dict.fromkeys(q.also, 1.0)),
            "prompts_asked": q.prompts,
            "samples": self.sampling.samples,
            "max_new_tokens": self.sampling.max_new_tokens,
            "seed": q.seed,
            "step": q.step,
            "data": None if q.data is None else str(_resolve(q.data)),
        }

    def _heading(self, prompts: int) -> str:
        q = self.question
        rows = self.held_out.owner if q.data is None else f"the test set {Path(q.data).name}"
        several = [name for name, runs in self.settings.items() if len(runs) > 1]
        suffix = f", over seeds and prompts for {', '.join(several)}" if several else ""
        return f"{self.sampling.heading(prompts, rows)}; in brackets 95% intervals by prompt{suffix}"

    def _make_folder(self) -> Path:
        """Make the output folder. By default it is next to the first run and named after the settings."""
        names = [n.replace("/", "-") for n in self.settings]
        more = f"-and-{len(names) - MAX_NAMED}-more" if len(names) > MAX_NAMED else ""
        data_suffix = f"-on-{Path(self.question.data).stem}" if self.question.data is not None else ""
        folder = self.all_runs[0].folder.parent / f"compare-{'-'.join(names[:MAX_NAMED])}{more}{data_suffix}"
        folder = folder if self.question.output is None else _resolve(self.question.output)
        patterns = {COMPARISON: r'\{\n "', COMPARISON_ROWS: r'\{"prompt": .*"completions": \{', REPORT: PAGE}
        for name, pattern in patterns.items():
            check_output(folder / name, pattern)
        make_folder(folder)
        with writing(folder):  # check that it is writable before hours of sampling
            tempfile.TemporaryFile(dir=folder).close()
        return folder


def compare_runs(paths: Sequence[str | Path], question: CompareRequest, *, quiet: bool = False) -> RunComparison:
    """Compare runs with their start and with each other; see `RunComparer`."""
    if question.step is not None and question.step not in ("best", "last") and not question.step.isdigit():
        raise ConfigError("--step", f"{question.step!r} is not a step", "give best, last or a step's number")
    if not paths:
        raise ConfigError("compare", "no run is given", "give the folders of one run or more")
    also = list(question.also)
    duplicates = sorted({n for n in also if also.count(n) > 1 or n == question.reward})
    if duplicates:
        raise ConfigError(
            "--also", f"names {', '.join(duplicates)} twice, or as --reward too", "leave it out of --also"
        )
    if also and question.reward is None:
        raise ConfigError("--also", "is given without a reward", "name the first one as --reward")
    _judge_options(question)  # raises if an endpoint option is given without a judge
    return RunComparer(paths, question, quiet).run()


def _judge_options(question: CompareRequest) -> JudgeOptions | None:
    if isinstance(question.judge, str) and question.judge.startswith(HUMANS):
        how = "leave the runs out: penchant compare --judge humans:FILE"
        raise ConfigError("--judge", "people judged the answers in their file, and runs would write new ones", how)
    endpoint_options = {name: getattr(question, f"judge_{name}") for name in ENDPOINT_FLAGS}
    given_flags = [ENDPOINT_FLAGS[name] for name, value in endpoint_options.items() if value is not None]
    if question.judge is None and given_flags:
        raise ConfigError(given_flags[0], "is given without --judge", "name the judge")
    return JudgeOptions(question.judge, **endpoint_options) if isinstance(question.judge, str) else question.judge


def _was_selected(run: TrainedRun) -> bool:
    """Whether the checkpoint was chosen as the best of several by held-out rows."""
    last, _ = latest_checkpoint(run.folder)
    best = checkpoint_state(last).get("best_step") if last is not None else None
    evaluated = [x for x in read_folder(run.folder).metrics if x.get("kind") == "eval" and x["step"] > 0]
    every = run.config.checkpoint.every  # a step without a checkpoint is no candidate; the last one always has one
    return best == run.step and any(is_due(every, x["step"], ends_epoch=x["epoch"] % 1 == 0) for x in evaluated[:-1])


def _resolve(path: str | Path) -> Path:
    return Path(path).expanduser().resolve()


def _absolute_name(name: str) -> str:
    path, colon, function = name.rpartition(":")
    file = Path(path if colon else name).expanduser()
    return (
        f"{file.resolve()}{colon}{function}"
        if colon and file.exists()
        else str(file.resolve())
        if file.exists()
        else name
    )
