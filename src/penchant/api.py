"""The commands of the command line as functions; docs/python.md has a line for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penchant.base.files import PAGE, check_output, write_output
from penchant.errors import ConfigError
from penchant.requests import (
    CompareRequest,
    EvalRequest,
    ExportRequest,
    FixRequest,
    GetRequest,
    check_names,
    check_type,
    checked,
    names_in,
    request_of,
    shows,
)

if TYPE_CHECKING:
    from penchant.compare.comparison import RunComparison
    from penchant.config import RunConfig
    from penchant.data.audit.findings import Audit
    from penchant.data.audit.fix import Fixed
    from penchant.data.load import Dataset
    from penchant.download import GetResult
    from penchant.export import ExportResult
    from penchant.flags.rule import Flag
    from penchant.pipeline.conduct import PipelineResult
    from penchant.plan import Plan
    from penchant.runs import TrainResult
    from penchant.sweep.conduct import SweepResult


@checked
def load_preferences(path: str | Path | Sequence[str | Path], **options: Any) -> Dataset:
    """Read preference data from files or a hub id; see `penchant.data.load.load_preferences`."""
    from penchant.data.load import Reading
    from penchant.data.load import load_preferences as load

    types = {"on_bad_row": "str"} | {name: t.__forward_arg__ for name, t in Reading.__annotations__.items()}
    check_names(options, types, "load_preferences")
    options = {name: value for name, value in options.items() if value is not None}
    for name, value in options.items():
        check_type(name, value, types[name])
    if "bounds" in options:
        from penchant.config.several import read_section
        from penchant.data.read import Bounds

        bounds = {"bounds": dict(options["bounds"])}
        options["bounds"] = read_section(Bounds, "bounds", bounds, {}, "load_preferences").model_dump()
    return load(path, **options)


@shows(GetRequest)
@checked
def get_data(name: str, **asked: Any) -> GetResult:
    """Write a published dataset, from the hub or a local copy, as train.jsonl, validation.jsonl and test.jsonl in a folder.

    Args:
        name: a dataset in the catalog, or a hub id.
        asked: the options of `penchant data get`: ``source="copy/"``, ``first=500``, ``language=["English"]``,
            ``as_="prompts"``, ``output="folder"``, ``redo=True``, ``quiet=True`` ...; see `penchant.requests.GetRequest` and
            docs/data_get.md.

    Raises:
        ConfigError, DataError, RewardError: an error that the user can fix.
    """
    from penchant.download import get_data, print_progress

    request = request_of(GetRequest, {"name": name, **asked}, "data get")
    return get_data(request, (lambda line: None) if request.quiet else print_progress)


@checked
def train(
    config: RunConfig | Mapping[str, Any] | str | Path,
    *overrides: str,
    quiet: bool = False,
    callbacks: Sequence[Any] = (),
    **given: Any,
) -> TrainResult:
    """Train with a config; resumes automatically if its folder holds a checkpoint of the same run.

    Args:
        config: a `RunConfig`, a mapping of the same shape, or the path of a YAML file. In a mapping, rows, models, tokenizers,
            functions and classes may replace file names.
        overrides: ``"key.path=value"``.
        quiet: no progress output.
        callbacks: functions ``f(step, metrics)``, or objects with methods of `penchant.training.callbacks.Callback`; they
            may end the run.
        given: objects besides the config: ``data``, ``eval_data`` (a list of dicts, a frame, a `datasets.Dataset`, what
            `load_preferences` returns), ``model``, ``tokenizer``, ``reward``, ``loss``; see docs/python.md.

    Raises:
        ConfigError, DataError, ModelError, CheckpointError: an error that the user can fix.
        TrainingStopped: NaN/Inf or a signal.
    """
    from penchant.plan import checkpointing, memory_warning
    from penchant.runs import Run

    run_config = as_config(config, overrides, given)
    return Run(
        run_config, quiet=quiet, check_memory=memory_warning, checkpointing=checkpointing, callbacks=callbacks
    ).train()


@checked
def plan(
    config: RunConfig | Mapping[str, Any] | str | Path,
    *overrides: str,
    probe: bool = True,
    gpus: Sequence[int] = (),
    **given: Any,
) -> Plan:
    """Estimate what `train` would do with a config, without training: settings and their sources, work, memory, disk, time.

    Args:
        config, overrides, given: as for `train`.
        probe: also take a few steps on a throwaway copy, to estimate the time.
        gpus: numbers of GPUs for which to estimate the memory per GPU, without a probe.

    Raises:
        ConfigError, DataError, ModelError, CheckpointError, RewardError: an error that `train` would raise.
    """
    from penchant.config import load_config_with_places
    from penchant.plan import make_plan

    if isinstance(config, (str, Path)) and not given:
        return make_plan(*load_config_with_places(config, list(overrides)), with_probe=probe, gpus=gpus)
    from penchant.plan.settings import places_in

    run_config = as_config(config, overrides, given)
    overridden = {tuple(o.partition("=")[0].strip().split(".")): "overrides" for o in overrides}
    settings = config if isinstance(config, Mapping) else run_config.model_dump(mode="json", exclude_unset=True)
    places = places_in(settings, "given") | overridden
    return make_plan(run_config, places, with_probe=probe, gpus=gpus)


@shows(EvalRequest)
@checked
def evaluate(
    config: RunConfig | Mapping[str, Any] | str | Path,
    *overrides: str,
    quiet: bool = False,
    rows: bool = False,
    **asked: Any,
) -> dict[str, Any]:
    """Evaluate a model on rows, with 95% intervals by prompt.

    Without `asked`: held-out metrics of a run's checkpoint, or of the base model if the config's folder has none.

    Args:
        config: a run folder, a YAML path, a mapping or a `RunConfig`; with `asked` also the folder of a checkpoint, an adapter
            or a model, or a hub id.
        asked: the options of `penchant eval`: ``step="best"``, ``data="test.jsonl"``, ``text="book.txt"``, ``generate=100``,
            ``reward="words"``, ``reference="runs/other"`` ...; see `penchant.requests.EvalRequest` and docs/eval.md. ``data``
            may hold rows, and ``reward`` may be a function.
        rows: also return ``rows``, a dict for each given answer with its texts and metrics.

    Returns:
        ``eval/...`` metrics with ``eval/.../ci`` and ``eval/.../n``, and ``notes``.

    Raises:
        CheckpointError, ConfigError, DataError, ModelError, RewardError: an error that the user can fix.
    """
    from penchant.config import parse_yaml

    asked = _named(asked, "data", "reward", "also")
    reward = asked.get("reward")
    if isinstance(reward, str) and reward.lstrip().startswith("{"):
        asked["reward"], _ = parse_yaml(reward, "--reward")
    source = config if isinstance(config, (str, Path)) else as_config(config, overrides)
    request = request_of(EvalRequest, asked, "eval")  # before torch is imported
    from penchant.evaluate import evaluate_model

    return evaluate_model(source, overrides, request, quiet=quiet, rows=rows)


@checked
def flags(path: str | Path) -> list[Flag]:
    """Reasons for caution before trusting a run or a comparison, warnings first; see docs/trust.md.

    Args:
        path: a run folder, or one with a comparison.json.

    Raises:
        CheckpointError: the folder is neither.
    """
    from penchant.flags import compute_flags

    return compute_flags(path)


@checked
def audit(
    config: Any,
    *overrides: str,
    tokenise: bool = True,
    quiet: bool = False,
    reward: Any = None,
    check: Callable[..., Any] | str | None = None,
    languages: bool = True,
) -> Audit:
    """Count problems in a dataset: duplicates, contradictions, leakage, truncation, bias, personal data.

    Args:
        config: a YAML path, a mapping, a `RunConfig`; or the path of a data file, or rows (no tokenizer needed).
        tokenise: also count in tokens (needs the config's tokenizer).
        reward: any reward, to count how often it disagrees with the labels.
        check: ``path.py:function`` over texts, or a function.
        languages: whether to guess languages.

    Returns:
        An `Audit` with `to_text()` and `to_json()`.
    """
    from penchant.given import is_rows

    if is_rows(config):
        config = _named({"data": config}, "data")["data"]
    if isinstance(config, (str, Path)) and Path(config).suffix not in (".yaml", ".yml"):
        if overrides:
            raise ConfigError("command line", "overrides go with a config, not with a data file", "give a CONFIG.yaml")
        return audit_files(str(config), reward=reward, check=check, languages=languages)
    from penchant.runs import Run

    run, counters = Run(as_config(config, overrides), quiet=quiet), _own_counters(reward, check)
    return run.rows.audit(tokenize=tokenise, languages=languages, counters=counters)


@checked
def audit_files(
    *paths: str | Path,
    splits: Mapping[str, str | Path | Sequence[str | Path]] | None = None,
    shape: str = "auto",
    columns: Mapping[str, str] | None = None,
    limit: int | None = None,
    reward: Any = None,
    check: Callable[..., Any] | str | None = None,
    languages: bool = True,
    workers: int | str | None = None,
) -> Audit:
    """Audit files of any size in a single pass.

    Args:
        paths, splits: files; those in `splits` are named by their split, the others by their own name. Prompts that occur in
            two of them are counted. columns: ``{our field: your column}``. limit: maximum number of rows to read per file.
        reward, check, languages: as for `audit`.
        workers: number of processes; None: one per core if the files are large; ``ray``: those of a Ray cluster.

    Raises:
        DataError: a file that cannot be read. ConfigError: a reward or function that cannot be loaded.
    """
    from penchant.data.audit import audit_files as run_audit
    from penchant.data.audit import split_names

    files: dict[str, str | Sequence[str]] = {
        name: [str(p) for p in ([given] if isinstance(given, (str, Path)) else given)]
        for name, given in (splits or {}).items()
    }
    files |= split_names([str(p) for p in paths])
    counters = _own_counters(reward, check)
    options: dict[str, Any] = {"shape": shape, "columns": columns, "limit": limit}
    return run_audit(files, languages=languages, counters=counters, workers=workers, **options)


@checked
def audit_page(audit: Audit, path: str | Path, title: str = "Data audit") -> Path:
    """Write an audit as one self-contained HTML file.

    Raises:
        ConfigError: it cannot be written.
    """
    from penchant.report.audit import render_audit

    return write_output(check_output(path, PAGE), render_audit(audit.to_json(), title))


@shows(FixRequest)
@checked
def fix(source: str | Path, output: str | Path, **asked: Any) -> Fixed:
    """Write a cleaned copy of a data file, and ``OUTPUT.touched.jsonl`` with every row that was dropped or changed.

    Args:
        asked: ``drop``: rules beyond the safe ones; ``keep``: safe ones to switch off; ``redact``: ``pii``, ``secrets``;
            ``against``: files whose prompts must not be in the copy (rule ``leakage``); ``columns``: ``{our field: your column}``
            (the copy keeps yours); ``shape``, ``overwrite``, ``workers``, ``edits``; see `penchant.requests.FixRequest`.

    Raises:
        DataError: a file that cannot be read, an unknown rule, an output that is the input or already exists.
    """
    from penchant.data.audit.fix import default_rules, read_edits
    from penchant.data.audit.fix import fix as run_fix

    r = request_of(FixRequest, {"source": source, "output": output, **asked}, "data fix")
    rules, others = default_rules(names_in(r.drop), names_in(r.keep)), r.against
    edits = None if r.edits is None else read_edits(r.edits)
    options: dict[str, Any] = {
        "shape": r.shape,
        "columns": r.columns,
        "overwrite": r.overwrite,
        "edits": edits,
        "workers": r.workers,
    }
    return run_fix(r.source, r.output, drop=rules, redact=names_in(r.redact), against=others, **options)


def _own_counters(reward: Any, check: Any) -> list[Any]:
    """Audit counters for a reward and for a user's own function."""
    from penchant.data.audit.counters import RewardDisagreement, TextCheck

    reward, check = _named({"reward": reward, "check": check}, "reward", "check").values()
    counters: list[Any] = []
    if reward is not None:
        from penchant.rewards.functions import load_reward

        counters.append(RewardDisagreement(reward, load_reward(reward)))
    if check is not None:
        from penchant.base.functions import python_function

        if not check.rpartition(":")[0].endswith(".py"):
            raise ConfigError("check", f"{check!r} names no function", "write path.py:function")
        counters.append(TextCheck(check.rpartition(":")[2], python_function(check, "check", ("texts",))))
    return counters


@shows(CompareRequest)
@checked
def compare(*runs: str | Path, quiet: bool = False, **asked: Any) -> RunComparison:
    """Compare runs with the model that they start from and with each other, on rows that none of them was trained on.

    Args:
        runs: run folders; those that differ only in `train.seed` count as one setting with several seeds.
        reward: any reward; None: only the likelihood of given answers is compared. also: other rewards to report besides it.
        judge: decides between two answers: ``path.py:function``, or `JudgeOptions` with an endpoint, or its address and
            ``judge_model=`` ...; against: a run, instead of the common start.
        prompts, samples, max_new_tokens, seed: number of prompts (or rows, which are all used), completions per prompt, tokens
            per completion, and sampling seed.
        step: ``best``, ``last``, a step number; None: the best if one is tracked and kept, else the last.
        data: a file of test rows; each use of it is recorded next to it. None: the runs' held-out rows.
        output: folder of `comparison.json` and `comparison.jsonl`; None: next to the first run.

    Returns:
        The comparison, with `figures` and `to_text()`.

    Raises:
        ConfigError, DataError, ModelError, RewardError, CheckpointError: an error that the user can fix.
    """
    from penchant.given import is_rows

    if is_rows(asked.get("prompts")):  # rows, all of which are used
        rows = asked.pop("prompts")
        if asked.get("data") is not None:
            raise ConfigError("compare", "prompts and data are both rows", "give them as data, and prompts as a number")
        asked |= {"data": rows} | ({"prompts": len(rows)} if hasattr(rows, "__len__") else {})
    asked = _named(asked, "data", "reward", "also", "judge")
    request = request_of(CompareRequest, asked, "compare")
    from penchant.compare.comparison import compare_runs

    return compare_runs(runs, request, quiet=quiet)


@checked
def report(*paths: str | Path, output: str | Path | None = None) -> Path:
    """Write the report of runs, a sweep, a pipeline or a comparison as one self-contained HTML file.

    Args:
        paths: folders; output: the file; None: ``report.html`` in the folder, or in the current one if there are several.

    Raises:
        CheckpointError: a folder has no Penchant results, or the file cannot be written.
    """
    from penchant.report import write_report

    return write_report(paths, output)


@shows(ExportRequest)
@checked
def export(run: str | Path, *, say: Callable[[str], None] = lambda _: None, **asked: Any) -> ExportResult:
    """Export a run's model, read it back and compare; see `penchant.requests.ExportRequest` and docs/export.md.

    Args:
        run: a run folder, or a checkpoint in it; say: called with notes for the user.
        asked: ``to`` (safetensors, pt, merged, adapter or gguf), ``step``, ``output``, ``dtype``, ``max_shard_size``,
            ``push``, ``private``.

    Raises:
        ConfigError, CheckpointError, ModelError: an error that the user can fix.
    """
    from penchant.models.options import check_exists

    request = request_of(ExportRequest, {"run": run, **asked}, "export")
    check_exists(request.run, hub=False)  # before torch is imported
    from penchant.export import export_run

    return export_run(request, say)


@checked
def track(
    run: str | Path, *to: str, anew: bool = False, say: Callable[[str], None] = lambda _: None, **settings: Any
) -> bool:
    """Send a run's metrics to trackers afterwards; return whether every line was sent. See `penchant.track.track_run`."""
    from penchant.track import track_run

    return track_run(run, to, anew=anew, say=say, **settings)


@checked
def as_config(
    config: RunConfig | Mapping[str, Any] | str | Path,
    overrides: Sequence[str] = (),
    given: Mapping[str, Any] | None = None,
) -> RunConfig:
    """Validate a config given in any form; objects in it, or in `given`, are written to ``OUTPUT/given``.

    Raises:
        ConfigError: with every problem found.
    """
    from penchant.config import RunConfig, config_from_mapping, load_config
    from penchant.config.yaml import read_mapping

    if isinstance(config, RunConfig):
        if overrides or given:
            raise ConfigError("overrides", "cannot change a RunConfig", "give a mapping or a path with them")
        return config
    if not isinstance(config, Mapping):
        if not given:
            return load_config(config, list(overrides))
        config = read_mapping(config, "run")[0]
    return config_from_mapping(_with_names(config, overrides, given or {}), list(overrides))


def _with_names(config: Mapping[str, Any], overrides: Sequence[str], given: Mapping[str, Any]) -> Mapping[str, Any]:
    """A config's mapping with objects replaced by names."""
    from penchant.given import given_folder, is_plain, named, output_of, set_in

    config = set_in(config, given)
    if is_plain(config):
        return config
    settings: Mapping[str, Any] = named(config, given_folder(output_of(config, overrides)))
    return settings


def _named(asked: dict[str, Any], *names: str) -> dict[str, Any]:
    """A command's options with objects replaced by names; the objects are written to the cache."""
    from penchant.given import given_folder, named

    return asked | {name: named(asked[name], given_folder(None), name) for name in names if name in asked}


@checked
def pipeline(
    config: Mapping[str, Any] | str | Path,
    *overrides: str,
    only: str | None = None,
    redo: str | Sequence[str] = (),
    quiet: bool = False,
) -> PipelineResult:
    """Train a pipeline's stages and compare their models; stages already done with the same inputs are skipped.

    Args:
        config: the path of a pipeline's YAML file, or a mapping of the same shape.
        overrides: ``"stages.dpo.loss.beta=0.3"``, ``"defaults.train.seed=1"``.
        only: one stage, whose inputs must be done.
        redo: a stage, or stages, to train again, with every stage that uses them; their old folders are moved aside.

    Raises:
        ConfigError, DataError, ModelError, RewardError, CheckpointError: an error that the user can fix.
        TrainingStopped: NaN/Inf or a signal.
    """
    from penchant.pipeline import load_pipeline
    from penchant.pipeline.conduct import Conductor

    return Conductor(load_pipeline(config, overrides), quiet=quiet).run(only, redo)


@checked
def pipeline_plan(config: Mapping[str, Any] | str | Path, *overrides: str, redo: str | Sequence[str] = ()) -> str:
    """Describe what `pipeline` would do with each stage, and why, as text; nothing is trained or written."""
    from penchant.pipeline import load_pipeline
    from penchant.pipeline.conduct import Conductor

    return Conductor(load_pipeline(config, overrides), quiet=True).plan_text(redo)


@checked
def sweep(
    config: Mapping[str, Any] | str | Path, *overrides: str, jobs: int | None = None, quiet: bool = False
) -> SweepResult:
    """Train one config with many settings; runs already done with the same inputs are skipped.

    Args:
        config: the path of a sweep's or a run's YAML file, or a mapping of the same shape.
        overrides: ``"train.lr=1e-5"`` for every run, ``"loss.beta=0.1,0.3"`` to vary it.
        jobs: runs at a time, each in its own process with its share of the cores (default: 1); on a cluster (`cluster.on`)
            the jobs at a time (default: all runs of a grid, one trial of a search).

    Raises:
        ConfigError, DataError, ModelError, RewardError, CheckpointError: an error that the user can fix.
        TrainingStopped: a signal; a run that stops itself is a result.
    """
    from penchant.plan import memory_warning
    from penchant.sweep import load_sweep
    from penchant.sweep.conduct import SweepConductor

    return SweepConductor(load_sweep(config, overrides), jobs=jobs, quiet=quiet, check_memory=memory_warning).run()


@checked
def sweep_plan(config: Mapping[str, Any] | str | Path, *overrides: str) -> str:
    """Describe what `sweep` would do with each run, and why, as text; nothing is trained or written."""
    from penchant.sweep import load_sweep
    from penchant.sweep.conduct import SweepConductor

    return SweepConductor(load_sweep(config, overrides), quiet=True).plan_text()
