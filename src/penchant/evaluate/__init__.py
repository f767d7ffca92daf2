"""`penchant eval`: evaluate any model and keep the figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from penchant.config import RunConfig
from penchant.errors import ConfigError
from penchant.evaluate.evaluator import Evaluation, evaluate_held_out
from penchant.evaluate.output import save
from penchant.models.options import check_exists
from penchant.requests import EvalRequest
from penchant.runfolder import damage_notes
from penchant.runs.find import find_model, find_run, runs_in, source_from_config

__all__ = ["evaluate_model"]


def evaluate_model(
    model_or_config: str | Path | RunConfig,
    overrides: Sequence[str],
    request: EvalRequest,
    *,
    quiet: bool,
    rows: bool = False,
) -> dict[str, Any]:
    """Evaluate a model and keep the figures; see `penchant.api.evaluate`.

    Args:
        model_or_config: a run, model or config by name, or a final config; overrides: ``key.path=value``, not for a final config.
        rows: also return the figures of each answer.
    """
    request.check()
    name = model_or_config.output if isinstance(model_or_config, RunConfig) else str(model_or_config)
    config_and_step = (
        (model_or_config, request.step)
        if isinstance(model_or_config, RunConfig)
        else find_run(name, request.step, overrides)
    )
    if request.bare and not rows:
        if config_and_step is None:
            check_exists(name)
            runs = runs_in(name)
            if runs:
                raise ConfigError(name, "is not a run but a folder of runs", f"give one of them: {', '.join(runs)}")
            if not Path(name).expanduser().exists():
                how = "check the path; a model also needs --data FILE or --text FILE"
                raise ConfigError(name, "no such run here", how)
            what = "is not a run, so it does not say what to evaluate on"
            raise ConfigError(name, what, "give --data FILE or --text FILE")
        result = evaluate_held_out(*config_and_step, quiet)
        folder: Path | None = Path(config_and_step[0].output)
    else:
        if isinstance(model_or_config, RunConfig):
            source = source_from_config(model_or_config, request.step, request.base)
        else:
            source = find_model(name, step=request.step, base=request.base, overrides=overrides)
        result = Evaluation(source, request, tuple(overrides), quiet).measure()
        folder = source.folder
    if folder is not None:
        result.notes.extend(damage_notes(folder))
    result.notes.extend(save(result, folder, request))
    notes = {"notes": result.notes} if result.notes else {}
    return result.metrics | notes | ({"rows": result.answers} if rows else {})
