"""A run from its config to its result: rows, parts, training, evaluation, record. Reads from top to bottom."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from datetime import date
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from penchant.base.files import free_bytes, optional_write, writing
from penchant.base.functions import is_own
from penchant.base.text import gigabytes
from penchant.config import RunConfig, default_settings, dump_config, with_absolute_paths
from penchant.config.launching import check_launch
from penchant.data.load import write_quarantine
from penchant.data.templates import DATE, uses_chat, writes_date
from penchant.distributed.shard import whole_weights
from penchant.distributed.world import current
from penchant.errors import CheckpointError, ConfigError, DiskError, PenchantError
from penchant.flags import run_flags, summary, write_flags
from penchant.flags.rule import Flag
from penchant.metrics.completions import START_FILE
from penchant.models.options import check_model_path, check_weights
from penchant.rewards.functions import check_reward
from penchant.rewards.reward_model import reward_writes_date
from penchant.rollout.environment import find_environment
from penchant.runfolder import (
    AUDIT,
    CALIBRATION,
    CHECKPOINTS,
    CONTENT,
    IDENTITY,
    MANIFEST,
    SAMPLES,
    SWEEP,
    TOKENS,
    RunLock,
    check_run_folder,
    checkpoints,
    is_intact,
    leads_to_model,
    load_identity,
    nan_to_none,
    open_run,
    write_summed,
)
from penchant.runfolder.read import read_folder
from penchant.runfolder.values import mapping, number_of
from penchant.runs.evaluating import START_LOSSES, HeldOut, completion_prompts, writes_completions
from penchant.runs.find import with_model_folders
from penchant.runs.identity import content_hashes, run_identity, trees_sha256
from penchant.runs.parts import (
    Built,
    build,
    check_offload,
    check_places,
    checkpoint_bytes,
    model_writer,
    peak_lr,
    placed,
    remarks,
    start_key,
)
from penchant.runs.record import has_samples, join_samples, versions, write_manifest, write_samples
from penchant.runs.rows import Rows, within_context
from penchant.runs.sharing import Uncached
from penchant.track import Mirrors, check_installed
from penchant.training.callbacks import Callbacks
from penchant.training.checkpoint import find_checkpoint, latest_checkpoint, load_checkpoint
from penchant.training.console import console as make_console
from penchant.training.loop import Interrupted, Loop, Paused, algorithm_state
from penchant.training.steps import BatchSchedule


@dataclass(frozen=True, slots=True)
class TrainResult:
    """The result of a run.

    Args:
        folder: the run folder; model: the last checkpoint's model folder, which transformers or peft can load.
        steps: optimizer steps done; before, after: held-out metrics at step 0 and at the end (empty without a held-out set).
        best_step: the step of the best checkpoint, or None; flags: reasons not to trust the result, warnings first.
        stopped: whether a callback ended the run early.
    """

    folder: Path
    model: Path
    steps: int
    before: Mapping[str, Any]
    after: Mapping[str, Any]
    best_step: int | None
    flags: tuple[Flag, ...] = ()
    stopped: bool = False

    @property
    def rows(self) -> list[dict[str, Any]]:
        """All logged lines, each with ``kind`` (train or eval), ``step``, ``epoch`` and the metrics by name."""
        return list(read_folder(self.folder).metrics)

    @property
    def metrics(self) -> Any:
        """`rows` as a pandas DataFrame.

        Raises:
            ConfigError: pandas is not installed.
        """
        try:
            from pandas import DataFrame
        except ImportError as error:
            how = "pip install pandas, or use result.rows, a list of dicts"
            raise ConfigError("result.metrics", "needs pandas, which is not installed", how) from error
        return DataFrame(self.rows)

    def plot(self) -> Any:
        """The report's curves, which a notebook displays and ``str`` renders as HTML."""
        from penchant.report import curves_of

        return curves_of(self.folder)


class Run:
    """Trains and evaluates one run.

    Args:
        shared: caches what other runs of this process can reuse; does not affect any metric.
        pause_at: an optimizer step at which training pauses, see `Loop`; a later call continues from there.
        console: for progress, instead of the terminal; tokenizer, rows: used instead of those of the config.
        check_memory: called before the first model is loaded; returns a sentence if the run may not fit, see `penchant.plan.memory_warning`.
        checkpointing: decides `train.gradient_checkpointing: auto`, see `penchant.plan.checkpointing`.
        cache: False recomputes a cached reference and leaves its files alone.
        callbacks: notified during training, see `penchant.training.callbacks`.
    """

    merges = True  # whether to merge an adapter given as a model into its base; False: use the base instead

    def __init__(
        self,
        config: RunConfig,
        *,
        quiet: bool = False,
        shared: Uncached | None = None,
        pause_at: int | None = None,
        console: Any = None,
        tokenizer: Any = None,
        rows: Rows | None = None,
        cache: bool = True,
        check_memory: Callable[[Run], str | None] | None = None,
        checkpointing: Callable[[Run], tuple[bool, str]] | None = None,
        callbacks: Sequence[Any] = (),
    ) -> None:
        self.world = current()
        self.console = make_console(quiet or not self.world.leads) if console is None else console
        config = with_model_folders(with_absolute_paths(config), self.console.note, merge=self.merges)
        self.config = config = within_context(config, self.console.note)
        self.method = config.method
        self.folder = Path(config.output)
        self.shared = Uncached() if shared is None else shared
        self.device, self.dtype = placed(config)
        self.rows = Rows(config, self.shared, self.console, tokenizer) if rows is None else rows
        self.pause_at, self.cache, self.check_memory = pause_at, cache, check_memory
        self.checkpointing = checkpointing
        self.callbacks = Callbacks(callbacks)
        self._is_open = False

    # ---- built from the config, once --------------------------------------------------------------------------------

    @cached_property
    def built(self) -> Built:
        """Model, optimizer, engine, reference and algorithm."""
        return build(self.config, self.rows, self.shared, self.console, cache=self.cache)

    @property
    def schedule(self) -> BatchSchedule:
        """Which rows each optimizer step trains on; needs the data, but no model."""
        t, row_count = self.config.train, len(self.rows.trees[0])
        settings = t.epochs, t.max_steps, t.seed, t.shuffle, self.method.updates, self.rows.shares
        return BatchSchedule(row_count, t.batch_size, *settings)

    @cached_property
    def held_out(self) -> HeldOut:
        """The evaluation on the held-out set."""
        sampler = None
        if self.rows.trees[1] and writes_completions(self.config, self.rows):
            sampler = completion_prompts(self.config, self.rows, self.device)
        return HeldOut(
            self.config,
            self.rows,
            self.built,
            self.folder,
            self.shared,
            self.console,
            self.schedule.total_steps,
            sampler,
        )

    # ---- train ------------------------------------------------------------------------------------------------------

    def train(self) -> TrainResult:
        """Train to the end (resuming automatically), evaluate, sample, write the report.

        With several processes, rank 0 leads and the others take part in the collective steps.
        """
        check_launch(self.config, self.world.size)
        check_offload(self.config, self.device)
        check_places(self.config)
        if self.world.many and self.device.type == "cuda" and torch.cuda.device_count() < self.world.local_size:
            what = f"{self.world.local_size} processes on this machine share {torch.cuda.device_count()} GPUs"
            raise ConfigError("launch.processes", what, "start one for each GPU, or set model.device=cpu")
        if not self.world.leads:
            return self._train_as_follower()
        try:
            return self._train_as_leader()
        except Exception as error:
            if not self._is_open:
                self.world.agree(error, patient=True)  # the other ranks are waiting for the rows
            raise

    def _release_ranks(self) -> None:
        """Release the other ranks: the run folder is open and the rows are cached."""
        self._is_open = True
        self.world.agree(patient=True)
        self.world.share(self.config.data.template_options)
        self.world.agree()

    def _train_as_follower(self) -> TrainResult:
        """Train on a rank other than 0: the parts of `_train_as_leader` that involve all ranks."""
        world, rows = self.world, self.rows
        world.agree(patient=True)  # the folder is open, and the rows are in the cache
        self._set_template_options(world.share(self.config.data.template_options))
        with world.together():
            _ = rows.trees, rows.mismatched
        manifest: dict[str, Any] | None
        manifest, is_new = world.share((None, True))
        loop = self.make_loop(manifest)
        self._check_start(manifest)
        self._samples("before", is_new)
        world.agree(patient=True)
        loop.run()
        self._samples("after", True)
        model_path = self.folder / CHECKPOINTS / f"step-{loop.state.step}" / "model"
        return TrainResult(self.folder, model_path, loop.state.step, {}, {}, loop.state.best_step)

    def _train_as_leader(self) -> TrainResult:
        from penchant.report import LiveReport

        started, began = time.time(), time.monotonic()
        check_run_folder(self.folder)
        report = LiveReport(self.folder, self.console.note)
        check_installed(self.config.logging.trackers)
        if not leads_to_model(Path(self.config.model.path)):
            check_model_path(self.config.model.path)  # before the rows are read
            check_weights(self.config.model)
        for reward in filter(None, (self.config.reward, self.config.evaluation.reward)):
            for name in filter(is_own, reward.terms):
                check_reward(name)  # before its content is compared with the recorded hash
        if self.config.rollout.environment is not None:
            find_environment(self.config.rollout.environment)
        self._set_template_date()
        hashes, rows = content_hashes(self.config), self.rows
        if self.config.data.sources:
            hashes |= {f"{CONTENT}source {name}": d.fingerprint for name, d in rows.datasets_by_source.items()}
        identity = run_identity(self.config, [d.fingerprint for d in rows.datasets if d is not None], hashes)

        def identity_with_tokens() -> dict[str, Any]:
            identity[TOKENS] = trees_sha256(rows)
            return identity

        with RunLock(self.folder), writing(self.folder):
            for note in open_run(
                self.folder, dump_config(self.config), identity, self._defaults(), identity_with_tokens
            ):
                self.console.note(note)
            self._write_rows()
            self._choose_checkpointing()
            self._check_fit()
            self._release_ranks()
            is_new = latest_checkpoint(self.folder)[0] is None
            for start_file in (self.folder / START_FILE, self.folder / START_LOSSES):
                if is_new:  # left over from an earlier start
                    start_file.unlink(missing_ok=True)
                elif not is_intact(start_file):
                    self.console.note(f"{start_file}: was changed after it was written, so it is left out")
            for remark in remarks(self.config, rows):
                self.console.note(remark)
            manifest = None if is_new else self._load_manifest()
            self.world.share((manifest, is_new))
            loop = self.make_loop(manifest)
            loop.identity = identity
            mirrors = Mirrors(self.folder, self.config.logging, self.config.model_dump(mode="json"), self.console.note)
            loop.on_progress = _progress_handler(report.on_event, mirrors, is_new)
            self._check_start(manifest)
            save_manifest = self._manifest_writer(loop, started, began, manifest)
            save_manifest("running", None)
            before = self._samples("before", is_new)
            with self.world.leading():
                self._check_space()
            try:
                with writing(self.folder):
                    loop.run()
                after = self._samples("after", True)
                with self._optional_write(SAMPLES):
                    join_samples(self.folder / SAMPLES, before, after)
                save_manifest("finished", None)
            except BaseException as error:
                status, why = _end_status(error)
                with suppress(OSError):  # perhaps the same full disk; an existing manifest stays intact
                    save_manifest(status, why)
                flags = write_flags(self.folder, self.console.note)
                report.now()
                mirrors.finish(status, nan_to_none(loop.state.last_eval))
                if not (loop.stop and isinstance(error, Paused)):
                    raise
                self.console.note(f"stopped by a callback: {error.what}")
            else:
                flags = write_flags(self.folder, self.console.note)
                report.now()
                mirrors.finish("finished", nan_to_none(loop.state.last_eval))
        evals = [line for line in read_folder(self.folder).metrics if line["kind"] == "eval"]
        result = TrainResult(
            folder=self.folder,
            model=self.folder / CHECKPOINTS / f"step-{loop.state.step}" / "model",
            steps=loop.state.step,
            before=evals[0] if evals and evals[0]["step"] == 0 else {},
            after=evals[-1] if evals else {},
            best_step=loop.state.best_step,
            flags=tuple(flags),
            stopped=loop.stop and loop.state.step < loop.schedule.total_steps,
        )
        self.callbacks("on_end", result)
        return result

    def _set_template_date(self) -> None:
        """Give a chat template that inserts today's date the day of the run's first start, also when resuming."""
        data, (identity, _) = self.config.data, load_identity(self.folder)
        if DATE in data.template_options:
            return
        day = mapping(mapping(mapping(mapping(identity).get("config")).get("data")).get("template_options")).get(DATE)
        if identity is None or (day is None and TOKENS not in identity):
            rewards = [r.terms for r in (self.config.reward, self.config.evaluation.reward) if r is not None]
            has_date = uses_chat(data.template, self.rows.tokenizer) and writes_date(self.rows.tokenizer)
            if has_date or any(reward_writes_date(name) for reward_terms in rewards for name in reward_terms):
                day = self._sweep_date() or date.today().isoformat()
                if identity is not None:
                    self.console.note(
                        f"{self.folder}: the day of its prompts was not kept; they have {day} from now on"
                    )
        elif day is not None and day != date.today().isoformat():
            self.console.note(f"the chat template writes the date: {day} as at this run's first start, not today's")
        if day is not None:
            self._set_template_options({**data.template_options, DATE: day})

    def _set_template_options(self, template_options: Mapping[str, Any]) -> None:
        data = self.config.data.model_copy(update={"template_options": dict(template_options)})
        self.config = self.rows.config = self.config.model_copy(update={"data": data})

    def _sweep_date(self) -> str | None:
        """The date in the prompts of this sweep's other runs, which it is compared with; None if there is none."""
        if not (self.folder.parent / SWEEP).is_file():
            return None
        identities = (read_folder(p.parent).identity for p in sorted(self.folder.parent.glob(f"*/{IDENTITY}")))
        days = (
            mapping(mapping(mapping(mapping(o).get("config")).get("data")).get("template_options")).get(DATE)
            for o in identities
        )
        return min((str(day) for day in days if day), default=None)

    def _defaults(self) -> dict[str, Any]:
        """Values of the settings that an older version's run folder does not record."""
        defaults = default_settings()
        if self.config.algorithm is not None:
            fields = type(self.config.algorithm).model_fields.items()
            defaults["algorithm"] = {n: i.get_default() for n, i in fields if not i.is_required()}
        defaults["data"]["template_options"] = {k: v for k, v in self.config.data.template_options.items() if k == DATE}
        return {"config": defaults}

    def _optional_write(self, name: str) -> AbstractContextManager[None]:
        """Write a file that the run can do without: a failure is only noted."""
        return optional_write(self.folder / name, self.console.note)

    def _write_rows(self) -> None:
        """Write the quarantined rows and the audit."""
        rows = self.rows
        for name, dataset in rows.loaded.items():
            with self._optional_write(f"quarantine.{name}.jsonl"):
                write_quarantine(dataset.quarantined, self.folder, name)
        for name, tokenized in zip(("train", "heldout"), rows.tokenized, strict=True):
            if tokenized is not None:
                self.console.note(f"{name}: {tokenized.summary()}")
                with self._optional_write(f"quarantine.{name}.tokens.jsonl"):
                    write_quarantine(tokenized.quarantined, self.folder, f"{name}.tokens")
        audit = rows.audit().to_json()
        with self._optional_write(AUDIT):
            write_summed(self.folder / AUDIT, json.dumps(audit, indent=1))
        if warning := summary(run_flags((), self.config.model_dump(mode="json"), audit, trust=self.config.trust)):
            self.console.note(warning)

    def _choose_checkpointing(self) -> None:
        """Resolve `gradient_checkpointing: auto`; a resumed run keeps its first choice."""
        if self.config.train.gradient_checkpointing != "auto":
            return
        previous = mapping(read_folder(self.folder).manifest).get("gradient_checkpointing")
        if latest_checkpoint(self.folder)[0] is not None and previous in ("off", "layers"):
            checkpointing, reason = previous == "layers", "as the run began"
        else:
            try:
                checkpointing, reason = (
                    (False, "not estimated") if self.checkpointing is None else self.checkpointing(self)
                )
            except Exception:  # the estimate failed
                checkpointing, reason = True, "its memory could not be estimated"
        self.console.note(f"gradient checkpointing: {'layers' if checkpointing else 'off'} ({reason})")
        train = self.config.train.model_copy(update={"gradient_checkpointing": checkpointing})
        self.config = self.rows.config = self.config.model_copy(update={"train": train})

    def _check_fit(self) -> None:
        """Write a note if the run may not fit. A failed estimate never stops the run."""
        if (
            self.check_memory is None or self.world.many or self.config.model.sees
        ):  # it covers one process, and text only
            return
        try:
            warning = self.check_memory(self)
        except Exception:  # the estimate failed; the run itself will either train or report why
            warning = None
        if warning:
            self.console.note(warning)

    def _check_space(self) -> None:
        """Write a note before the first step if the disk has no room for all checkpoints.

        Raises:
            DiskError: there is no room for a single one.
        """
        keep_last, free = self.config.checkpoint.keep_last, free_bytes(self.folder)
        size = checkpoint_bytes(self.config, self.built.parts.model, self.dtype)
        remaining = max(1, keep_last + self.config.checkpoint.keep_best + 1 - len(checkpoints(self.folder)))
        if free is None or free >= size * remaining:
            return
        requirement = f"a checkpoint takes about {gigabytes(size)}"
        if free < size:
            how = "free some space, or choose another output, then run the same command again"
            raise DiskError(str(self.folder), f"{requirement} and its disk has {gigabytes(free)} free", how)
        self.console.note(
            f"{self.folder}: {requirement}, up to {remaining} more are kept at a time, and its disk has {gigabytes(free)} free; "
            "see checkpoint.keep_last and checkpoint.every"
        )

    def make_loop(self, old_manifest: Mapping[str, Any] | None = None) -> Loop:
        """Create the run's training loop; nothing is written until it runs.

        Args:
            old_manifest: manifest.json of the run being resumed; its learning rate is kept even if auto has changed since.
        """
        cfg, rows = self.config, self.rows
        # a judge that cannot be loaded fails before any work is done
        held_out = self.held_out if rows.trees[1] else None
        built = self.built
        model = built.parts.model
        tolerance, reference = None, built.parts.reference
        same_start = cfg.reference.path is None and cfg.model.init == "pretrained"
        if cfg.model.adapter is not None and cfg.lora is not None and cfg.lora.dropout:
            same_start = False  # a new adapter adds zero despite dropout; a trained one does not
        if reference is not None and same_start and self.method.rollouts is None:
            # nats per completion and per token: a cache may be packed differently, and rounding errors add up over tokens
            tolerances = {torch.bfloat16: (1.0, 0.05), torch.float32: (1e-3, 1e-4), torch.float64: (1e-9, 1e-10)}
            # a compiler may fuse passes with a gradient in another way than those without
            is_exact = reference.exact and cfg.model.kernels != "compile"
            tolerance = (0.0, 0.0) if is_exact else tolerances[self.dtype]
        return Loop(
            model=model,
            algorithm=built.algorithm,
            optimizer=built.optimizer,
            trees=rows.trees[0],
            shares=rows.shares,
            shared=built.parts.engine.shared,
            folder=self.folder,
            train=cfg.train,
            peak_lr=peak_lr(cfg, rows, sum(p.numel() for p in model.parameters()), old_manifest),
            evaluation=cfg.evaluation,
            checkpoint=cfg.checkpoint,
            logging=cfg.logging,
            write_model=partial(model_writer, built, rows),
            console=self.console,
            evaluate=None if held_out is None else self._evaluate_in_training,
            start_tolerance=tolerance,
            router=built.router,
            updates=self.method.updates,
            pause_at=self.pause_at,
            callbacks=self.callbacks,
            background=cfg.launch.background if cfg.launch.background != "auto" else self.device.type == "cuda",
        )

    # ---- evaluate ---------------------------------------------------------------------------------------------------

    def _evaluate_in_training(self, step: int) -> dict[str, Any]:
        metrics = self.held_out.at(step, keep=True)
        if self.held_out.tables and self.world.leads:
            with self._optional_write(CALIBRATION):
                write_summed(self.folder / CALIBRATION, json.dumps({"step": step, **self.held_out.tables}, indent=1))
        return metrics

    def evaluate(self, step: str = "last") -> dict[str, Any]:
        """Held-out metrics of a checkpoint (``last``, ``best`` or a number), or of the start (``0``)."""
        if not self.rows.trees[1]:
            how = "set data.eval_path or data.validation_rows"
            raise ConfigError("data", "there is nothing held out to evaluate on", how)
        path = find_checkpoint(self.folder, step)
        if path is None and step != "0" and (self.folder / IDENTITY).exists():
            how = "train it on, or give --step 0 for the model it starts from"
            raise CheckpointError(str(self.folder), "this run has no checkpoint yet", how)
        built, held_out = self.built, self.held_out
        if path is not None:
            self._check_start(self._load_manifest())
            tensors, _state = load_checkpoint(path)
            built.optimizer.load_state_tensors(tensors)
            built.algorithm.load_state_tensors(algorithm_state(tensors))
        built.parts.model.eval()
        steps = 0 if path is None else int(path.name.removeprefix("step-"))
        metrics = {"checkpoint": path.name if path else "start", **held_out.at(steps)}
        return metrics | ({"tables": held_out.tables} if held_out.tables else {})

    # ---- record -----------------------------------------------------------------------------------------------------

    def _samples(self, name: str, is_new: bool) -> list[dict[str, Any]]:
        """Greedy completions before or after training; a resumed run reads back those from before."""
        path = self.folder / f"samples.{name}.jsonl"
        if not has_samples(self.config, self.rows):
            return []
        stored = self.world.share(None if is_new or not self.world.leads else self._stored_samples(path))
        if stored is not None:
            return stored
        key = start_key(self.config) if name == "before" else None
        with whole_weights(self.built.parts.engine):
            return write_samples(path, self.rows, self.built.parts.model, self.shared, key, self.console.note)

    def _stored_samples(self, path: Path) -> list[dict[str, Any]] | None:
        """The stored completions from before training; None, with a note, if they have to be generated again."""
        run_folder = read_folder(self.folder)
        rows = run_folder.samples_before
        is_readable = is_intact(path) and path.exists() and not run_folder.unreadable.get(path.name)
        if is_readable and all("prompt" in row and "completion" in row for row in rows):
            return rows
        self.console.note(f"{path}: is missing or was modified; writing it again")
        return None

    def _check_start(self, old_manifest: Mapping[str, Any] | None) -> None:
        """Refuse to resume if the starting weights are not those that the checkpoints were trained from.

        Args:
            old_manifest: the run's manifest.json, or None to skip the check.

        Raises:
            CheckpointError: the weights at model.path have changed. Not checked with another torch version or dtype.
        """
        is_random = self.method.learns_reward or self.config.model.init == "random"  # weights vary by processor
        if is_random or old_manifest is None:
            return
        dtype = str(self.dtype).removeprefix("torch.")
        if (old_manifest["hardware"]["dtype"], old_manifest.get("torch")) != (dtype, versions()["torch"]):
            return
        if self.built.start_sha256(self.shared) != old_manifest["model"]["sha256"]:
            what = f"its weights are not those that {self.folder} was trained from"
            raise CheckpointError(self.config.model.path, what, "put them back, or choose another output")

    def _load_manifest(self) -> dict[str, Any] | None:
        """The run's manifest.json; None if it is missing or, with a note, damaged."""
        path = self.folder / MANIFEST
        if not path.exists():
            return None
        manifest = read_folder(self.folder).manifest
        try:
            _ = manifest["model"]["sha256"], manifest["hardware"]["dtype"]
            if is_intact(path):
                return manifest
        except (KeyError, TypeError):
            pass
        self.console.note(
            f"{path}: was changed after it was written; it is unknown whether the run started from the weights that "
            f"are now at {self.config.model.path}"
        )
        return None

    def _manifest_writer(
        self, loop: Loop, started: float, started_monotonic: float, old_manifest: Mapping[str, Any] | None
    ) -> Callable[[str, str | None], None]:
        """A function that writes manifest.json; the starting weights are hashed now, or their hash is taken from `old_manifest`.

        Args:
            started: seconds since the epoch; started_monotonic: the same moment on the monotonic clock, which is never adjusted.
        """
        path, built = self.folder / MANIFEST, self.built
        sha256 = built.start_sha256(self.shared) if old_manifest is None else old_manifest["model"]["sha256"]

        earlier_seconds = max(0.0, number_of((old_manifest or {}).get("seconds")) or 0.0)

        def write(status: str, why: str | None) -> None:
            steps = loop.state.step, loop.schedule.total_steps
            seconds = earlier_seconds + time.monotonic() - started_monotonic
            write_manifest(path, self.rows, built, sha256, started, seconds, steps, status, why, loop.peak_lr)

        return write


def _progress_handler(report: Callable[[str], None], mirrors: Mirrors, is_new: bool) -> Callable[[str], None]:
    def on_event(event: str) -> None:
        if event == "start":
            mirrors.begin(anew=is_new)
            return
        report(event)
        mirrors.poll()

    return on_event


def _end_status(error: BaseException) -> tuple[str, str | None]:
    """(status, why) of a run that ended early."""
    if isinstance(error, Paused):
        return "paused", f"at step {error.step}"
    if isinstance(error, (Interrupted, KeyboardInterrupt)):
        return "interrupted", None
    return "stopped", error.what if isinstance(error, PenchantError) else f"{type(error).__name__}: {error}"
