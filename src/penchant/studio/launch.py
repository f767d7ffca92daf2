"""Starts, stops and resumes runs from the browser: a form built from the config's schema, its YAML, and the processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from penchant.algorithms import ALGORITHMS
from penchant.base.files import temp_path, write_text_atomically
from penchant.base.text import printable
from penchant.config import LOSS_AND_ALGORITHM, RunConfig, build, default_settings, parse_yaml
from penchant.config.page import Key, Part, parts
from penchant.config.yaml import dump_yaml, expand_source_list, set_key
from penchant.data.read import ending
from penchant.errors import CheckpointError, ConfigError
from penchant.judges.humans import PREFERENCES
from penchant.losses import LOSSES
from penchant.losses.page import parameters
from penchant.runfolder import (
    CHECKPOINTS,
    COMPARISON,
    COMPARISON_ROWS,
    CONFIG,
    CONSOLE,
    PIPELINE,
    SUMS,
    SWEEP,
    make_folder,
)
from penchant.runfolder.read import lock_holder, lock_state, read_folder
from penchant.runfolder.values import flatten, mapping, text
from penchant.studio.app import is_linkable
from penchant.studio.pairs import ARENA

FORM = "the form"  # the source of a setting, for messages
INTERRUPTED = 4  # exit code of a run that was stopped by a signal and can be resumed
TAIL = 4000  # bytes of a process's output that are shown
FIRST = (  # keys that nearly every run sets; the others are folded into their sections
    *(
        "model.path",
        "data.path",
        "output",
        "loss.name",
        "algorithm.name",
        "train.epochs",
        "train.max_steps",
        "train.lr",
    ),
    *("train.batch_size", "data.max_length", "data.validation_fraction"),
)
NO_ROWS = frozenset({SWEEP, "sweep.jsonl", PIPELINE, COMPARISON, COMPARISON_ROWS, SUMS})
SUGGESTED = 200  # maximum number of files and models that a field offers


# ---- The form ----


def form_parts(loss: str = "", algorithm: str = "") -> Iterator[Part]:
    """Yield the config's sections with their keys; of losses and algorithms, only the keys of the selected one."""
    for part in parts():
        keys = [key for key in part.keys if ".N." not in key.path and key.takes != "list of sections"]
        if part.title == "loss":
            names = tuple(LOSSES)
            keys = [
                replace(key, choices=names) if key.path == "loss.name" else key
                for key in keys
                if key.path != "loss.mix"
            ]
            spec = LOSSES.get(loss or "dpo")
            loss_keys = (
                [Key(f"loss.{name}", "", default, meaning) for name, default, meaning in parameters(spec)]
                if spec
                else []
            )
            yield Part("loss", part.about, (*keys, *loss_keys))
        elif part.title.startswith("algorithm"):
            if algorithm in part.title.removeprefix("algorithm: ").split(", "):
                yield Part("algorithm", part.about, tuple(key for key in keys if key.path != "algorithm.name"))
        else:
            yield Part(part.title, part.about, tuple(keys))


def first_keys() -> list[Key]:
    """Return the keys shown at the top of the form."""
    keys = {key.path: key for part in form_parts() for key in part.keys}
    meaning = "learns from its own completions and a reward, in the place of a loss"
    keys["algorithm.name"] = Key("algorithm.name", " or ".join(ALGORITHMS), "none", meaning, tuple(ALGORITHMS))
    return [keys[path] for path in FIRST]


def parse_form(fields: Sequence[tuple[str, str]]) -> tuple[dict[str, Any], dict[tuple[str, ...], str]]:
    """Return (settings, their sources) from the form's fields: those with a key's name and a value, then the extra lines.

    Raises:
        ConfigError: a value is not valid YAML, or a line is not a setting.
    """
    kinds = {key.path: key.takes for part in (*form_parts(), *_algorithm_parts()) for key in part.keys}
    settings = [(name, value) for name, value in fields if "." in name or name in ("output", "reward")]
    settings = [
        (name, json.dumps(value) if kinds.get(name) == "text" else value) for name, value in settings if value.strip()
    ]
    extra_lines = next((value for name, value in fields if name == "more"), "")
    for line in filter(None, map(str.strip, extra_lines.splitlines())):
        key, equals, value = line.partition("=")
        if not equals:
            raise ConfigError(
                "further settings", f"{printable(line[:80])} is not a setting", "write key.path=value on each line"
            )
        settings.append((key.strip(), value))
    values: dict[str, Any] = {}
    places: dict[tuple[str, ...], str] = {}
    for name, value in sorted(settings, key=lambda setting: setting[0] not in ("loss.name", "algorithm.name")):
        if name.startswith("loss.") and any(key == "algorithm.name" for key, _ in settings):
            raise ConfigError(FORM, *LOSS_AND_ALGORITHM.split("; ", 1))
        places = set_key(values, places, tuple(name.split(".")), parse_yaml(value, f"{FORM}, {name}")[0], FORM)
    return values, expand_source_list(values, places)


def _algorithm_parts() -> Iterator[Part]:
    return (part for part in parts() if part.title.startswith("algorithm"))


@dataclass(frozen=True, slots=True)
class Draft:
    """A run as described by the form.

    Args:
        text: the YAML; file: path of the YAML; folder: path of the run's folder. Both paths are relative to the studio's folder.
    """

    config: RunConfig
    text: str
    file: str
    folder: str


def draft(root: Path, fields: Sequence[tuple[str, str]]) -> Draft:
    """Build the run that the form describes, validated like any config.

    Raises:
        ConfigError: the config is invalid, or the run's folder is not inside the studio's.
    """
    values, places = parse_form(fields)
    output = values.get("output")
    if isinstance(output, str) and output.strip():
        try:
            folder = (root / output).resolve()
            inside = folder.is_relative_to(root) and folder != root
            temp_path(folder.with_name(f"{folder.name}.yaml")).exists()
        except (ValueError, OSError, RuntimeError):  # it contains a NUL, is too long, or its links form a loop
            inside = False
        if not inside:
            raise ConfigError("output", "is not inside the studio's folder", "give a name such as runs/first")
        values["output"] = folder.relative_to(root).as_posix()
    config = build(values, places, FORM)
    values = {key: values[key] for key in RunConfig.model_fields if key in values}
    text = dump_yaml(values, sort_keys=False, allow_unicode=True)
    return Draft(config, text, f"{config.output}.yaml", config.output)


def settings_of(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the settings of a run that differ from their defaults, in the form's format."""
    defaults = flatten(default_settings())
    settings = {}
    for key, value in flatten(config).items():
        if key == "output" or value is None or value in ({}, []) or (key in defaults and defaults[key] == value):
            continue
        settings[key] = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return settings


def suggestions(root: Path) -> dict[str, list[str]]:
    """List data files and model folders inside a folder, for `data.path` and `model.path`."""
    files: list[str] = []
    models: list[str] = []
    for folder_count, (folder, folders, names) in enumerate(os.walk(root)):
        folders[:] = sorted(n for n in folders if n[0] != "." and n != "__pycache__" and is_linkable(n))
        if folder_count > 2000 or len(files) + len(models) > SUGGESTED:
            break
        prefix = Path(folder).relative_to(root).as_posix()
        prefix = "" if prefix == "." else f"{prefix}/"
        if "config.json" in names:
            models.append(prefix.rstrip("/") or ".")
            folders.clear()
        elif ARENA in names:
            files += [prefix + PREFERENCES] * (PREFERENCES in names)
        elif CONFIG in names:
            models.append(prefix.rstrip("/"))  # the run's folder stands for its model
            folders[:] = [name for name in folders if name != CHECKPOINTS]
        else:
            paths = (prefix + name for name in sorted(names) if ending(name) and name not in NO_ROWS)
            files += islice((path for path in paths if is_linkable(path) and _is_file_inside(root, path)), SUGGESTED)
    return {"data.path": files[:SUGGESTED], "data.eval_path": files[:SUGGESTED], "model.path": models[:SUGGESTED]}


def _is_file_inside(root: Path, path: str) -> bool:
    """Return True if there is a file and it is not a link that leads out of the folder."""
    file = root / path
    return file.is_file() and (not file.is_symlink() or file.resolve().is_relative_to(root))


# ---- Processes ----


def environment() -> dict[str, str]:
    """Return the studio's environment without the variables that child processes must not inherit."""
    return {k: v for k, v in os.environ.items() if k not in ("PENCHANT_REEXECUTED", "PENCHANT_API_KEY")}


def command(*arguments: str) -> list[str]:
    """Return the command line that runs a Penchant command with this Python."""
    return [sys.executable, "-m", "penchant", *arguments]


def working_folder(root: Path, config: Mapping[str, Any]) -> Path:
    """Return the folder that a run's paths are relative to: the studio's, or the one the studio was started in."""
    model = text(mapping(config.get("model")).get("path"))
    cwd = Path.cwd()
    return cwd if not (root / model).exists() and (cwd / model).exists() else root


PLAN_SECONDS = 300.0  # time limit of a plan
RELEASE_TIMEOUT = 20.0  # seconds to wait for a stopped run to release its folder


class Children:
    """Child processes that a request waits for, used for work that is slow or might crash."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[bytes]] = set()

    def run(
        self, arguments: Sequence[str], root: Path, seconds: float | None = None
    ) -> subprocess.CompletedProcess[bytes]:
        """Run a command in a folder until it ends.

        Raises:
            subprocess.TimeoutExpired: it took longer than `seconds`; it has been killed.
        """
        pipe = subprocess.PIPE
        with subprocess.Popen(
            arguments, cwd=root, env=environment(), stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe
        ) as process:
            self._running.add(process)
            try:
                out, err = process.communicate(timeout=seconds)
            finally:
                self._running.discard(process)
                process.kill()
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)

    def close(self) -> None:
        """Kill the running processes."""
        for process in [*self._running]:
            process.kill()


def last_error_line(process: subprocess.CompletedProcess[bytes]) -> str:
    """Return the last line of a failed command's stderr."""
    lines = process.stderr.decode(errors="replace").strip().splitlines()
    return lines[-1].removeprefix("penchant: ") if lines else "failed"


@dataclass
class Processes:
    """Training processes started here; they outlive the studio.

    Args:
        root: the studio's folder, their working directory.
    """

    root: Path
    started: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    children: Children = field(default_factory=Children)
    _written: dict[str, str] = field(default_factory=dict)  # configs written by this studio, by path
    _stopped: set[str] = field(default_factory=set)  # runs that were asked to stop and have not been started again
    _lock: threading.Lock = field(default_factory=threading.Lock)  # so that two clicks start only one process

    def start(self, new_run: Draft) -> None:
        """Write the config beside the run's folder and start training.

        Raises:
            CheckpointError: the folder already holds a run, or another config exists there.
        """
        with self._lock:
            self._start_new(new_run)

    def _start_new(self, new_run: Draft) -> None:
        folder, file = self.root / new_run.folder, self.root / new_run.file
        if self.is_running(new_run.folder):  # a second click or a second window
            raise CheckpointError(new_run.folder, "was started already", "find it among the runs")
        if (folder / CHECKPOINTS).exists() or (folder / CONFIG).exists():
            raise CheckpointError(
                new_run.folder, "holds a run already", "choose another output, or go on with that run"
            )
        own_texts = new_run.text, self._written.get(new_run.file)  # the config of a failed start may be replaced
        if file.is_symlink() or (file.exists() and file.read_text(encoding="utf-8", errors="replace") not in own_texts):
            raise CheckpointError(new_run.file, "already exists, and says something else", "choose another output")
        make_folder(folder)
        write_text_atomically(file, new_run.text)
        self._written[new_run.file] = new_run.text
        self._spawn(new_run.folder, [f"./{new_run.file}"])

    def resume(self, path: str) -> None:
        """Resume a run whose process has ended or is about to: a stopped run may still be writing its checkpoint.

        Raises:
            CheckpointError: it is still running, or its config is missing.
        """
        folder = self.root / path
        deadline = time.monotonic() + (RELEASE_TIMEOUT if path in self._stopped else 0)
        while (lock_state(folder) != "free" or self.is_running(path)) and time.monotonic() < deadline:
            time.sleep(0.1)
        if not (folder / CONFIG).is_file():
            raise CheckpointError(path, f"has no {CONFIG}", "start it again with its own config")
        cwd = working_folder(self.root, read_folder(folder).config)
        with self._lock:
            if lock_state(folder) != "free" or self.is_running(path):
                raise CheckpointError(path, "another process holds this run", "wait for it, or stop it")
            self._stopped.discard(path)
            self._spawn(path, [str(folder / CONFIG), f"output={json.dumps(str(folder))}"], cwd)

    def _spawn(self, path: str, arguments: Sequence[str], cwd: Path | None = None) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        log = os.open(self.root / path / CONSOLE, flags, 0o644)
        try:
            self.started[path] = subprocess.Popen(
                command("train", *arguments),
                cwd=cwd or self.root,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # keeps the signals that end the studio from the run
                env=environment(),
            )
        finally:
            os.close(log)

    def stop(self, path: str) -> None:
        """Ask a run to stop, as Ctrl-C and SIGTERM do; it writes a checkpoint first.

        Raises:
            CheckpointError: no process on this machine holds it, or it belongs to another user.
        """
        owner = lock_holder(self.root / path)
        if owner is not None and lock_state(self.root / path) == "held":
            try:
                os.kill(owner[0], signal.SIGTERM)
                os.kill(owner[0], signal.SIGCONT)  # a suspended process (Ctrl-Z) handles SIGTERM only once it continues
            except ProcessLookupError:
                pass  # it ended meanwhile
            except PermissionError as error:
                what = f"process {owner[0]}, which trains it, belongs to another user"
                raise CheckpointError(path, what, "stop it as that user") from error
        elif (process := self.started.get(path)) is not None and process.poll() is None:
            process.terminate()
        else:
            raise CheckpointError(path, "no process of this machine trains it", "it has ended, or runs elsewhere")
        self._stopped.add(path)

    def stop_requested(self, path: str) -> bool:
        """Return True if the run was asked to stop and has not been started again."""
        return path in self._stopped

    def is_running(self, path: str) -> bool:
        """Return True if the process started here is still running."""
        process = self.started.get(path)
        return process is not None and process.poll() is None

    def failure(self, path: str) -> str:
        """Return the output of a process started here that failed; empty if it has not failed."""
        process = self.started.get(path)
        if process is None or process.poll() in (None, 0, INTERRUPTED):
            return ""
        return self.output_of(path) or f"it ended with the exit code {process.returncode}"

    def output_of(self, path: str) -> str:
        """Return the end of a process's output."""
        try:
            with (self.root / path / CONSOLE).open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
                return file.read().decode(errors="replace").strip()
        except OSError:
            return ""

    def plan(self, text: str, probe: bool) -> dict[str, Any]:
        """Return the result of `penchant plan`, run in its own process because it loads torch and might crash.

        Raises:
            ConfigError: the plan failed or took too long.
        """
        with tempfile.TemporaryDirectory(prefix="penchant-plan-") as folder:
            file = Path(folder) / "form.yaml"
            file.write_text(text, encoding="utf-8")
            arguments = command("plan", str(file), "--json", *([] if probe else ["--no-probe"]))
            try:
                completed = self.children.run(arguments, self.root, PLAN_SECONDS)
            except subprocess.TimeoutExpired as error:
                how = "run penchant plan in a terminal"
                raise ConfigError("plan", f"took more than {PLAN_SECONDS:.0f} s", how) from error
        if completed.returncode:
            raise ConfigError("plan", last_error_line(completed).replace(str(file), FORM))
        plan: dict[str, Any] = json.loads(completed.stdout)
        return plan

    def close(self) -> None:
        """End a plan in progress; runs continue."""
        self.children.close()
