"""Mutation testing: break the code in one place at a time and run the tests that should fail.

    python tools/mutate.py                       # every mutation in tools/mutations.toml, each with its own tests
    python tools/mutate.py k3-sign 'resume-*'    # some of them, by name
    python tools/mutate.py --file training/      # those in files below src/penchant/training/
    python tools/mutate.py --list                # list them, and why each one matters
    python tools/mutate.py --log /tmp/outcomes   # log each outcome, and skip mutations logged as killed or accepted

A mutation replaces one text in one file of src/penchant. It is applied to a temporary copy of the repository, never in place. It is
killed if a test fails and survives if all pass. The unchanged copy is tested first, since a test that always fails proves
nothing. A survivor needs a test, or a line `accepted = "..."` in the table with the reason why it is harmless.

Exit code 0: all were killed, or survived and are accepted. 1: one survived, its text is not in the file exactly once, its tests
could not run, or the tests fail without it. 2: no such mutation.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from queue import SimpleQueue
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "tools" / "mutations.toml"
SOURCE = Path("src/penchant")
# the same as in tests/conftest.py
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    ["pytest", "hypothesis", "pyarrow", "pydantic", "torch", "peft", "transformers.models.llama.modeling_llama"]
)


@dataclass(frozen=True, slots=True)
class Mutation:
    """One place to break.

    Args:
        name: of the mutation; file: below src/penchant; old, new: the text and its replacement; why: what would go wrong.
        tests: files or tests below tests/, separated by spaces; accepted: why it may survive, empty if it must not.
    """

    name: str
    file: str
    old: str
    new: str
    why: str
    tests: str
    accepted: str = ""

    def paths(self) -> list[str]:
        """Its tests, relative to the repository root."""
        return [f"tests/{test}" for test in self.tests.split()]

    def problem(self, root: Path) -> str | None:
        """The reason it cannot be applied to the repository at `root`, None if it can."""
        path = root / SOURCE / self.file
        times = path.read_text(encoding="utf-8").count(self.old) if path.is_file() else 0
        if times == 1:
            return None
        others = [
            str(p.relative_to(root / SOURCE))
            for p in sorted((root / SOURCE).rglob("*.py"))
            if p != path and self.old in p.read_text(encoding="utf-8")
        ]
        moved = f"; it is in {', '.join(others)}" if others else ""
        return f"its text occurs {times} times in {self.file} instead of once{moved}"


@dataclass(frozen=True, slots=True)
class Outcome:
    """Outcome of a mutation: ``killed``, ``survived``, ``accepted`` (an accepted survivor), ``not applicable`` or ``broken``."""

    mutation: Mutation
    kind: str
    detail: str = ""
    seconds: float = 0.0

    @property
    def good(self) -> bool:
        return self.kind in ("killed", "accepted")

    def line(self) -> str:
        detail = f"  {self.detail}" if self.detail else ""
        return f"{self.kind:<14}  {self.mutation.name:<34}  {self.mutation.file}  ({self.seconds:.0f} s){detail}"


def read_table(path: Path = TABLE) -> list[Mutation]:
    """Read every mutation, in the table's order."""
    with path.open("rb") as file:
        return [Mutation(**row) for row in tomllib.load(file)["mutation"]]


def chosen(table: Sequence[Mutation], names: Sequence[str], file: str = "") -> list[Mutation]:
    """Select mutations whose name matches one of `names` (shell patterns; empty: all) and whose file starts with `file`."""
    of_file = [m for m in table if m.file.startswith(file)]
    return [m for m in of_file if not names or any(fnmatchcase(m.name, n) for n in names)]


def copy_repository(root: Path, folder: Path) -> Path:
    """Copy every tracked or unignored file of the working tree. Links the sibling folder `shared`, which some tests read."""
    copy = folder / "repository"
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=root,
        capture_output=True,
        check=True,
    )
    for name in listed.stdout.decode().split("\0"):
        if name and (root / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, copy / name)
    shared = root.parent / "shared"
    if shared.is_dir():
        (folder / "shared").symlink_to(shared)
    return copy


def run_tests(
    copy: Path, tests: Sequence[str], timeout: float | None, *more: str, fresh: bool = False
) -> tuple[int | None, str]:
    """Run pytest and return its exit code (None: timeout) and output.

    Args:
        fresh: start a new Python. Otherwise fork one that has already imported torch and others, which saves most of the time.
    """
    arguments = ["-p", "no:cacheprovider", "--tb=line", *more, *tests]
    with tempfile.TemporaryDirectory(dir=copy.parent) as folder:
        output = Path(folder) / "output"
        if fresh:
            env = ENVIRONMENT | dict(os.environ) | {"PYTHONPATH": str(copy / "src")}
            with output.open("wb") as out:
                command = [sys.executable, "-m", "pytest", *arguments]
                process: Any = subprocess.Popen(
                    command, cwd=copy, env=env, stdout=out, stderr=out, start_new_session=True
                )
            try:
                code = process.wait(timeout)
            except subprocess.TimeoutExpired:
                code = None
        else:
            process = _SERVER.Process(target=_in_a_fork, args=(copy, arguments, output))
            process.start()
            process.join(timeout)
            code = process.exitcode
        if code is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait() if fresh else process.join()
        return code, output.read_text(encoding="utf-8", errors="replace") if output.exists() else ""


def _in_a_fork(copy: Path, arguments: list[str], output: Path) -> None:
    """Body of the forked process: set up its own session and Python path, then run pytest."""
    import pytest

    os.setsid()
    handle = os.open(output, os.O_WRONLY | os.O_CREAT)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.chdir(copy)
    sys.dont_write_bytecode = False  # the next run of this copy reads it
    os.environ.update(ENVIRONMENT | dict(os.environ) | {"PYTHONPATH": str(copy / "src")})
    sys.path.insert(0, str(copy / "src"))
    sys.exit(int(pytest.main(arguments)))


def _write(path: Path, text: str) -> None:
    """Write a source file and delete its bytecode, which would hide a change of equal length within the same second."""
    path.write_text(text, encoding="utf-8")
    for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*"):
        compiled.unlink()


def try_mutation(mutation: Mutation, copy: Path, options: argparse.Namespace) -> Outcome:
    """Apply a mutation to the copy, run its tests, and revert it."""
    started = time.monotonic()
    problem = mutation.problem(copy)
    if problem is not None:
        return Outcome(mutation, "not applicable", problem)
    path = copy / SOURCE / mutation.file
    text = path.read_text(encoding="utf-8")
    _write(path, text.replace(mutation.old, mutation.new))
    try:
        code, output = _tests(copy, ["tests"] if options.all else mutation.paths(), options, "-x")
    finally:
        _write(path, text)
    seconds = time.monotonic() - started
    if code is None:
        return Outcome(mutation, "killed", "the tests timed out", seconds)
    if code == 1:
        failed = re.search(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
        return Outcome(mutation, "killed", f"by {failed.group(1)}" if failed else "", seconds)
    if code == 0:
        kind = "accepted" if mutation.accepted else "survived"
        return Outcome(mutation, kind, mutation.accepted or mutation.why, seconds)
    return Outcome(mutation, "broken", f"pytest exited with code {code}: {_last_line(output)}", seconds)


def _tests(copy: Path, tests: Sequence[str], options: argparse.Namespace, *more: str) -> tuple[int | None, str]:
    """Call `run_tests` with the options. The whole suite needs a fresh Python, as some tests check what is imported."""
    return run_tests(copy, tests, options.timeout if more else None, *more, fresh=options.fresh or options.all)


def _last_line(output: str) -> str:
    lines = [line for line in output.splitlines() if line.strip()]
    return lines[-1] if lines else "no output"


def settled(log: Path | None) -> set[str]:
    """Names of mutations that an earlier run logged as killed or accepted in `log`."""
    lines = log.read_text(encoding="utf-8").splitlines() if log and log.exists() else []
    return {words[1] for line in lines if len(words := line.split()) > 1 and words[0] in ("killed", "accepted")}


def run(mutations: Sequence[Mutation], root: Path = ROOT, *, options: argparse.Namespace) -> int:
    """Try each mutation, print a line for each and a summary, and return the exit code."""
    os.environ.update(ENVIRONMENT | dict(os.environ))  # before torch is imported
    already_settled = settled(options.log)
    mutations = [m for m in mutations if m.name not in already_settled]
    if already_settled:
        print(f"{len(already_settled)} already settled, {len(mutations)} left", flush=True)
    with tempfile.TemporaryDirectory(prefix="penchant-mutate-") as folder:
        copies: SimpleQueue[Path] = SimpleQueue()
        for i in range(options.jobs):
            copies.put(copy_repository(root, Path(folder) / str(i)))
        if not options.no_check:
            copy = copies.get()
            tests = ["tests"] if options.all else list(dict.fromkeys(t for m in mutations for t in m.paths()))
            code, output = _tests(copy, tests, options)
            copies.put(copy)
            if code != 0:
                print(output, "\nThe tests fail without any mutation; nothing was tried.", sep="")
                return 1
            print(f"without mutations: {_last_line(output)}", flush=True)

        def run_one(mutation: Mutation) -> Outcome:
            copy = copies.get()
            try:
                outcome = try_mutation(mutation, copy, options)
            finally:
                copies.put(copy)
            print(outcome.line(), flush=True)
            if options.log:
                with options.log.open("a", encoding="utf-8") as file:
                    file.write(f"{outcome.line()}\n")
            return outcome

        with ThreadPoolExecutor(options.jobs) as pool:
            outcomes = list(pool.map(run_one, mutations))
    kinds = [o.kind for o in outcomes]
    counts = ", ".join(f"{kinds.count(k)} {k}" for k in dict.fromkeys(("killed", "survived", *kinds)))
    print(f"\n{len(outcomes)} mutations: {counts}")
    for outcome in outcomes:
        if outcome.kind == "killed" and outcome.mutation.accepted:
            print(f"{outcome.mutation.name} is killed now: remove `accepted` from the table")
    return 0 if all(o.good for o in outcomes) else 1


def options_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="names of mutations or shell patterns (default: all)")
    parser.add_argument(
        "--file", default="", help="only mutations in files whose path below src/penchant starts with this"
    )
    parser.add_argument("--list", action="store_true", help="list the mutations and run nothing")
    parser.add_argument(
        "--all", action="store_true", help="run the whole test suite for each mutation instead of only its own tests"
    )
    parser.add_argument(
        "--jobs", type=int, default=1, help="mutations to run at a time, each in its own copy (default: 1)"
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=900.0,
        help="time limit for the tests of one mutation, in seconds (default: 900)",
    )
    parser.add_argument(
        "--fresh",
        action="store_true",
        help="start a new Python for each mutation, which is slower (always on with --all)",
    )
    parser.add_argument("--log", type=Path, help="file to log outcomes to; a later run skips what is settled there")
    parser.add_argument("--no-check", action="store_true", help="do not test the unchanged copy first")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    options = options_of(arguments)
    mutations = chosen(read_table(), options.names, options.file)
    if not mutations:
        print("no mutation matches; --list shows them all", file=sys.stderr)
        return 2
    if options.list:
        for m in mutations:
            print(f"{m.name:<34}  {m.file}: {m.why}" + (f" (accepted: {m.accepted})" if m.accepted else ""))
        return 0
    return run(mutations, options=options)


if __name__ == "__main__":
    sys.exit(main())
