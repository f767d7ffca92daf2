"""Users' own Python functions and classes, named ``path.py:function``."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import inspect
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, Literal, NoReturn

from penchant.base.files import file_sha256
from penchant.base.text import did_you_mean
from penchant.errors import ConfigError

OWN = "penchant_own_"  # prefix of the module names of users' files
GIVEN: dict[str, Any] = {}  # objects given to this process, by path.py:name; used instead of the file


def python_function(
    name: str, where: str = "reward", argument_names: Sequence[str] = ("prompts", "completions")
) -> Any:
    """Load the function that ``path.py:function`` names, by running its file.

    Args:
        where: what it is for, in errors; argument_names: its arguments, in order.

    Raises:
        ConfigError: no such file or function, a file that cannot be imported, or a function with other parameters.
    """
    function = python_object(name, where)
    arguments = ", ".join(argument_names)
    try:
        inspect.signature(function).bind(*argument_names)
    except TypeError as error:
        how = f"define it as def f({arguments}); what else it takes needs defaults"
        raise ConfigError(where, f"{name} does not take ({arguments}): {error}", how) from error
    return function


def python_object(name: str, where: str, kind: Literal["function", "class"] = "function") -> Any:
    """Load the function or class that ``path.py:name`` names, by running its file.

    Args:
        where: what it is for, in errors; kind: the expected kind, in errors.

    Raises:
        ConfigError: no such file, function or class, or a file that cannot be imported.
    """
    path, _, attribute = name.rpartition(":")
    file = Path(path).expanduser()
    if not file.is_file():
        raise ConfigError(where, f"{path}: no such file", f"give the path of a Python file, then :{kind}")
    if (replacement := GIVEN.get(f"{file.resolve()}:{attribute}")) is not None:
        return replacement
    spec: Any = importlib.util.spec_from_file_location(f"{OWN}{file.stem}", file)
    module: Any = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their module there
    try:
        # not exec_module, which may use bytecode from before an edit within the same second, and leaves __pycache__ behind
        with no_exit():
            exec(spec.loader.source_to_code(file.read_bytes(), str(file)), module.__dict__)
    except (Exception, SystemExit) as error:  # a script that exits must not end the run silently
        raise ConfigError(where, f"{path} cannot be imported ({type(error).__name__}: {error})", "fix it") from error
    loaded = getattr(module, attribute, None)
    if not callable(loaded):
        is_kind: Callable[[Any], bool] = inspect.isclass if kind == "class" else inspect.isfunction
        # without imported ones
        defined = sorted(n for n, v in vars(module).items() if is_kind(v) and v.__module__ == module.__name__)
        raise ConfigError(
            where, f"{path} has no {kind} {attribute!r}", did_you_mean(attribute, defined) if defined else "define it"
        )
    return loaded


@contextmanager
def no_exit() -> Iterator[None]:
    """Make `os._exit` in a user's code raise SystemExit, as `sys.exit` does, so that the process does not end silently.

    Child processes may still exit. C code cannot be intercepted.
    """
    real_exit, owner = os._exit, os.getpid()

    def raise_exit(status: int) -> NoReturn:
        if os.getpid() == owner:
            raise SystemExit(status)
        real_exit(status)

    os._exit = raise_exit  # type: ignore[assignment]
    try:
        yield
    finally:
        os._exit = real_exit


class TookTooLong(BaseException):
    """A function timed out. Not an `Exception`, as the function might catch those and continue."""


def guarded(call: Callable[[], Any], seconds: float | None) -> Any:
    """Call a user's code with a time limit in seconds (None: no limit). Its prints go to standard error, away from our output.

    Raises:
        TookTooLong: it timed out; SystemExit: it tried to exit.
    """
    with no_exit(), redirect_stdout(sys.stderr):
        return call() if seconds is None else within(seconds, call)


def within(seconds: float, call: Callable[[], Any]) -> Any:
    """Call a function with a time limit in seconds.

    In the main thread a timer interrupts it, so the function may use signals itself (math_verify does; its timer then replaces
    this one). In other threads, a call that times out is left behind in its own thread.

    Raises:
        TookTooLong: it timed out.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        return in_thread(call, seconds)

    def on_alarm(number: int, frame: Any) -> None:
        raise TookTooLong

    previous_handler = signal.signal(signal.SIGALRM, on_alarm)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        return call()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, previous_handler)


def in_thread(call: Callable[[], Any], seconds: float | None) -> Any:
    results: list[Any] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            results.append(call())
        except BaseException as error:  # raised again in the waiting thread
            errors.append(error)

    thread = threading.Thread(target=work, daemon=True, name="own code")
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TookTooLong
    if errors:
        raise errors[0]
    return results[0]


def is_own(name: str) -> bool:
    """Whether a name is ``path.py:name``, an object in a user's file."""
    return name.rpartition(":")[0].endswith(".py")


def own_file(name: str) -> Path:
    """The file of ``path.py:name``."""
    return Path(name.rpartition(":")[0]).expanduser()


def own_sha256(name: str) -> str | None:
    """SHA-256 of that file and of its imports from its folder; None for any other name or a missing file."""
    if not is_own(name) or not own_file(name).is_file():
        return None
    file_hash, import_hashes = file_sha256(own_file(name)), imported_sha256(name)
    return hashlib.sha256(repr((file_hash, import_hashes)).encode()).hexdigest() if import_hashes else file_hash


def imported_sha256(name: str) -> dict[str, str]:
    """SHA-256 of each file in or below the folder of ``path.py:name`` that it imports, at any depth, by relative path."""
    start = own_file(name)
    root, todo = start.parent, [start]
    imported: dict[Path, None] = {}
    while todo:
        file = todo.pop()
        for path in _imports(file, root):
            if path not in imported and path != start:
                imported[path] = None
                todo.append(path)
    return {str(path.relative_to(root)): file_sha256(path) for path in sorted(imported)}


def _imports(file: Path, root: Path) -> Iterator[Path]:
    """The files under `root` that a file imports, including the ``__init__.py`` of packages."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError, OSError, RecursionError):
        return  # running it will report this
    for node in ast.walk(tree):
        base, names = root, []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                base = file.parents[node.level - 1] if node.level <= len(file.parents) else root
            module = [node.module] if node.module else []
            names = [".".join([*module, alias.name]) for alias in node.names]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            callee = getattr(node.func, "attr", getattr(node.func, "id", None))
            names = [str(node.args[0].value)] if callee in ("import_module", "__import__") else []
        for name in names:
            parts = name.split(".")
            for n in range(1, len(parts) + 1):
                stem = base.joinpath(*parts[:n])
                for path in (stem.with_name(f"{stem.name}.py"), stem / "__init__.py"):
                    if path.is_relative_to(root) and path.is_file():
                        yield path
