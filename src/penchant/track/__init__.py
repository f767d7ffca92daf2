"""Mirrors of metrics.jsonl in trackers, during a run or after it."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
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
from penchant.runfolder import CONFIG, METRICS, PIPELINE, SWEEP, RunLock, told_damage
from penchant.runfolder.read import read
from penchant.track.tracker import FOLDER, TRACKERS, RunInfo, Sent, TrackerSpec, sent_file, sent_to

if TYPE_CHECKING:
    from penchant.training.options import LoggingConfig  # a tracker's own process needs no pydantic

__all__ = ["TRACKERS", "Mirrors", "TrackerSpec", "check_installed"]


# ---- The run's side of its trackers: a process each, told when the run begins and ends, and looked at without waiting ----


def check_installed(names: Sequence[str], where: str = "logging.trackers") -> None:
    """Meet a missing package before anything is trained.

    Raises:
        ConfigError: with the command that installs it.
    """
    for spec in (TRACKERS[name] for name in names):
        if importlib.util.find_spec(spec.module) is None:
            raise ConfigError(where, f"{spec.name} is not installed", f"pip install 'penchant[{spec.extra}]'")


def run_info(folder: Path, settings: LoggingConfig, config: Mapping[str, Any]) -> RunInfo:
    """Which run trackers are told of: its folder's name, the sweep or the pipeline that it belongs to as its group."""
    folder = folder.resolve()
    belongs = any((folder.parent / name).exists() for name in (SWEEP, PIPELINE))
    own = settings.dir
    return RunInfo(
        folder=str(folder),
        name=settings.name or folder.name,
        project=settings.project,
        dir=str(Path(own).expanduser().resolve() if own else folder / FOLDER),
        own_dir=own is not None,
        group=settings.group or (folder.parent.name if belongs else None),
        tags=tuple(settings.tags),
        config=config,
    )


@dataclass(slots=True)
class Mirror:
    """One tracker's process.

    Args:
        spec: which tracker; info: which run; timeout: seconds that it may take at the end; say: where a person reads.
    """

    spec: TrackerSpec
    info: RunInfo
    timeout: float
    say: Callable[[str], None]
    process: subprocess.Popen[bytes] | None = None
    failed: str | None = None
    done: bool = False
    _read: bytes = field(default=b"")

    def start(self) -> None:
        """Start the process; a failure to do so is told, and that is all."""
        folder = Path(self.info.folder)
        info = asdict(self.info) | {"id": sent_to(folder, self.spec.name).id}
        request = {"tracker": self.spec.name, "factory": self.spec.factory, "info": info, "timeout": self.timeout}
        paths = os.pathsep.join(p for p in sys.path if p)
        try:
            Path(self.info.dir).mkdir(parents=True, exist_ok=True)
            self.process = subprocess.Popen(
                [sys.executable, "-m", "penchant.track.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": paths},
                start_new_session=True,  # Ctrl-C is for the run; its trackers come to their end after it
            )
            assert self.process.stdout is not None
            os.set_blocking(self.process.stdout.fileno(), False)
            self._tell(request)
        except OSError as error:
            self._warn(f"could not be started ({error.strerror})")

    def poll(self) -> None:
        """Hear what it has to say, without waiting for it."""
        if self.process is None or self.process.stdout is None:
            return
        try:
            new = os.read(self.process.stdout.fileno(), 65536)
        except BlockingIOError:
            return
        except OSError:
            new = b""
        *whole, self._read = (self._read + new).split(b"\n")
        for text in whole:
            self._hear(json.loads(text))
        if not new and not self.done and self.failed is None:
            self._warn("ended before the run did")

    def end(self, status: str, summary: Mapping[str, Any]) -> None:
        """Tell it that the run has ended."""
        if self.process is not None:
            self._tell({"end": status, "summary": dict(summary)})

    def close(self, deadline: float | None) -> bool:
        """Wait for it until then (None: as long as it works), then end it; returns whether every line was sent."""
        while self.process is not None and not self.done and self.process.poll() is None:
            self.poll()
            if deadline is not None and time.monotonic() > deadline:
                break
            time.sleep(0.02)
        self.poll()
        hung = self.process is not None and not self.done and self.process.poll() is None
        self._kill()
        sent = sent_to(Path(self.info.folder), self.spec.name)
        whole = self.done and sent.unsent == 0 and sent.error is None
        if not whole:
            later = f"`penchant track {self.info.folder} --to {self.spec.name}` sends what is missing"
            self.say(f"{self.spec.label}: {self._why(hung, sent)}; metrics.jsonl has every line. {later}")
        return whole

    def _why(self, hung: bool, sent: Sent) -> str:
        """What went wrong, in so many words that nobody reads the same sentence twice."""
        why = f"no answer in {self.timeout:g} s" if hung else sent.error or self.failed or "it ended by itself"
        count = f"{sent.unsent} lines were not sent" if sent.unsent else "its run was not closed"
        return count if why == self.failed else f"{count} ({one_line(why)})"

    def _tell(self, message: Mapping[str, Any]) -> None:
        assert self.process is not None and self.process.stdin is not None
        try:
            self.process.stdin.write((json.dumps(dict(message)) + "\n").encode())
            self.process.stdin.flush()
        except OSError:
            pass  # it is gone; `close` says so

    def _hear(self, message: Mapping[str, Any]) -> None:
        if "where" in message:
            self.say(f"{self.spec.label}: {one_line(str(message['where']))}")
        if "error" in message:
            self._warn(str(message["error"]))
        self.done = self.done or "done" in message

    def _warn(self, what: str) -> None:
        if self.failed is None:
            self.failed = what
            self.say(f"{self.spec.label}: {one_line(what)}; the run goes on without it")

    def _kill(self) -> None:
        if self.process is None:
            return
        if self.done:  # it has said so, and libraries may still have something to finish on their way out
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
    """All trackers of a run. No call raises, and but for `finish` none waits.

    Args:
        settings: the run's `logging` section; config: what trackers are shown of the run's settings; say: where a person reads.
        specs: the trackers by name.
    """

    def __init__(
        self,
        folder: Path,
        settings: LoggingConfig,
        config: Mapping[str, Any],
        say: Callable[[str], None],
        specs: Mapping[str, TrackerSpec] = TRACKERS,
    ) -> None:
        self.folder, self.timeout = folder, settings.tracker_timeout
        info = run_info(folder, settings, config)
        self.mirrors = [Mirror(specs[name], info, self.timeout, say) for name in settings.trackers]

    def begin(self, *, anew: bool) -> None:
        """Start them; `anew`: the run has no checkpoint, so it is a new run in its trackers too."""
        for mirror in self.mirrors:
            if anew:
                sent_file(self.folder, mirror.spec.name).unlink(missing_ok=True)
            mirror.start()

    def poll(self) -> None:
        """After a step."""
        for mirror in self.mirrors:
            mirror.poll()

    def finish(self, status: str, summary: Mapping[str, Any] | None = None, *, patient: bool = False) -> bool:
        """Tell them all of the end, and wait for no longer than `tracker_timeout` seconds together (`patient`: as long as it takes).

        Returns:
            Whether every line was sent.
        """
        for mirror in self.mirrors:
            mirror.end(status, summary or {})
        deadline = None if patient else time.monotonic() + self.timeout
        return all(mirror.close(deadline) for mirror in self.mirrors)


# ---- A run's metrics sent to trackers after it was trained: what they do not have yet, or all of it to a new run of theirs ----


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
        run: its folder; to: names of trackers; anew: to a new run of theirs, with every line, rather than what theirs lacks.
        say: where a person reads; settings: of the `logging` section, in place of the run's own (None: its own).

    Returns:
        Whether every line was sent.

    Raises:
        CheckpointError: no run there, or one that goes on. ConfigError: no such tracker, or it is not installed.
    """
    folder = Path(run).expanduser()
    if not (folder / CONFIG).exists() or not (folder / METRICS).exists():
        raise CheckpointError(str(run), "is not a run that has begun", f"give a folder with {CONFIG} and {METRICS}")
    unknown = [name for name in to if name not in TRACKERS]
    if unknown or not to:
        raise ConfigError("--to", f"{(unknown or ['nothing'])[0]} is not a tracker", f"there are {', '.join(TRACKERS)}")
    check_installed(to, "--to")
    from penchant.config import load_config
    from penchant.training.options import LoggingConfig

    config = load_config(folder / CONFIG)
    given = {name: value for name, value in settings.items() if value is not None}
    logging = LoggingConfig.model_validate({**config.logging.model_dump(), **given, "trackers": list(to)})
    with RunLock(folder):
        mirrors = Mirrors(folder, logging, config.model_dump(mode="json"), say)
        mirrors.begin(anew=anew)
        for sentence in told_damage(folder):
            say(sentence)
        known = read(folder)
        last = next((row for row in reversed(known.metrics) if row.get("kind") == "eval"), {})
        status = str(known.manifest.get("status", "killed"))
        # where it says that it runs and holds no lock, its process is gone
        return mirrors.finish("killed" if status == "running" else status, last, patient=True)
