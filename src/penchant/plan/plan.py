"""Put a run's plan together: settings, rows, work, memory, disk, and the time by a probe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from penchant.base.machine import resident
from penchant.base.text import gigabytes
from penchant.config import Places, RunConfig
from penchant.config.launching import check_launch
from penchant.errors import PenchantError
from penchant.plan.memory import Memory, memory_of
from penchant.plan.outline import OutlinedRun, parameter_counts
from penchant.plan.probe import Duration, Probe, duration_of, probe
from penchant.plan.ranks import ranks_of
from penchant.plan.settings import Setting, derived_values, settings_of
from penchant.plan.work import Disk, Rows, Work, disk_of, rows_of, to_json, work_of
from penchant.runfolder import check_run_folder
from penchant.runs import Run
from penchant.runs.identity import reward_contents
from penchant.runs.parts import check_offload, check_places, reference_kind, remarks
from penchant.training.checkpoint import latest_checkpoint

MISFIT_STEPS = 100  # steps that `memory_warning` counts
ROOM = 0.9  # share of the machine's memory above which gradient_checkpointing=auto turns checkpointing on
PROBE_ROOM = 0.9  # share of the free memory above which no probe is taken


@dataclass(frozen=True, slots=True)
class Plan:
    """What `penchant plan` shows.

    Args:
        method, output: of the run; folder: what it already holds; settings: every key with its source.
        rows, work, memory, disk: counted or estimated; parameters: (all, trainable).
        reference: its kind, and whether its cache exists; probe, duration: measured, None without a probe; notes: warnings.
        ranks: ``{number of processes: {part: bytes per process}}``; empty unless `gpus` was given.
    """

    method: str
    output: str
    folder: str
    settings: Sequence[Setting]
    rows: dict[str, Rows]
    work: Work
    parameters: tuple[int, int]
    memory: Memory
    disk: Disk
    reference: str
    probe: Probe | None
    duration: Duration | None
    notes: tuple[str, ...] = field(default=())
    ranks: dict[int, dict[str, int]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON values, in bytes, seconds and tokens."""
        memory = asdict(self.memory) | {"peak": self.memory.peak, "fits": self.memory.fits}
        disk = asdict(self.disk) | {"peak": self.disk.peak, "fits": self.disk.fits}
        return {
            "method": self.method,
            "output": self.output,
            "folder": self.folder,
            "settings": [s.to_json() for s in self.settings],
            "data": {name: asdict(rows) for name, rows in self.rows.items()},
            "work": to_json(self.work),
            "parameters": {"all": self.parameters[0], "trainable": self.parameters[1]},
            "memory": memory,
            "disk": disk,
            "reference": self.reference,
            "probe": None if self.probe is None else asdict(self.probe),
            "seconds": None if self.duration is None else asdict(self.duration),
            "notes": list(self.notes),
        } | ({"ranks": {str(n): parts for n, parts in self.ranks.items()}} if self.ranks else {})


def make_plan(config: RunConfig, places: Places, *, with_probe: bool = True, gpus: Sequence[int] = ()) -> Plan:
    """Plan a run, without writing to its folder or cache.

    Args:
        places: source of each config key; with_probe: also time a few steps in a temporary copy.
        gpus: numbers of processes, one GPU each, to count memory for. Nothing is probed if given.

    Raises:
        CheckpointError, ConfigError, DataError, ModelError, RewardError: the run itself would fail with this.
    """
    original = config
    for count in gpus:
        launch = config.launch.model_copy(update={"processes": count})
        check_launch(config.model_copy(update={"launch": launch}), count)
    if gpus:
        config, with_probe = _gpu_config(config), False
    run = OutlinedRun(config, quiet=True)
    check_run_folder(run.folder)
    _preload_libraries(run)
    baseline = resident()
    _ = run.rows.trees, run.rows.mismatched
    if config.reward is not None or config.evaluation.reward is not None:
        reward_contents(config)  # so that a missing file or folder is reported now
    data_bytes = max(0, resident() - baseline)
    check_offload(run.config, run.device)
    check_places(run.config)
    derived: dict[str, tuple[Any, str]] = {}
    if run.config.train.gradient_checkpointing == "auto":
        recompute, reason = checkpointing(run)
        derived["train.gradient_checkpointing"] = ("layers" if recompute else "off", reason)
        train = run.config.train.model_copy(update={"gradient_checkpointing": recompute})
        run = OutlinedRun(run.config.model_copy(update={"train": train}), quiet=True, rows=run.rows)
    rows, work = rows_of(run), work_of(run)
    derived |= derived_values(run)
    if (length := run.config.data.max_length) < config.data.max_length:
        derived["data.max_length"] = (length, "the model's context")
    settings = settings_of(config, places, derived)
    parameters = parameter_counts(run.model)
    memory = memory_of(run, work, baseline, data_bytes)
    reference, cached, notes = _reference(run)
    disk = disk_of(run, work, cached)
    measured = duration = None
    if with_probe:
        room = memory.free * PROBE_ROOM
        if memory.peak - baseline > room:
            notes.append("no probe: the run would need more memory than is free")
        else:
            measured = probe(run, disk.checkpoint, cached)
            duration = duration_of(measured, work)
            notes += _packing_mismatch(run, measured)
    notes += remarks(original if gpus else run.config, run.rows)
    return Plan(
        run.method.name, str(run.folder), _folder_state(run.folder, work.steps), settings, rows, work, parameters, memory, disk, reference,
        measured, duration, tuple(notes), ranks_of(run, memory, gpus),
    )  # fmt: skip


def _gpu_config(config: RunConfig) -> RunConfig:
    """The config for several GPUs, countable without any: on the CPU device, with transformers' layers and bf16 for dtype auto."""
    model = {"kernels": "off", "device": "cpu", "dtype": "bf16" if config.model.dtype == "auto" else config.model.dtype}
    return config.model_copy(update={"model": config.model.model_copy(update=model)})


def checkpointing(run: Run) -> tuple[bool, str]:
    """(value, reason) that ``train.gradient_checkpointing: auto`` resolves to: True (layers) if the run would not fit otherwise."""
    train = run.config.train.model_copy(update={"gradient_checkpointing": False})
    planned = OutlinedRun(run.config.model_copy(update={"train": train}), quiet=True, rows=run.rows)
    memory = memory_of(planned, work_of(planned), resident(), 0)
    reason = f"{gigabytes(memory.peak)} without, and this machine has {gigabytes(memory.machine)}"
    return memory.peak > memory.machine * ROOM, reason


def memory_warning(run: Run) -> str | None:
    """A warning if the run probably needs more memory than the machine has, else None.

    Uses the plan's estimate with a rule of thumb for activations, because counting them would delay the start of training.
    """
    planned = OutlinedRun(run.config, quiet=True, rows=run.rows)
    memory = memory_of(planned, work_of(planned, MISFIT_STEPS), resident(), 0, counted=False)
    if memory.fits:
        return None
    advice = f"Try {memory.advice[0][0]}" if memory.advice else "Take a smaller model"
    return (
        f"! memory: roughly {gigabytes(memory.peak)} needed, {gigabytes(memory.machine)} on this machine: the run will probably "
        f"be killed. {advice}; `penchant plan` has the details."
    )


def _preload_libraries(run: OutlinedRun) -> None:
    """Load the libraries and the tokenizer, so that the process's memory before any data can be measured."""
    import transformers  # noqa: F401

    import penchant.report
    import penchant.rollout.generate  # noqa: F401

    if run.config.lora is not None:
        import peft  # noqa: F401
    _ = run.rows.tokenizer


def _reference(run: OutlinedRun) -> tuple[str, bool | None, list[str]]:
    """(description, whether the cache exists or None if none is used, notes) of the reference."""
    if "reference" not in run.method.needs:
        return "none is needed", None, []
    kind = reference_kind(run.config)
    if run.config.reference.moves:
        return "a frozen copy that follows the policy", None, []
    adapter = "switched off" if run.config.model.adapter is None else "as it starts"
    words = {"adapter": f"the adapter {adapter}, in each step", "frozen": "a frozen copy, in each step"}
    if kind in words:
        return words[kind], None, []
    try:
        files = run.cache_files()
    except (PenchantError, MemoryError) as error:
        return f"computed once and cached (could not check whether it exists: {error})", False, []
    missing = [name for name, path in files.items() if not path.exists()]
    if not missing:
        return "cached, and there already", True, []
    return f"computed once and cached; not there yet: {', '.join(missing)} rows", False, []


def _packing_mismatch(run: OutlinedRun, probe: Probe) -> list[str]:
    packing, fast, _ = run.layout
    if run.encoder:
        return []
    if (probe.packing, probe.fast) == (packing, fast):
        return []
    actual = f"{probe.packing}{' with' if probe.fast else ' without'} the fast path"
    return [f"the loaded model uses {actual}, unlike its config; the counts above assume {packing}"]


def _folder_state(folder: Path, steps: int) -> str:
    if not folder.exists():
        return "new"
    last, _ = latest_checkpoint(folder)
    if last is None:
        return "exists, without a checkpoint"
    finished = last.name == f"step-{steps}"
    return f"holds {last.name}: {'finished' if finished else 'training resumes from it'}"
