"""A user's own Python function, named ``path.py:function``."""

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
from penchant.errors import ConfigError

OWN = "penchant_own_"  # what the modules of own files are called, before the file's name
GIVEN: dict[str, Any] = {}  # by path.py:name: objects that this process was given, in place of what is in the file


def python_function(name: str, where: str = "reward", takes: Sequence[str] = ("prompts", "completions")) -> Any:
    """The function that ``path.py:function`` names; its file is run once.

    Args:
        where: what it is for, in errors; takes: what it is called with, in order.

    Raises:
        ConfigError: no such file or function, a file that cannot be imported, or a function that takes something else.
    """
    function = python_object(name, where)
    arguments = ", ".join(takes)
    try:
        inspect.signature(function).bind(*takes)
    except TypeError as error:
        how = f"define it as def f({arguments}); what else it takes needs defaults"
        raise ConfigError(where, f"{name} does not take ({arguments}): {error}", how) from error
    return function


def python_object(name: str, where: str, kind: Literal["function", "class"] = "function") -> Any:
    """The function or class that ``path.py:name`` names; its file is run once.

    Args:
        kind: what is wanted, in errors.

    Raises:
        ConfigError: no such file, function or class, or a file that cannot be imported.
    """
    path, _, attribute = name.rpartition(":")
    file = Path(path).expanduser()
    if not file.is_file():
        raise ConfigError(where, f"{path}: no such file", f"give the path of a Python file, then :{kind}")
    if (given := GIVEN.get(f"{file.resolve()}:{attribute}")) is not None:
        return given
    spec: Any = importlib.util.spec_from_file_location(f"{OWN}{file.stem}", file)
    module: Any = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    try:
        # not exec_module: it may take what was compiled before an edit within the same second, and leaves __pycache__ behind
        with no_exit():
            exec(spec.loader.source_to_code(file.read_bytes(), str(file)), module.__dict__)
    except (Exception, SystemExit) as error:  # a script that ends itself must not end the run unsaid
        raise ConfigError(where, f"{path} cannot be imported ({type(error).__name__}: {error})", "fix it") from error
    found = getattr(module, attribute, None)
    if not callable(found):
        own = [n for n, v in vars(module).items() if inspect.isfunction(v)]
        if kind == "class":  # of those that a file imports, few are meant to be named
            own = [n for n, v in vars(module).items() if inspect.isclass(v) and v.__module__ == module.__name__]
        raise ConfigError(where, f"{path} has no {kind} {attribute!r}", f"there are {', '.join(sorted(own)) or 'none'}")
    return found


@contextmanager
def no_exit() -> Iterator[None]:
    """`os._exit` of somebody's Python code raises SystemExit in here, as `sys.exit` does: nobody would learn of the end otherwise.

    A child process may still end itself. What C code does cannot be met.
    """
    real, owner = os._exit, os.getpid()

    def told(status: int) -> NoReturn:
        if os.getpid() == owner:
            raise SystemExit(status)
        real(status)

    os._exit = told  # type: ignore[assignment]
    try:
        yield
    finally:
        os._exit = real


class TookTooLong(BaseException):
    """A function that had its time. No `Exception`: those a function may catch, completion by completion, and go on."""


def guarded(call: Callable[[], Any], seconds: float | None) -> Any:
    """What somebody's code returns; None: it may take as long as it likes. What it prints goes to standard error, where it disturbs no output.

    Raises:
        TookTooLong: it had its time; SystemExit: it ended itself.
    """
    with no_exit(), redirect_stdout(sys.stderr):
        return call() if seconds is None else within(seconds, call)


def within(seconds: float, call: Callable[[], Any]) -> Any:
    """What `call` returns, if that is not longer than so many seconds away.

    In the main thread a timer interrupts it, so that a function may use signals of its own (math_verify does; its timer then takes the
    place of this one). Elsewhere it is left behind in a thread of its own.

    Raises:
        TookTooLong: it is.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        return in_thread(call, seconds)

    def ring(number: int, frame: Any) -> None:
        raise TookTooLong

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        return call()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def in_thread(call: Callable[[], Any], seconds: float | None) -> Any:
    made: list[Any] = []
    failed: list[BaseException] = []

    def work() -> None:
        try:
            made.append(call())
        except BaseException as error:  # handed to who waits
            failed.append(error)

    thread = threading.Thread(target=work, daemon=True, name="own code")
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TookTooLong
    if failed:
        raise failed[0]
    return made[0]


def is_own(name: str) -> bool:
    """Whether a name is ``path.py:name``: something of the user's own, from a file."""
    return name.rpartition(":")[0].endswith(".py")


def own_file(name: str) -> Path:
    """The file of ``path.py:name``."""
    return Path(name.rpartition(":")[0]).expanduser()


def own_sha256(name: str) -> str | None:
    """SHA-256 of that file and of what it imports from its folder; None of any other name, or where there is no such file."""
    if not is_own(name) or not own_file(name).is_file():
        return None
    own, beside = file_sha256(own_file(name)), imported_sha256(name)
    return hashlib.sha256(repr((own, beside)).encode()).hexdigest() if beside else own


def imported_sha256(name: str) -> dict[str, str]:
    """SHA-256 of each file in the folder of ``path.py:name``, or below it, that it imports, at whatever depth; by its path from there."""
    start = own_file(name)
    root, todo = start.parent, [start]
    found: dict[Path, None] = {}
    while todo:
        at = todo.pop()
        for path in _imports(at, root):
            if path not in found and path != start:
                found[path] = None
                todo.append(path)
    return {str(path.relative_to(root)): file_sha256(path) for path in sorted(found)}


def _imports(file: Path, root: Path) -> Iterator[Path]:
    """Files that the imports of a file mean where `root` is looked in first; a package's own file is run too."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError, OSError, RecursionError):
        return  # what runs it says so
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
            called = getattr(node.func, "attr", getattr(node.func, "id", None))
            names = [str(node.args[0].value)] if called in ("import_module", "__import__") else []
        for name in names:
            parts = name.split(".")
            for n in range(1, len(parts) + 1):
                stem = base.joinpath(*parts[:n])
                for path in (stem.with_name(f"{stem.name}.py"), stem / "__init__.py"):
                    if path.is_relative_to(root) and path.is_file():
                        yield path
