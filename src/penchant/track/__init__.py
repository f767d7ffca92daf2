"""Sends metrics.jsonl to experiment trackers, during a run or afterwards."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penchant.base.text import one_line
from penchant.errors import CheckpointError, ConfigError
from penchant.runfolder import CONFIG, METRICS, PIPELINE, SWEEP, RunLock, damage_notes
from penchant.runfolder.read import read_folder
from penchant.track.tracker import FOLDER, TRACKERS, RunInfo, Sent, TrackerSpec, sent_file, sent_to

if TYPE_CHECKING:
    from penchant.training.options import LoggingConfig  # the worker process needs no pydantic

__all__ = ["TRACKERS", "Mirrors", "TrackerSpec", "check_installed"]

# ---- The run's side: one process per tracker, notified when the run begins and ends, and polled without waiting ----


def check_installed(names: Sequence[str], where: str = "logging.trackers") -> None:
    """Check that the trackers' packages are installed, before training starts.

    Raises:
        ConfigError: one is not; the message has the command that installs it.
    """
    for spec in (TRACKERS[name] for name in names):
        if importlib.util.find_spec(spec.module) is None:
            raise ConfigError(where, f"{spec.name} is not installed", f"pip install 'penchant[{spec.extra}]'")


def run_info(folder: Path, settings: LoggingConfig, config: Mapping[str, Any]) -> RunInfo:
    """Describe a run for its trackers; the default name is its folder's, the default group is the sweep or pipeline it belongs to."""
    folder = folder.resolve()
    in_group = any((folder.parent / name).exists() for name in (SWEEP, PIPELINE))
    custom_dir = settings.dir
    return RunInfo(
        folder=str(folder),
        name=settings.name or folder.name,
        project=settings.project,
        dir=str(Path(custom_dir).expanduser().resolve() if custom_dir else folder / FOLDER),
        own_dir=custom_dir is not None,
        group=settings.group or (folder.parent.name if in_group else None),
        tags=tuple(settings.tags),
        config=config,
    )


@dataclass(slots=True)
class Mirror:
    """One tracker's process.

    Args:
        spec: the tracker; info: the run; timeout: seconds it may take at the end; say: prints a message for the user.
        training: whether the run is training, and goes on without a tracker that fails.
    """

    spec: TrackerSpec
    info: RunInfo
    timeout: float
    say: Callable[[str], None]
    training: bool = True
    process: subprocess.Popen[bytes] | None = None
    failed: str | None = None
    done: bool = False
    _read: bytes = field(default=b"")

    def start(self, *, anew: bool) -> None:
        """Start the process; if that fails, print a warning and go on. `anew`: forget the run that an earlier one has in the tracker."""
        folder = Path(self.info.folder)
        paths = os.pathsep.join(p for p in sys.path if p)
        try:
            if anew:
                sent_file(folder, self.spec.name).unlink(missing_ok=True)
            info = asdict(self.info) | {"id": sent_to(folder, self.spec.name).id}
            request = {"tracker": self.spec.name, "factory": self.spec.factory, "info": info, "timeout": self.timeout}
            Path(self.info.dir).mkdir(parents=True, exist_ok=True)
            self.process = subprocess.Popen(
                [sys.executable, "-m", "penchant.track.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": paths},
                start_new_session=True,  # Ctrl-C is for the run; its trackers finish after it
            )
            assert self.process.stdout is not None
            os.set_blocking(self.process.stdout.fileno(), False)
            self._send(request)
        except OSError as error:
            self._warn(f"could not be started ({error.strerror})")

    def poll(self) -> None:
        """Read the process's messages without waiting."""
        if self.process is None or self.process.stdout is None:
            return
        try:
            chunk = os.read(self.process.stdout.fileno(), 65536)
        except BlockingIOError:
            return
        except OSError:
            chunk = b""
        *lines, self._read = (self._read + chunk).split(b"\n")
        for text in lines:
            self._handle_message(json.loads(text))
        if not chunk and not self.done and self.failed is None:
            self._warn("ended before the run did")

    def end(self, status: str, summary: Mapping[str, Any]) -> None:
        """Notify the process that the run has ended."""
        if self.process is not None:
            self._send({"end": status, "summary": dict(summary)})

    def close(self, deadline: float | None) -> bool:
        """Wait for the process until the deadline (None: without limit), then kill it; return whether every line was sent."""
        while self.process is not None and not self.done and self.process.poll() is None:
            self.poll()
            if deadline is not None and time.monotonic() > deadline:
                break
            time.sleep(0.02)
        self.poll()
        hung = self.process is not None and not self.done and self.process.poll() is None
        self._kill()
        sent = sent_to(Path(self.info.folder), self.spec.name)
        complete = self.done and sent.unsent == 0 and sent.error is None
        if not complete:
            hint = f"`penchant track {shlex.quote(self.info.folder)} --to {self.spec.name}` sends what is missing"
            self.say(f"{self.spec.label}: {self._failure_reason(hung, sent)}; metrics.jsonl has every line. {hint}")
        return complete

    def _failure_reason(self, hung: bool, sent: Sent) -> str:
        """Return what went wrong, without repeating a message that was already shown."""
        reason = f"no answer in {self.timeout:g} s" if hung else sent.error or self.failed or "it ended by itself"
        count = f"{sent.unsent} lines were not sent" if sent.unsent else "its run was not closed"
        return count if reason == self.failed else f"{count} ({one_line(reason)})"

    def _send(self, message: Mapping[str, Any]) -> None:
        assert self.process is not None and self.process.stdin is not None
        try:
            self.process.stdin.write((json.dumps(dict(message)) + "\n").encode())
            self.process.stdin.flush()
        except OSError:
            pass  # the process is gone; `close` reports that

    def _handle_message(self, message: Mapping[str, Any]) -> None:
        if "where" in message:
            self.say(f"{self.spec.label}: {one_line(str(message['where']))}")
        if "error" in message:
            self._warn(str(message["error"]))
        self.done = self.done or "done" in message

    def _warn(self, what: str) -> None:
        if self.failed is None:
            self.failed = what
            consequence = "; the run goes on without it" if self.training else ""
            self.say(f"{self.spec.label}: {one_line(what)}{consequence}")

    def _kill(self) -> None:
        if self.process is None:
            return
        if self.done:  # it reported that it is done, but libraries may still need a moment to exit
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=min(5.0, self.timeout))
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        self.process = None


class Mirrors:
    """All trackers of a run. No call raises, and only `finish` waits.

    Args:
        settings: the run's `logging` section; config: the run's settings as shown in trackers; say: prints a message for the user.
        specs: the trackers by name; training: as for `Mirror`.
    """

    def __init__(
        self,
        folder: Path,
        settings: LoggingConfig,
        config: Mapping[str, Any],
        say: Callable[[str], None],
        specs: Mapping[str, TrackerSpec] = TRACKERS,
        *,
        training: bool = True,
    ) -> None:
        self.folder, self.timeout = folder, settings.tracker_timeout
        info = run_info(folder, settings, config)
        self.mirrors = [Mirror(specs[name], info, self.timeout, say, training) for name in settings.trackers]

    def begin(self, *, anew: bool) -> None:
        """Start the trackers; `anew`: the run has no checkpoint, so it becomes a new run in each tracker too."""
        for mirror in self.mirrors:
            mirror.start(anew=anew)

    def poll(self) -> None:
        """Read the trackers' messages; called after each step."""
        for mirror in self.mirrors:
            mirror.poll()

    def finish(self, status: str, summary: Mapping[str, Any] | None = None, *, patient: bool = False) -> bool:
        """Notify the trackers of the end and wait up to `tracker_timeout` seconds for all of them together (`patient`: without limit).

        Returns:
            Whether every line was sent.
        """
        for mirror in self.mirrors:
            mirror.end(status, summary or {})
        deadline = None if patient else time.monotonic() + self.timeout
        complete = [mirror.close(deadline) for mirror in self.mirrors]  # a list, because each one must be closed
        return all(complete)


# ---- Sending a run's metrics after training: only the missing lines, or all of them to a new run in the tracker ----


def track_run(
    run: str | Path,
    to: Sequence[str],
    *,
    anew: bool = False,
    say: Callable[[str], None] = lambda _: None,
    **settings: Any,
) -> bool:
    """Send a run's `metrics.jsonl` and `perf.jsonl` to trackers.

    Args:
        run: the run's folder; to: names of trackers; anew: send every line to a new run in each tracker instead of only the missing lines.
        say: prints a message for the user; settings: override the run's `logging` section (None: keep the run's own value).

    Returns:
        Whether every line was sent.

    Raises:
        CheckpointError: there is no run, or it is still running. ConfigError: a tracker is unknown or not installed, or a setting is invalid.
    """
    folder = Path(run).expanduser()
    if not (folder / CONFIG).exists() or not (folder / METRICS).exists():
        raise CheckpointError(str(run), "is not a run that has begun", f"give a folder with {CONFIG} and {METRICS}")
    unknown = [name for name in to if name not in TRACKERS]
    if unknown or not to:
        raise ConfigError("--to", f"{(unknown or ['nothing'])[0]} is not a tracker", f"there are {', '.join(TRACKERS)}")
    check_installed(to, "--to")
    from penchant.config import load_config
    from penchant.config.several import read_section
    from penchant.training.options import LoggingConfig

    config = load_config(folder / CONFIG)
    overrides = {name: value for name, value in settings.items() if value is not None}
    values = {"logging": {**config.logging.model_dump(), **overrides, "trackers": list(to)}}
    logging = read_section(LoggingConfig, "logging", values, {}, "track")
    with RunLock(folder):
        mirrors = Mirrors(folder, logging, config.model_dump(mode="json"), say, training=False)
        mirrors.begin(anew=anew)
        for sentence in damage_notes(folder):
            say(sentence)
        contents = read_folder(folder)
        last_eval = next((row for row in reversed(contents.metrics) if row.get("kind") == "eval"), {})
        status = str(contents.manifest.get("status", "killed"))
        # a manifest that says "running" although the lock was free means that the process died
        return mirrors.finish("killed" if status == "running" else status, last_eval, patient=True)
