"""The training loop: accumulation by global counts, clipping, logging, evaluation, checkpoints, exact resume.

The rows, learning rate and dropout seed of a step depend only on (config, seed, step). A killed run continues from its
last checkpoint and ends bit for bit where an uninterrupted run ends.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch

from penchant.base.files import optional_write, write_atomically
from penchant.base.lanes import Turns, in_order, side_by_side
from penchant.base.machine import in_fp64, peak_memory, place_of
from penchant.data.packing import max_concurrent_passes, pack, plan_for_ranks, plan_passes, tree_tokens
from penchant.distributed.world import World, agreed, current
from penchant.errors import CheckpointError, PenchantError, TrainingStopped
from penchant.losses.schedules import progress_at
from penchant.models.router import RouterLoss
from penchant.runfolder import CHECKPOINTS, METRICS, PERF, MetricsLog, NullLog, nan_to_none
from penchant.training.callbacks import Callbacks
from penchant.training.checkpoint import (
    copy_to_host,
    latest_checkpoint,
    load_checkpoint,
    prune,
    save_checkpoint,
    save_sharded,
)
from penchant.training.console import PlainConsole
from penchant.training.optim import MasterAdamW, learning_rate
from penchant.training.options import CheckpointConfig, EvalConfig, LoggingConfig, TrainConfig
from penchant.training.own import loss_of, state_of, weights_of
from penchant.training.steps import BatchSchedule, Share, Summed, Totals, is_due, on_host, reduced, repeatable
from penchant.types import FURTHER, Algorithm, LossOutput, PackedBatch, Scored, TokenTree

Metrics = dict[str, Any]
T = TypeVar("T")


@dataclass(slots=True)
class RunState:
    """Progress of a run, saved in each checkpoint."""

    step: int = 0
    tokens: int = 0
    best_step: int | None = None
    best_value: float | None = None
    last_eval: Metrics = field(default_factory=dict)


@dataclass(slots=True)
class Loop:
    """Trains one run.

    Args:
        model: the trainable model; algorithm: computes losses from its batches.
        trees: the training set; shared: whether packing shares prompts.
        write_model: takes a snapshot of the model and returns a function that writes it as a checkpoint's model folder.
        evaluate: metrics of the held-out set (keys start with ``eval/``), or None.
        updates: optimizer steps per batch (online methods: per batch of rollouts).
        on_progress: called with ``"start"`` once the logs are truncated to where the run continues, and with ``"step"`` and
            ``"eval"`` after the line of each step and evaluation is written.
        callbacks: notified of steps, evaluations and checkpoints; may set `stop`, which ends the run as `pause_at` does.
        identity: of the run, also stored in its checkpoints.
        pause_at: a step before the end at which to write a checkpoint, evaluate and raise `Paused`; None: no pause.
        router: balance loss of the model's router, added to the method's loss; None: none.
        start_tolerance: allowed difference between the log-probs of policy and reference at step 0, when both are one
            model: nats per completion, and per token (0 and 0 for a reference that runs the same kernels on the same
            batch); None: no check.
        world: the ranks that take each step together; only rank 0 writes logs.
        background: whether several processes keep training while a checkpoint is written.
    """

    model: Any
    algorithm: Algorithm
    optimizer: MasterAdamW
    trees: Sequence[TokenTree]
    shared: bool
    folder: Path
    train: TrainConfig
    peak_lr: float
    evaluation: EvalConfig
    checkpoint: CheckpointConfig
    logging: LoggingConfig
    write_model: Callable[[], Callable[[Path], None]]
    console: PlainConsole
    evaluate: Callable[[int], Metrics] | None = None
    start_tolerance: tuple[float, float] | None = None
    router: RouterLoss | None = None
    updates: int = 1
    on_progress: Callable[[str], None] = lambda _: None
    callbacks: Callbacks = field(default_factory=Callbacks)
    stop: bool = False
    pause_at: int | None = None
    state: RunState = field(default_factory=RunState)
    identity: Mapping[str, Any] = field(default_factory=dict)
    interrupted: int | None = None
    shares: tuple[Share, ...] = ()
    world: World = field(default_factory=current)
    background: bool = False
    _pending_checkpoint: tuple[Future[Path], Callable[[], None]] | None = (
        None  # a checkpoint in progress, and its callback
    )
    _writer_world: World | None = None  # the same ranks, with a process group for the writing threads
    _has_ordered_hooks: bool = False
    _prefetched: tuple[int, Callable[[], tuple[Sequence[TokenTree], Sequence[PackedBatch]]]] | None = None

    @property
    def schedule(self) -> BatchSchedule:
        t = self.train
        settings = t.epochs, t.max_steps, t.seed, t.shuffle, self.updates, self.shares
        return BatchSchedule(len(self.trees), t.batch_size, *settings)

    @property
    def device(self) -> torch.device:
        """The model's device."""
        device: torch.device = place_of(self.model)
        return device

    def run(self) -> RunState:
        """Train to the end, resuming from the last checkpoint if there is one.

        Raises:
            TrainingStopped: NaN/Inf, a failed step-0 check, or a signal (after writing a checkpoint).
            Paused: at `pause_at`. CheckpointError: the run is already beyond `pause_at`.
        """
        schedule = self.schedule
        total = schedule.total_steps
        metrics = MetricsLog(self.folder / METRICS) if self.world.leads else NullLog()
        perf = MetricsLog(self.folder / PERF, self.console.note) if self.world.leads else NullLog()
        resumed = self._resume(metrics)
        if not resumed:
            metrics.truncate(0)
        self.on_progress("start")
        if not resumed and self.evaluate is not None and self.evaluation.at_start:
            self._evaluate(metrics, schedule)
        self._check_pause(total)
        with _signals(self), self._finish_pending_checkpoint():
            for step in range(self.state.step, total):
                started = time.perf_counter()
                line, tokens, trees = self.take_step(step, schedule)
                self.state.step = step + 1
                self.state.tokens += tokens
                if (step + 1) % self.logging.every == 0 or step + 1 == total:
                    metrics.write(line)
                seconds = time.perf_counter() - started
                speed: Metrics = {
                    "step": step + 1,
                    "seconds": seconds,
                    "tokens_per_second": tokens / seconds,
                    "trees_per_second": trees / seconds,
                    "peak_memory_gb": peak_memory(self.device) / 2**30,
                }
                perf.write(speed)
                self.console.step(step + 1, total, {**line, **speed, "rows": trees})
                self._notify_callbacks("on_step", step + 1, line)
                self._after_step(metrics, schedule, total)
                self.on_progress("step")
        return self.state

    def _after_step(self, metrics: MetricsLog, schedule: BatchSchedule, total: int) -> None:
        step = self.state.step
        is_last = step == total
        ends_epoch = schedule.ends_epoch(step)
        is_saved = is_last or is_due(self.checkpoint.every, step, ends_epoch)
        if self.evaluate is not None and (is_last or is_due(self.evaluation.every, step, ends_epoch)):
            self._evaluate(metrics, schedule, may_be_best=is_saved)
        signum, stop = self._asked_to_stop()
        paused = (stop or step == self.pause_at) and not is_last
        if is_saved or paused or signum is not None:
            self._save(metrics, wait=is_last or paused or signum is not None)
            signum, stop = self._asked_to_stop()  # again, as saving takes a while and calls callbacks
            paused |= stop and not is_last
        if signum is not None and not is_last:
            raise agreed(
                Interrupted(
                    str(self.folder),
                    f"stopped by {signal.Signals(signum).name} at step {step} of {total}; a checkpoint was written",
                    "run the same command to continue",
                )
            )
        if paused:
            self._pause(total)

    def _asked_to_stop(self) -> tuple[int | None, bool]:
        """The signal that any rank received, or None, and whether a callback asked to stop the run."""
        is_written = self._pending_checkpoint is not None and self._pending_checkpoint[0].done()
        reports = self.world.gather((self.interrupted, self.stop, is_written))
        if all(done for *_, done in reports):  # all ranks get here together, so one rank's error is raised on all
            self._wait_for_checkpoint()
            reports = self.world.gather((self.interrupted, self.stop, is_written))
        return next((n for n, *_ in reports if n is not None), None), any(stop for _, stop, _ in reports)

    def _notify_callbacks(self, event: str, *args: Any) -> None:
        if self.callbacks.callbacks and self.world.leads:
            self.stop |= self.callbacks(event, *args)

    def _check_pause(self, total: int) -> None:
        """Pause now if a resumed run is already at `pause_at`; CheckpointError if it is beyond."""
        if self.pause_at is None or self.state.step < self.pause_at or self.pause_at >= total:
            return
        if self.state.step > self.pause_at:
            raise CheckpointError(
                str(self.folder),
                f"is at step {self.state.step} already, beyond step {self.pause_at}, at which it was to pause",
                "let it finish, or move the folder away to retrain it",
            )
        self._pause(total)

    def _pause(self, total: int) -> NoReturn:
        """Raise `Paused` with the held-out metrics of this step.

        They are not logged if no evaluation was due, so that the run's files match those of a run that never paused.
        """
        step, last_eval = self.state.step, self.state.last_eval
        if last_eval.get("step") == step:
            values = {k: v for k, v in last_eval.items() if k not in ("kind", "step", "epoch")}
        else:
            self.model.eval()
            values = self.evaluate(step) if self.evaluate is not None else {}
        raise Paused(str(self.folder), step, total, nan_to_none(values))

    def take_step(self, step: int, schedule: BatchSchedule) -> tuple[Metrics, int, int]:
        """Take one optimizer step, without logging, evaluation or checkpoints.

        Args:
            step: 0-based; schedule: the loop's `schedule`, made once for many steps.

        Returns:
            Its metrics line, its tokens and its trees.

        Raises:
            TrainingStopped: NaN/Inf, or a failed step-0 check.
        """
        total = schedule.total_steps
        scheduled, packed = self._step_rows(step, schedule)
        self._seed(step, 0, rank=0)
        self.model.train()
        trees = self.algorithm.begin_step(step, progress_at(step, total), scheduled)
        if self.world.many:
            self._check_rows(step, None if trees is scheduled else trees)
            self._seed(step, 0)
        self.algorithm.look_ahead(step, total, lambda later: [self.trees[i] for i in schedule.batch(later)])
        batches = packed if packed is not None and trees is scheduled else self._micro_batches(trees)
        if not batches:
            return self._empty_step(step, schedule), 0, 0
        batches = [replace(b, seed=self._seed_of(step, i)) for i, b in enumerate(batches)]
        for batch in batches:
            batch.columns |= self.algorithm.columns(batch)
        if packs_ahead(self.device) and trees is scheduled and step + 1 < total:
            self._prefetched = step + 1, in_background(lambda: self._pack_step(step + 1, schedule))
        weights = [weights_of(self.algorithm, b) for b in batches if not b.idle]
        counts = self.world.sums({name: sum(w[name] for w in weights) for name in (weights[0] if weights else ())})
        if self.router is not None:
            self.router.begin_step(self.model, batches)
        means, grad_norm = self._backward(step, batches, counts)
        if self.router is not None:
            means["router_aux_loss"] = self.router.end_step()
            means["loss"] += self.router.coef * means["router_aux_loss"]
        t = self.train
        lr = learning_rate(step, total, self.peak_lr, t.schedule, t.warmup_fraction, t.min_lr_fraction)
        self._check_limits(step, means, batches)
        values = self.algorithm.step_values()
        accepted = self.algorithm.accepts(means)
        if accepted:
            self.optimizer.step(lr)
        else:
            self.optimizer.zero_grad()
        self.algorithm.end_step(step + 1, means)
        tokens = sum(tree_tokens(t, self.shared) for t in trees)
        line = {
            **_line_header("train", step + 1, schedule),
            **means,
            **values,
            "lr": lr,
            "grad_norm": grad_norm,
            "tokens": self.state.tokens + tokens,
        }
        if not accepted:
            line["skipped"] = "the method refused this step"
        return line, tokens, len(trees)

    def _empty_step(self, step: int, schedule: BatchSchedule) -> Metrics:
        """The metrics line of a step with nothing to learn from (every group's rewards are equal); the weights stay unchanged."""
        line = {
            **_line_header("train", step + 1, schedule),
            **self.algorithm.step_values(),
            "skipped": "nothing to learn from in this step",
            "tokens": self.state.tokens,
        }
        self.algorithm.end_step(step + 1, {})
        return line

    def _step_rows(
        self, step: int, schedule: BatchSchedule
    ) -> tuple[Sequence[TokenTree], Sequence[PackedBatch] | None]:
        """The rows of a step, and its batches if they were packed during the previous step."""
        prefetched, self._prefetched = self._prefetched, None
        if prefetched is not None and prefetched[0] == step:
            return prefetched[1]()
        return [self.trees[i] for i in schedule.batch(step)], None

    def _pack_step(self, step: int, schedule: BatchSchedule) -> tuple[Sequence[TokenTree], Sequence[PackedBatch]]:
        """The rows of a step and their batches, pinned for the GPU."""
        trees = [self.trees[i] for i in schedule.batch(step)]
        return trees, [b.pinned() if self.device.type == "cuda" else b for b in self._micro_batches(trees)]

    def _micro_batches(self, trees: Sequence[TokenTree]) -> list[PackedBatch]:
        """Pack a step's micro-batches on the CPU, so that their weights can be read without waiting for the device.

        With several processes, each takes its share of one plan and runs the same number of passes; a rank without trees left
        runs the smallest tree with zero weight.
        """
        sizes = [tree_tokens(t, self.shared) for t in trees]
        if self.world.many:
            shares = plan_for_ranks(sizes, self.train.tokens_per_step, self.world.dealers)[
                self.world.dealer :: self.world.dealers
            ]
            smallest = min(range(len(sizes)), key=lambda i: sizes[i], default=0)
            passes = [(m, pack([trees[i] for i in m or [smallest]], shared=self.shared)) for m in shares]
            return [replace(batch, idle=not members) for members, batch in passes]
        lanes, strands = self.algorithm.side_by_side, self.algorithm.strands
        plan = plan_passes(sizes, self.train.tokens_per_step, lanes, len(strands))
        packed = [pack([trees[i] for i in members], shared=self.shared) for members in plan]
        return [replace(b, strand=s) for s in strands for b in packed] if lanes else packed

    def _backward(
        self, step: int, batches: Sequence[PackedBatch], counts: Mapping[str, float]
    ) -> tuple[dict[str, float], float]:
        """Compute and clip the step's gradients; return the means of its loss and metrics, and the norm before clipping."""
        totals = Totals()
        with repeatable(self.device, self.train.deterministic):
            if self.algorithm.coupled and (len(batches) > 1 or self.world.many):
                self._backward_coupled(step, [b.to(self.device) for b in batches], counts, totals)
            else:

                def backward(_: int, batch: PackedBatch) -> Summed:
                    out = self._loss(step, self.algorithm.score(batch.to(self.device)))
                    loss = reduced(out, counts)
                    (loss * 0.0 if batch.idle else loss).backward()
                    return Totals.summed(out)

                for batch, summed in zip(batches, self._map_batches(backward, batches), strict=True):
                    if not batch.idle:
                        totals.append(summed)
        (grad_norm,) = totals.read(self.optimizer.clip(self.train.max_grad_norm))
        totals.join(self.world)
        if not totals.finite:
            self._dump_and_stop(step, "the loss is NaN or infinite", batches)
        if not math.isfinite(grad_norm):
            self._dump_and_stop(step, f"the gradient norm is {grad_norm}", batches)
        if grad_norm == 0.0 and step == 0:
            values = self.algorithm.step_values()
            reason = "with these settings and rows nothing is learned"
            if "frac_reward_zero_std" in values:  # a later step's completions may teach something
                names = ("frac_reward_zero_std", "completions/ended")
                figures = ", ".join(f"{n} {values[n]:.2g}" for n in names if n in values)
                reason = f"completions of equal reward, and those left out, teach nothing ({figures})"
            self.console.note(f"the gradient of the first step is exactly zero: {reason}")
        return totals.means(), grad_norm

    def _backward_coupled(
        self, step: int, batches: Sequence[PackedBatch], counts: Mapping[str, float], totals: Totals
    ) -> None:
        """Backward pass, in micro-batches, for a loss that couples the examples of a step.

        A pass without gradient gives the step's log-probs, and the loss over all of them gives d loss / d log-prob for each.
        A second pass (or the first one, if the step fits as a whole) propagates those back. The gradient is that of one big batch.
        """
        fits = self.algorithm.side_by_side and sum(b.tokens for b in batches) <= self.train.tokens_per_step

        def score(i: int, batch: PackedBatch) -> Scored:
            self._seed(step, i)
            scored: Scored = self.algorithm.score(batch)
            return scored

        with torch.set_grad_enabled(fits):
            parts = list(self._map_batches(score, batches))
        own_parts = tuple(part for part, b in zip(parts, batches, strict=True) if not b.idle)
        all_parts = self.world.gather_tensors(own_parts, self.device) if self.world.many else [own_parts]
        combined = Scored.cat([part for rank_parts in all_parts for part in rank_parts])
        leaf = combined.policy_logps.detach().requires_grad_()
        out = self._loss(step, replace(combined, policy_logps=leaf))
        (grad,) = torch.autograd.grad(reduced(out, counts), leaf)
        if self.world.leads:  # every rank computed the whole step's loss
            totals.add(out)
        offset = sum(len(part.lengths) for rank_parts in all_parts[: self.world.rank] for part in rank_parts)
        own_grads = iter(
            grad[offset:].split(
                [*(len(p.lengths) for p in own_parts), len(grad[offset:]) - sum(len(p.lengths) for p in own_parts)]
            )
        )
        grads = [torch.zeros_like(b.lengths, dtype=grad.dtype) if b.idle else next(own_grads) for b in batches]
        del combined, all_parts

        def backward(i: int, batch: PackedBatch) -> None:
            logps = (parts[i] if fits else score(i, batch)).policy_logps
            (logps * grads[i]).sum().backward()

        list(self._map_batches(backward, batches))

    def _map_batches(self, function: Callable[[int, PackedBatch], T], batches: Sequence[PackedBatch]) -> Iterator[T]:
        """Map `function` over (number, batch), in parallel if the algorithm allows; gradients are summed in batch order."""
        if not self.algorithm.side_by_side:
            yield from map(function, range(len(batches)), batches)
            return
        if not self._has_ordered_hooks:
            for p in self.optimizer.params.values():
                in_order(p)
            self._has_ordered_hooks = True
        turns = Turns([b.strand for b in batches])
        trees = self.train.batch_size * len({b.strand for b in batches})
        max_parallel = max_concurrent_passes([b.tokens for b in batches], self.train.tokens_per_step, trees)
        yield from side_by_side(lambda i: function(i, batches[i]), range(len(batches)), most=max_parallel, turns=turns)
        with torch.no_grad():
            turns.close()

    def _loss(self, step: int, scored: Scored) -> LossOutput:
        if step == 0 and self.start_tolerance is not None:
            self._check_start(scored)
        return loss_of(self.algorithm, scored)

    def _check_start(self, scored: Scored) -> None:
        """Check that policy and reference, which are the same model before the first step, give equal log-probs."""
        assert self.start_tolerance is not None
        if not isinstance(scored, Scored) or scored.ref_logps is None:
            return
        differences = (scored.policy_logps.detach() - scored.ref_logps).abs()
        per_completion, per_token = self.start_tolerance
        worst_index = (differences - per_token * scored.lengths).argmax()[None]
        difference, length = on_host(
            torch.cat([in_fp64(v).index_select(0, worst_index) for v in (differences, scored.lengths)])
        )
        allowed = per_completion + per_token * length
        if not difference <= allowed:
            raise TrainingStopped(
                f"{self.folder}: step 0",
                f"policy and reference should be equal, but a completion's log-probs differ by {difference:.3g} nats "
                f"(allowed: {allowed:.3g})",
                "the reference is not the model that training starts from, or a stale cache; delete the cache or set "
                "reference.kind=frozen",
            )

    def _check_limits(self, step: int, means: Mapping[str, float], batches: Sequence[PackedBatch]) -> None:
        """Stop a run that diverges under an objective without a lower bound, before everything is NaN."""
        t = self.train
        logp = means.get("logps/per_token", 0.0)
        if t.logp_floor is not None and logp < t.logp_floor:
            self._dump_and_stop(
                step,
                f"the mean log-prob of its completions is {logp:.1f} nats a token, below train.logp_floor={t.logp_floor:g}: "
                "the policy is diverging",
                batches,
                "lower train.lr, raise the loss's beta (PMPO has a minimum only where beta outweighs the rejected answers; see "
                "docs/losses.md), or set train.logp_floor=null",
            )
        # a loss of a mix other than the first has its name before it; loss/... are terms of the loss
        by_loss = (v for n, v in means.items() if n.split("/")[-1] == "divergence" and not n.startswith("loss/"))
        divergence = max(by_loss, default=0.0)
        if t.divergence_ceiling is not None and divergence > t.divergence_ceiling:
            self._dump_and_stop(
                step,
                f"the divergence from the reference is {divergence:.2f} nats a token, above "
                f"train.divergence_ceiling={t.divergence_ceiling:g}",
                batches,
                "raise loss.beta, lower train.lr, or raise the ceiling",
            )

    def _check_rows(self, step: int, trees: Sequence[TokenTree] | None) -> None:
        """Refuse a step if ranks have different rows, as with a user's own method; None: the rows come from the data."""
        rows_by_rank = self.world.gather(
            None if trees is None else [(t.row, tree_tokens(t, self.shared)) for t in trees]
        )
        if any(rows != rows_by_rank[0] for rows in rows_by_rank):
            raise agreed(
                TrainingStopped(
                    f"{self.folder}: step {step}",
                    "the processes have different rows for this step",
                    "a method must write the same on each of them: seed what it draws by the step, or draw with torch alone",
                )
            )

    def _seed_of(self, step: int, micro_batch: int, rank: int | None = None) -> int:
        """Seed of a micro-batch from the run's seed and the step, so that (LoRA) dropout is the same after a resume.

        A CPU generator reads only the low 32 bits, so the seed must reach them.
        """
        micro_batch = micro_batch * self.world.size + (self.world.rank if rank is None else rank)
        return (self.train.seed * 0x9E3779B1 + (step << 10) + micro_batch) % 2**32

    def _seed(self, step: int, micro_batch: int, rank: int | None = None) -> None:
        seed = self._seed_of(step, micro_batch, rank)
        # torch.manual_seed formats the stack for each absent accelerator, which takes a millisecond
        (torch.default_generator if self.device.type == "cpu" else torch).manual_seed(seed)

    def _dump_and_stop(
        self,
        step: int,
        what: str,
        batches: Sequence[PackedBatch],
        how: str = "lower train.lr, set train.max_grad_norm, or look at those rows",
    ) -> NoReturn:
        path = self.folder / f"stopped-batch-step-{step}.json"
        rows = [
            r for part in self.world.gather([r % FURTHER for b in batches if not b.idle for r in b.rows]) for r in part
        ]
        sources = {t.row: t.source for t in self.trees if t.row in set(rows)}
        if self.world.leads:
            with optional_write(path, self.console.note):
                entries = [{"row": r, "source": sources[r]} for r in rows]
                write_atomically(path, {"step": step, "what": what, "rows": entries})
        raise agreed(
            TrainingStopped(
                f"{self.folder}: step {step}",
                f"{what}; the step was not taken and its rows are listed in {path.name}",
                how,
            )
        )

    def _evaluate(self, metrics: MetricsLog, schedule: BatchSchedule, may_be_best: bool = False) -> None:
        """Evaluate and log; only a step that gets a checkpoint may be the best one."""
        assert self.evaluate is not None
        self.model.eval()
        values = self.world.share(self.evaluate(self.state.step))
        line = _line_header("eval", self.state.step, schedule) | values
        metrics.write(line)
        self.on_progress("eval")
        self._notify_callbacks("on_evaluation", self.state.step, line)
        self.console.evaluated(self.state.step, line)
        self.state.last_eval = line
        value = values.get(self.checkpoint.metric)
        if value is None or math.isnan(value) or not may_be_best:
            return
        best = self.state.best_value
        is_better = best is None or (value < best if self.checkpoint.mode == "min" else value > best)
        if is_better:
            self.state.best_value, self.state.best_step = float(value), self.state.step

    def _save(self, metrics: MetricsLog, wait: bool = True) -> None:
        """Write a checkpoint, in the background if that is enabled and `wait` is False."""
        self._wait_for_checkpoint()
        step, best, algorithm = self.state.step, self.state.best_step, state_of(self.algorithm)
        log_state = {"metrics_offset": metrics.offset(), "metrics_sha256": metrics.sha256()}
        contents: dict[str, Any] = {
            "write_model": self.write_model(),
            "tensors": self.optimizer.state_tensors() | {f"algorithm/{n}": value for n, value in algorithm.items()},
            "state": nan_to_none(asdict(self.state)) | log_state | {"identity": nan_to_none(self.identity)},
        }

        def after_save() -> None:
            if self.world.leads:
                prune(self.folder, self.checkpoint.keep_last, best if self.checkpoint.keep_best else None)
                self._notify_callbacks("on_checkpoint", step, self.folder / CHECKPOINTS / f"step-{step}")

        if self.world.many and self.background and not wait:
            self._writer_world = writer_world = self._writer_world or self.world.beside()
            contents["tensors"] = copy_to_host(contents["tensors"])
            self._pending_checkpoint = (
                run_in_thread(lambda: save_sharded(self.folder, step, world=writer_world, **contents)),
                after_save,
            )
            return
        if self.world.many:
            save_sharded(self.folder, step, world=self.world, **contents)
        else:
            save_checkpoint(self.folder, step, **contents)
        after_save()

    def _wait_for_checkpoint(self) -> None:
        """Wait for the checkpoint being written; all ranks do, and one rank's error is raised on all."""
        pending, self._pending_checkpoint = self._pending_checkpoint, None
        if pending is not None:
            pending[0].result()
            pending[1]()

    @contextmanager
    def _finish_pending_checkpoint(self) -> Iterator[None]:
        """Finish a pending checkpoint if the run ends with an error raised on all ranks; otherwise a rank may be gone."""
        try:
            yield
        except PenchantError as error:
            if getattr(error, "agreed", False):
                self._wait_for_checkpoint()
            raise

    def _finished_message(self) -> str:
        return (
            f"{self.folder} is already finished at step {self.state.step:,}; there is nothing to train. To train its model further, "
            f"set model.path={self.folder} and another output"
        )

    def _resume(self, metrics: MetricsLog) -> bool:
        path, warnings = self.world.share(latest_checkpoint(self.folder) if self.world.leads else (None, []))
        for warning in warnings:
            self.console.note(warning)
        if path is None:
            return False
        tensors, state = load_checkpoint(path, self.optimizer.masters)
        self.optimizer.load_state_tensors(tensors)
        self.algorithm.load_state_tensors(algorithm_state(tensors))
        metrics.truncate(int(state["metrics_offset"]), state.get("metrics_sha256"))
        self.state = RunState(**{f.name: state[f.name] for f in fields(RunState)})
        self.console.note(
            f"resumed from {path.name}" if self.state.step < self.schedule.total_steps else self._finished_message()
        )
        return True


class Interrupted(TrainingStopped):
    """SIGINT or SIGTERM, after writing a checkpoint; the same command continues."""

    exit_code = 4


class Paused(TrainingStopped):
    """Raised at `Loop.pause_at`, after writing a checkpoint; carries the held-out metrics.

    Args:
        folder: the run folder; step, total: optimizer steps done and in all; metrics: keys start with ``eval/``.
    """

    exit_code = 4

    def __init__(self, folder: str, step: int, total: int, metrics: Mapping[str, Any]) -> None:
        super().__init__(folder, f"paused at step {step} of {total}; a checkpoint was written", "run it again to go on")
        self.step, self.metrics = step, dict(metrics)


def algorithm_state(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The algorithm's own tensors in a checkpoint."""
    prefix = "algorithm/"
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def packs_ahead(device: torch.device) -> bool:
    """Whether the next step's rows are packed while this one runs; on a CPU there is no spare time for it."""
    return device.type == "cuda"


def in_background(function: Callable[[], T]) -> Callable[[], T]:
    """Run `function` in a thread; the returned function waits for its result or re-raises its exception."""
    return run_in_thread(function).result


def run_in_thread(function: Callable[[], T]) -> Future[T]:
    """Run `function` in a thread on the caller's current GPU; a new thread would use the first GPU, and memory there."""
    future: Future[T] = Future()
    gpu = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def run() -> None:
        try:
            if gpu is not None:
                torch.cuda.set_device(gpu)
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def _line_header(kind: str, step: int, schedule: BatchSchedule) -> Metrics:
    """The common fields of every line in metrics.jsonl."""
    return {"kind": kind, "step": step, "epoch": round(schedule.epoch_at(step), 6)}


@contextmanager
def _signals(loop: Loop) -> Iterator[None]:
    """On SIGINT or SIGTERM, finish the step and write a checkpoint; a second signal takes effect at once."""
    previous: dict[int, Any] = {}

    def restore() -> None:
        for n, handler in previous.items():
            signal.signal(n, handler)

    def finish(signum: int, _frame: Any) -> None:
        loop.interrupted = signum
        restore()
        loop.console.note(f"{signal.Signals(signum).name}: finishing the step and writing a checkpoint")

    if threading.current_thread() is threading.main_thread():  # signal handlers can only be set there
        for n in (signal.SIGINT, signal.SIGTERM):
            previous[n] = signal.signal(n, finish)
    try:
        yield
    finally:
        restore()
