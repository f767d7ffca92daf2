"""Python objects in place of names in a config: rows, frames, models, tokenizers, functions and classes.

A config holds file names, and a run is resumed, evaluated and reported by these names. So each object is written to
``OUTPUT/given`` under a name with its hash, and the config names that file. A different object gets a different name: a run
that is called again with changed rows or a changed function is refused, as it is for changed files.
"""

from __future__ import annotations

import builtins
import dis
import functools
import hashlib
import inspect
import json
import keyword
import math
import os
import pickle
import re
import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from penchant.base.files import cache_folder, file_sha256, temp_path, write_text_atomically, writing
from penchant.base.functions import GIVEN
from penchant.base.text import did_you_mean
from penchant.data.read import calls_without_nulls
from penchant.errors import ConfigError, DataError
from penchant.runfolder import GIVEN_FOLDER

FRAMES = ("to_dict", "iter_rows", "to_pylist", "column_names")  # pandas, polars, pyarrow or datasets frames have one
LIBRARIES = sys.stdlib_module_names - {"__main__"} | {"numpy", "penchant", "torch", "transformers"}
DIGITS = 12  # of the SHA-256, in names


def given_folder(output: str | Path | None) -> Path:
    """Where objects are written: the run folder, or the cache if there is no run."""
    return cache_folder(GIVEN_FOLDER) if output is None else Path(output).expanduser() / GIVEN_FOLDER


def named(value: Any, folder: Path, where: str = "") -> Any:
    """Write every object in some settings to a file, and replace it with the file's path.

    Args:
        value: a config's mapping, or a part of it; where: its key, for errors.

    Raises:
        ConfigError: an unsupported object. DataError: rows that cannot be written as JSON, or none.
    """
    parts = where.split(".")
    if value is None or isinstance(value, (str, bytes, int, float, bool, os.PathLike)):
        return value
    # or one of several held-out sets
    if is_rows(value) and ("eval_path" in parts[-2:] or parts[-1] in ("path", "data")):
        return str(write_rows(value, folder, where))
    if isinstance(value, Mapping):
        # a key may be an object too: a reward with its weight
        settings = {named(k, folder, where): named(v, folder, f"{where}.{k}".lstrip(".")) for k, v in value.items()}
        if len(settings) < len(value):
            raise ConfigError(where, "holds objects that cannot be told apart", "give each as a function of its own")
        return settings
    if isinstance(value, (list, tuple)):
        return [named(v, folder, where) for v in value]
    if hasattr(value, "save_pretrained"):
        return str(write_pretrained(value, folder))
    if callable(value):
        return function_name(value, folder, where)
    return value  # a date or a validated section: left to the config's validation


def is_rows(value: Any) -> bool:
    """Whether an object holds rows: a list of mappings, a frame or table, a `Dataset` of Penchant or of another library."""
    if isinstance(value, Mapping):
        return False
    if isinstance(value, (list, tuple)):
        # a list of texts is file names, and a list of mappings with "path" is the sources of a mixture
        return bool(value) and isinstance(value[0], Mapping) and "path" not in value[0]
    if hasattr(value, "save_pretrained") or isinstance(value, (str, type, FunctionType)):
        return False
    return hasattr(value, "trees") or any(hasattr(value, n) for n in FRAMES) or isinstance(value, Iterator)


def is_plain(value: Any) -> bool:
    """Whether a config's mapping holds no objects."""
    if isinstance(value, Mapping):
        return all(is_plain(v) and is_plain(k) for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return not is_rows(value) and all(map(is_plain, value))
    return not (is_rows(value) or hasattr(value, "save_pretrained") or callable(value))


def rows_of(value: Any, where: str) -> Iterator[Mapping[str, Any]]:
    """Iterate over the rows that an object holds."""
    if hasattr(value, "trees") and hasattr(value, "kind"):  # what `load_preferences` returns
        from penchant.download.convert import written_rows

        weighted = any(tree.weight != 1.0 for tree in value.trees)
        for tree in value.trees:
            for row in written_rows(value.kind, tree):
                # extra columns are kept for a reward that reads them; weights apply only if data.weight names their column
                yield {**dict(tree.columns or {}), **row, **({"weight": tree.weight} if weighted else {})}
    elif hasattr(value, "iter_rows"):  # polars
        yield from map(calls_without_nulls, value.iter_rows(named=True))
    elif hasattr(value, "to_batches"):  # pyarrow
        for batch in value.to_batches():
            yield from map(calls_without_nulls, batch.to_pylist())
    elif hasattr(value, "itertuples"):  # pandas
        names = [str(name) for name in value.columns]
        for values in value.itertuples(index=False, name=None):
            yield dict(zip(names, map(_without_nan, values), strict=True))
    elif isinstance(value, Iterable):
        is_table = hasattr(value, "column_names")  # a Dataset of datasets
        for i, row in enumerate(map(calls_without_nulls, value) if is_table else value):
            if not isinstance(row, Mapping):
                raise DataError(f"{where}[{i}]", f"is of type {type(row).__name__}", "give a dict for each row")
            yield row
    else:
        raise ConfigError(where, f"has rows of type {type(value).__name__}", "give a list of dicts")


def write_rows(value: Any, folder: Path, where: str) -> Path:
    """Write rows as JSONL, under a name with their SHA-256.

    Raises:
        DataError: a value that cannot be written as JSON, or no rows. DiskError: the disk is full or not writable.
    """
    digest, count = hashlib.sha256(), 0
    stem = where.removeprefix("data.").replace("eval_path", "eval").replace("path", "train")
    stem = re.sub(r"[^\w-]", "-", stem)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        temp = temp_path(folder / stem)
        try:
            with temp.open("wb") as file:
                for count, row in enumerate(rows_of(value, where), 1):
                    line = _line(row, f"{where}[{count - 1}]")
                    digest.update(line)
                    file.write(line)
            if not count:
                raise DataError(where, "holds no rows", "give at least one")
            path = folder / f"{stem}-{digest.hexdigest()[:DIGITS]}.jsonl"
            os.replace(temp, path)
        finally:
            temp.unlink(missing_ok=True)
    return path


def _line(row: Mapping[str, Any], where: str) -> bytes:
    try:
        return (json.dumps(dict(row), ensure_ascii=False, default=_plain) + "\n").encode()
    except (TypeError, ValueError, RecursionError) as error:
        what = f"cannot be written as JSON: {error}"
        raise DataError(where, what, "give texts, numbers, lists and dicts") from error


def _without_nan(value: Any) -> Any:
    """A cell of a pandas frame, with missing values (NaN) as None."""
    if isinstance(value, float) and math.isnan(value):
        return None
    return None if type(value).__name__ in ("NAType", "NaTType") else value


def _plain(value: Any) -> Any:
    """Convert what `json` cannot write: numpy's numbers and arrays, dates, mappings of other types."""
    if isinstance(value, Mapping):
        return dict(value)
    for convert in ("tolist", "isoformat"):
        if hasattr(value, convert):
            return getattr(value, convert)()
    raise TypeError(f"a value of type {type(value).__name__}")


def write_pretrained(value: Any, folder: Path) -> Path:
    """Write a model or tokenizer with `save_pretrained`, under a name with the SHA-256 of its files."""
    kind = "model" if hasattr(value, "parameters") else "tokenizer"
    temp = temp_path(folder / kind)
    with writing(folder):
        shutil.rmtree(temp, ignore_errors=True)
        temp.mkdir(parents=True)
        try:
            value.save_pretrained(temp)
            digest = _folder_sha256(temp)
            path = folder / f"{kind}-{digest[:DIGITS]}"
            if path.exists() and _folder_sha256(path) != digest:
                shutil.rmtree(path)
            if not path.exists():
                os.replace(temp, path)
        finally:
            shutil.rmtree(temp, ignore_errors=True)
    return path


def _folder_sha256(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest.update(f"{file.relative_to(folder)}\0{file_sha256(file)}\0".encode())
    return digest.hexdigest()


# ---- functions and classes ----


def function_name(value: Any, folder: Path, where: str) -> str:
    """``FILE.py:NAME`` for a function, a class or an object with `__call__`.

    The file has its source if that is self-contained, apart from imports. Then commands can use it like any other file.
    Otherwise the file only raises an error that the object has to be given again.
    """
    name = str(getattr(value, "__name__", type(value).__name__))
    name = name if name.isidentifier() and not keyword.iskeyword(name) else "function"
    content = _as_file(value, name, where)
    path = (folder / f"{name}-{hashlib.sha256(content.encode()).hexdigest()[:DIGITS]}.py").resolve()
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_text_atomically(path, content)
    GIVEN[f"{path}:{name}"] = value
    return f"{path}:{name}"


def _as_file(value: Any, name: str, where: str) -> str:
    try:
        source = textwrap.dedent(inspect.getsource(value if hasattr(value, "__name__") else type(value)))
    except (OSError, TypeError):
        source = ""
    if isinstance(value, FunctionType) and source.startswith(("def ", "async def ")) and value.__name__ == name:
        imports = _imports_of(value)
        text = "" if imports is None else f"from __future__ import annotations\n\n{imports}\n\n{source}"
        if text and _runs(text, name):
            return text
    comment = textwrap.indent(source, "# ", lambda line: True)
    message = f"{name} was given from Python for {where}: call the function of penchant.api again with it, or put it in a file"
    return f"# SHA-256 {_digest(value)}. Its source, for the record:\n{comment}\n\nraise RuntimeError({message!r})\n"


def _imports_of(function: FunctionType) -> str | None:
    """The import lines that a function needs; None if it needs more than libraries."""
    # a default that is not a literal depends on where the function was defined
    defaults = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    if function.__closure__ or not all(d is None or isinstance(d, (bool, int, float, str)) for d in defaults):
        return None
    # annotations of keyword-only arguments are evaluated, as a loss gets its parameters from them
    hints = [p.annotation for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
    if not all(a in (inspect.Parameter.empty, bool, int, float, str, "bool", "int", "float", "str") for a in hints):
        return None
    lines = []
    for name, value in _globals_of(function).items():
        if value is _globals_of:  # not defined yet
            return None
        module = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
        if not isinstance(module, str) or module.partition(".")[0] not in LIBRARIES:
            return None
        if isinstance(value, ModuleType):
            lines.append(f"import {module}" + ("" if module == name else f" as {name}"))
        elif getattr(sys.modules.get(module), original := getattr(value, "__name__", ""), None) is value:
            lines.append(f"from {module} import {original}" + ("" if original == name else f" as {name}"))
        else:
            return None
    return "\n".join(lines)


def _globals_of(function: FunctionType) -> dict[str, Any]:
    """The globals that a function reads, by name; one that is not defined yet has the value `_globals_of` itself."""
    names = {
        i.argval
        for code in _codes(function.__code__)
        for i in dis.get_instructions(code)
        if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")
    }
    namespace = function.__globals__
    return {n: namespace.get(n, _globals_of) for n in sorted(names) if n in namespace or not hasattr(builtins, n)}


def _runs(text: str, name: str) -> bool:
    """Whether a source runs by itself and defines `name`."""
    namespace: dict[str, Any] = {"__name__": "given"}
    try:
        exec(compile(text, name, "exec"), namespace)
    except Exception:
        return False
    return callable(namespace.get(name))


def _codes(code: CodeType) -> Iterator[CodeType]:
    """A function's code, and that of functions defined in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _digest(value: Any, depth: int = 4, ancestors: tuple[int, ...] = ()) -> str:
    """SHA-256 of an object's behavior, as far as possible: its code, defaults, and the values that it refers to.

    It is the same in every process: it depends neither on the order of a set nor on whether equal texts are one object or two.
    """
    digest = hashlib.sha256(type(value).__qualname__.encode())
    if value is _globals_of or id(value) in ancestors:
        return digest.hexdigest()
    ancestors = (*ancestors, id(value))
    parts: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, Mapping):
        parts = [(_digest(k, depth, ancestors), part) for k, part in value.items()]
    elif isinstance(value, (list, tuple)):
        parts = enumerate(value)
    elif isinstance(value, (set, frozenset)):
        digest.update(repr(sorted(_digest(part, depth, ancestors) for part in value)).encode())
    elif isinstance(value, ModuleType):
        digest.update(value.__name__.encode())
    elif hasattr(value, "detach"):  # a tensor
        digest.update(_digest(value.detach().float().cpu().numpy(), depth, ancestors).encode())
    elif isinstance(value, (FunctionType, MethodType, functools.partial, type)) or hasattr(value, "__dict__"):
        depth -= 1
        parts = sorted(_parts_of(value).items()) if depth >= 0 else ()
    else:
        try:
            digest.update(pickle.dumps(value))
        except Exception:  # an open file or a lock cannot be hashed
            digest.update(b"?")
    for name, part in parts:
        digest.update(f"{name}={_digest(part, depth, ancestors)}".encode())
    return digest.hexdigest()


def _parts_of(value: Any) -> dict[str, Any]:
    """What determines the behavior of a function, a class or another object."""
    if isinstance(value, FunctionType):
        parts = _globals_of(value)
        for i, code in enumerate(_codes(value.__code__)):
            constants = tuple(c for c in code.co_consts if not isinstance(c, CodeType))
            parts[f"code {i}"] = (code.co_code, constants, code.co_names, code.co_varnames)
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            with suppress(ValueError):  # not set yet
                parts[name] = cell.cell_contents
        parts |= {f"default {i}": d for i, d in enumerate(value.__defaults__ or ())}
        return parts | {f"default {n}": d for n, d in (value.__kwdefaults__ or {}).items()}
    if isinstance(value, MethodType):
        return {"function": value.__func__, "self": value.__self__}
    if isinstance(value, functools.partial):
        return {"function": value.func, "args": value.args, "keywords": value.keywords}
    if isinstance(value, type):
        bases = [base for base in value.__bases__ if base.__module__.partition(".")[0] not in LIBRARIES]
        kinds = (FunctionType, str, int, float, tuple, list, dict, classmethod, staticmethod, property)
        members = {n: p for n, p in vars(value).items() if isinstance(p, kinds) and n not in ("__module__", "__doc__")}
        return members | {"bases": bases, "name": value.__qualname__}
    return {"type": type(value), **vars(value)}


# ---- configs ----

KEYS = {
    "data": "data.path",
    "eval_data": "data.eval_path",
    "model": "model.path",
    "tokenizer": "model.tokenizer",
    "reward": "reward",
    "loss": "loss.name",
}


def set_in(config: Mapping[str, Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """A config's mapping with the arguments of `KEYS` inserted.

    Raises:
        ConfigError: there is no such argument.
    """
    settings = dict(config)
    for argument, value in arguments.items():
        if argument not in KEYS:
            raise ConfigError(argument, "is not an argument", did_you_mean(argument, KEYS))
        section, _, name = KEYS[argument].partition(".")
        existing = settings.get(section, {})
        settings[section] = {**existing, name: value} if name and isinstance(existing, Mapping) else value
    return settings


def output_of(config: Mapping[str, Any], overrides: Sequence[str]) -> str:
    """The output named by a config's mapping or its overrides.

    Raises:
        ConfigError: there is none.
    """
    values = [value for key, _, value in (o.partition("=") for o in overrides) if key.strip() == "output"]
    output = values[-1] if values else config.get("output")
    if not output or not isinstance(output, (str, os.PathLike)):
        raise ConfigError("output", "is missing", "set it to the run's folder")
    return str(output)
