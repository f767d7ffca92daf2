"""Compare a pipeline's models on the same held-out prompts, and reuse the saved result if nothing changed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penchant.base.files import file_sha256
from penchant.base.text import counted
from penchant.compare.measured import Setting
from penchant.compare.models import (
    HeldOut,
    Sampling,
    compare_sources,
    comparison_json,
    exclude_prompts,
    format_comparison,
    make_setting,
    same_vocabulary,
    tokens_sha256,
    trained_prompts,
    write_files,
)
from penchant.errors import ConfigError
from penchant.models.load import load_tokenizer
from penchant.models.lora import is_adapter
from penchant.models.merge import model_sha256
from penchant.models.options import check_text_alone
from penchant.pipeline import Comparison, Pipeline, Ref, Resolve
from penchant.runfolder import COMPARISON, COMPARISON_ROWS
from penchant.runs import Run
from penchant.runs.find import Source, trained_source
from penchant.runs.state import State, check_reward, reward_hashes
from penchant.training.console import PlainConsole

FolderOf = Callable[[Ref], Path]


@dataclass(frozen=True, slots=True)
class Outcome:
    """A comparison's figures as saved in its file. `done` is False if they were read instead of computed."""

    figures: Mapping[str, Any]
    heading: str
    done: bool

    @property
    def models(self) -> dict[str, dict[str, Any]]:
        return dict(self.figures["models"])

    def to_text(self) -> str:
        """Format the tables, followed by the conclusions."""
        return format_comparison(self.figures, self.heading)


class Comparer:
    """A pipeline's comparison.

    Args:
        runs: a run per stage, with its data read.

    Raises:
        ConfigError: nothing is held out, every held-out prompt is trained on, or a reward or model cannot be used.
    """

    def __init__(self, pipeline: Pipeline, runs: Mapping[str, Run], console: PlainConsole) -> None:
        assert pipeline.compare is not None
        self.pipeline, self.runs, self.console = pipeline, runs, console
        self.compare: Comparison = pipeline.compare
        for name, run in runs.items():
            check_text_alone(run.config.model, f"{self.compare.place}: {name}", "a pipeline's comparison")
        c = self.compare.config
        self.sampling = Sampling(c.prompts, c.samples, c.max_new_tokens, c.seed, f"{self.compare.place}: compare")
        self.heldout = self._held_out()
        for key, reward in (("reward", c.reward), *(("also", name) for name in c.also)):
            try:
                check_reward(reward)
            except ConfigError as error:
                where = error.where.replace("reward", key, 1)
                raise ConfigError(self.compare.place, f"compare.{where}: {error.what}", error.how) from error

    def _held_out(self) -> HeldOut:
        """Held-out rows of the first stage that has any with prompts, without prompts that any stage trains on."""
        trained: set[str] = set().union(*(trained_prompts(run) for run in self.runs.values()))
        for name, run in self.runs.items():
            rows = run.rows.datasets[1]
            if rows is None or rows.kind == "text":
                continue
            held_out = exclude_prompts(name, rows, trained)
            if not held_out.rows.trees:
                what = f"compare: every prompt that {name} holds out is trained on by another stage"
                how = "give all stages the same data, train.seed and way of holding out"
                raise ConfigError(self.compare.place, what, how)
            return held_out
        how = "set defaults.data.validation_fraction, validation_rows or eval_path"
        raise ConfigError(self.compare.place, "compare: no stage holds out rows with prompts", how)

    # ---- Common setting of all models -----------------------------------------------------------------------------

    @property
    def _owner_run(self) -> Run:
        return self.runs[self.heldout.owner]

    def setting(self, resolve: Resolve, folder_of: FolderOf) -> Setting:
        """The tokenizer, prompts, answers and rewards that are the same for every model."""
        tokenizers = [load_tokenizer(str(folder_of(ref))) for ref in self.compare.models]
        for ref, other in zip(self.compare.models[1:], tokenizers[1:], strict=True):
            if not same_vocabulary(other, tokenizers[0]):
                what = f"compare: {ref.stage} has another tokenizer than {self.compare.models[0].stage}"
                how = "compare models that start from the same one: KL and likelihood are of the same tokens"
                raise ConfigError(self.compare.place, what, how)
        reward, also = self.compare.reward(resolve), self.compare.also(resolve)
        return make_setting(
            self._owner_run, tokenizers[0], self.heldout.rows, reward, self.sampling, self.console, also
        )

    def _source(self, ref: Ref, resolve: Resolve, folder_of: FolderOf) -> Source:
        folder, stage = folder_of(ref), self.pipeline.stages[ref.stage]
        return trained_source(_name(ref), folder, stage.resolved(resolve) if is_adapter(folder) else stage.config)

    # ---- Comparing, unless unchanged ------------------------------------------------------------------------------

    def _inputs(self, setting: Setting, folder_of: FolderOf) -> dict[str, Any]:
        c = self.compare
        return {
            # records of earlier versions have no `also`
            "settings": {k: v for k, v in c.config.model_dump(mode="json").items() if v != []},
            "models": {ref.text: model_sha256(folder_of(ref)) for ref in c.models},
            "rewards": reward_hashes(c.config.reward)
            | reward_hashes(dict.fromkeys(c.config.also, 1.0))
            | {ref.text: model_sha256(folder_of(ref)) for ref in c.reward_refs},
            "tokens": tokens_sha256(setting),
            "dtype": str(self._owner_run.dtype),
        }

    def unchanged(self, record: Mapping[str, Any], resolve: Resolve, folder_of: FolderOf) -> bool:
        """Whether the comparison on disk has the same models, prompts and settings."""
        if not record or self._files() != record.get("files"):
            return False
        return bool(record.get("inputs") == self._inputs(self.setting(resolve, folder_of), folder_of))

    def _files(self) -> dict[str, str]:
        paths = [self.pipeline.output / name for name in (COMPARISON, COMPARISON_ROWS)]
        return {p.name: file_sha256(p) for p in paths if p.exists()}

    def run(self, state: State, resolve: Resolve, folder_of: FolderOf) -> Outcome:
        """Compare the models and write both files, or read the saved figures if nothing changed."""
        if self.unchanged(state.comparison, resolve, folder_of):
            self.console.note("comparison: unchanged")
            figures = json.loads((self.pipeline.output / COMPARISON).read_text(encoding="utf-8"))
            return self._outcome(figures, done=False)
        started = time.monotonic()
        setting = self.setting(resolve, folder_of)
        inputs = self._inputs(setting, folder_of)
        self.console.note(f"comparison on {counted(len(setting.prompts), 'held-out prompt')} of {self.heldout.owner}")
        if self.heldout.leaked:
            self.console.note(
                f"left out: {counted(self.heldout.leaked, 'held-out row')} whose prompts another stage trains on"
            )
        sources = [self._source(ref, resolve, folder_of) for ref in self.compare.models]
        compared = compare_sources(sources, self._owner_run, setting, self.sampling)
        figures = comparison_json(compared) | {
            "prompts": len(setting.prompts),
            "answers": len(setting.answers),
            "held_out_of": self.heldout.owner,
            "left_out": self.heldout.leaked,
            "settings": self.compare.config.model_dump(mode="json"),
            "checkpoints": {_name(ref): folder_of(ref).parent.name for ref in self.compare.models},
        }
        write_files(self.pipeline.output, figures, compared.rows)
        seconds = round(time.monotonic() - started, 1)
        state.comparison = {"inputs": inputs, "files": self._files(), "seconds": seconds}
        state.save()
        return self._outcome(figures, done=True)

    def _outcome(self, figures: Mapping[str, Any], done: bool) -> Outcome:
        heading = self.sampling.heading(figures["prompts"], figures["held_out_of"])
        return Outcome(figures, f"{heading}; in brackets 95% intervals by prompt", done)


def _name(ref: Ref) -> str:
    return ref.text.removeprefix("stage:")
