"""The options of each command, defined once for the command line, `penchant.api` and the implementation."""

from __future__ import annotations

import ast
import functools
import inspect
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeVar

from penchant.base.machine import DEVICES
from penchant.base.text import did_you_mean, short
from penchant.errors import ConfigError

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


def option(about: str, default: Any = None, metavar: str | None = None, **more: Any) -> Any:
    """A field of a request.

    Args:
        about: its help text; ``%(default)g`` in it is the default.
        more: `flag`, if it is not the name; `positional`; `choices`; `group`: its heading in the help; `either`: a switch
            that also has ``--no-``; `read`: parses the text from the command line; `low`, `high`, `above`: bounds.
    """
    metadata = {"help": about, "metavar": metavar, **more}
    if isinstance(default, dict):
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata)


MOST: dict[type, float] = {int: 2**31 - 1, float: 1e30}  # beyond any sensible value

# What an argument of each type may be, and how a message names it. Any other name in an annotation is that of a class.
TYPES: dict[str, tuple[Any, str]] = {
    "str": (str, "a text"),
    "Path": (os.PathLike, "a path"),
    "int": (Integral, "a whole number"),
    "float": (Real, "a number"),
    "bool": (Integral, "True or False"),
    "Mapping": (Mapping, "a dict"),
    "Sequence": (Iterable, "a list"),
    "tuple": (Iterable, "a list"),
    "Callable": (Callable, "a function"),
    "None": (type(None), "None"),
}

ADVICE = {"overrides": 'write "key.path=value"; objects have names, such as data=rows'}


@functools.cache
def _alternatives(annotation: str) -> list[tuple[str, str]]:
    """The types in an annotation, each with that of its parts; the text is read, as some names are imported by type checkers only."""
    node = ast.parse(annotation, mode="eval").body
    if isinstance(node, ast.BinOp):
        return [*_alternatives(ast.unparse(node.left)), *_alternatives(ast.unparse(node.right))]
    if not isinstance(node, ast.Subscript):
        return [(annotation, "Any")]
    kind, parts = ast.unparse(node.value), node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
    return [(kind, ast.unparse(parts[1 if kind == "Mapping" else 0]))]


def check_type(name: str, value: Any, annotation: str) -> None:
    """Check that an argument has one of the types in its annotation, and so has every part of it.

    Raises:
        ConfigError: it has none of them, or it is a text with a NUL character.
    """
    expected = []
    for kind, inside in _alternatives(annotation):
        if kind == "Any":
            return
        if _is(value, kind):
            parts: Iterable[tuple[Any, Any]] = ()
            if kind == "Mapping":
                parts = value.items()
            elif kind in ("Sequence", "tuple") and isinstance(value, Collection):  # an iterator would be used up
                parts = enumerate(value)
            for key, part in parts:
                check_type(f"{name}[{key!r}]", part, inside)
            if isinstance(value, (str, os.PathLike)) and "\0" in str(value):
                raise ConfigError(name, "holds a NUL character", "leave it out")
            return
        expected.append(TYPES.get(kind, (None, f"{'an' if kind[0] in 'AEIOU' else 'a'} {kind}"))[1])
    plain = value is None or isinstance(value, (str, bytes, Real))
    what = f"is {short(repr(value))}" if plain else f"is of type {type(value).__name__}"
    how = "give " + " or ".join(", ".join(expected).rsplit(", ", 1))
    raise ConfigError(name, what, ADVICE.get(name.partition("[")[0], how))


def _is(value: Any, kind: str) -> bool:
    """Whether a value is of a type named in an annotation. Texts and dicts are no lists, and True is no number."""
    if isinstance(value, bool):
        return kind == "bool"
    if kind in ("Sequence", "tuple") and isinstance(value, (str, bytes, Mapping)):
        return False
    if kind in TYPES and isinstance(value, TYPES[kind][0]):
        return True
    return kind in (base.__name__ for base in type(value).__mro__)


def checked(function: F) -> F:
    """Decorator that checks the arguments of a function by its annotations; None stands for a default.

    `request_of` checks those of ``**asked``.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{function.__name__}(): {error}") from None
        for name, value in [*bound.arguments.items()]:
            parameter = signature.parameters[name]
            if value is None and parameter.default is not parameter.empty:
                del bound.arguments[name]
                continue
            several = parameter.kind is parameter.VAR_POSITIONAL
            for i, part in enumerate(value if several else [value]):
                if several and isinstance(part, (list, tuple)):
                    raise ConfigError(f"{name}[{i}]", "is a list", f"put a star before it: {function.__name__}(*LIST)")
                check_type(f"{name}[{i}]" if several else name, part, parameter.annotation)
        return function(*bound.args, **bound.kwargs)

    return call  # type: ignore[return-value]


def broken_bound(value: float, low: float | None, high: float | None, above: float | None) -> str:
    """The bound that a number breaks, such as ``at least 1``; empty if it breaks none."""
    if value != value:
        return "a number"
    if low is not None and value < low:
        return f"at least {low:g}"
    if above is not None and value <= above:
        return f"more than {above:g}"
    return f"at most {high:g}" if high is not None and value > high else ""


def check_names(asked: Iterable[str], options: Collection[str], command: str) -> None:
    """Check that every keyword is an option of the command.

    Raises:
        ConfigError: one is not.
    """
    for name in asked:
        if name not in options:
            raise ConfigError(command, f"unknown option {name!r}", did_you_mean(name, options))


def request_of(kind: type[T], asked: Mapping[str, Any], command: str) -> T:
    """Build a request from keywords; lists are turned into tuples, and paths into texts. None stands for the default.

    Raises:
        ConfigError: a keyword that is not an option, a number out of its bounds, or a value of another type than the option's.
    """
    options = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]
    check_names(asked, options, command)
    values = {}
    for name, value in asked.items():
        required = options[name].default is MISSING and options[name].default_factory is MISSING
        if value is None and not required:
            continue
        values[name] = value = _plain(value, str(options[name].type))
        check_type(name, value, str(options[name].type))
        if type(value) in MOST and not abs(value) <= MOST[type(value)]:
            raise ConfigError(name, "is beyond every range", f"give at most {MOST[type(value)]:g}")
        bounds = (options[name].metadata.get(bound) for bound in ("low", "high", "above"))
        if isinstance(value, Real) and (bound := broken_bound(float(value), *bounds)):
            raise ConfigError(name, f"is {float(value):g}", f"give {bound}")
    return kind(**values)


def _plain(value: Any, annotation: str) -> Any:
    """A value as the command line gives it: several as a tuple, and paths and the whole numbers of a text option as texts."""
    if getattr(value, "ndim", None) == 0:
        value = value.item()  # a number of NumPy or torch
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if annotation.startswith("tuple") and isinstance(value, str):
        return (value,)
    if "tuple" in annotation and _is(value, "tuple"):
        return tuple(_plain(part, "") for part in value)
    if annotation.removesuffix(" | None") == "str" and _is(value, "int"):
        return str(value)
    return value


def shows(kind: type) -> Callable[[F], F]:
    """Decorator that lists a request's keywords in the signature of a function that takes them as ``**asked``."""

    def decorate(function: F) -> F:
        signature = inspect.signature(function)
        own_parameters = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        options = [
            p.replace(kind=p.KEYWORD_ONLY)
            for name, p in inspect.signature(kind).parameters.items()
            if name not in signature.parameters
        ]
        function.__signature__ = signature.replace(parameters=[*own_parameters, *options])  # type: ignore[attr-defined]
        return function

    return decorate


# ---- `penchant eval` ----

WRITES = "what the model writes"


@dataclass(frozen=True, slots=True)
class EvalRequest:
    """Options of `penchant eval`; docs/eval.md explains each."""

    step: str = option("checkpoint of a run: last, best, 0 (the start) or a step's number (default: last)", "last")
    data: str | tuple[str, ...] | None = option(
        "rows to evaluate on (default: the run's held-out rows)", metavar="FILE"
    )
    text: str | None = option("plain text on which to measure perplexity and bits per byte", metavar="FILE")
    reference: str | None = option("model to compare with, or none (default: its start, if known)", metavar="MODEL")
    base: str | None = option("base model of an adapter (default: the one that the adapter names)", metavar="MODEL")
    beta: float | None = option("beta of implicit rewards (default: the run's loss.beta, else 1)", above=0)
    exact_kl: bool | None = option("KL over the whole vocabulary (default: if there is a reference)", either=True)
    generate: int | None = option("how many prompts to write completions for", metavar="N", group=WRITES, low=1)
    samples: int = option("completions per prompt (default: %(default)d)", 1, group=WRITES, low=1)
    max_new_tokens: int = option(
        "maximum number of tokens in a completion (default: %(default)d)", 64, group=WRITES, low=1
    )
    temperature: float = option("temperature; 0: the likeliest token (default: %(default)g)", 1.0, group=WRITES, low=0)
    seed: int = option("seed for sampling (default: %(default)d)", 0, group=WRITES, low=0)
    reward: Any = option("any reward: sentiment, path.py:function, a reward model's run", group=WRITES)  # noqa: RUF009
    also: tuple[str, ...] = option("another reward to report (repeatable)", (), "REWARD", group=WRITES)
    overlap: bool | None = option(
        "compute BLEU and ROUGE against the data's answers (default: if penchant[eval] is installed)",
        either=True,
        group=WRITES,
    )
    stemmer: bool = option("use Porter's stemmer for ROUGE", False, flag="--rouge-stemmer", group=WRITES)
    samples_output: str | None = option("file to write the completions to", metavar="FILE.jsonl", group=WRITES)
    output: str | None = option("file to write all figures to", metavar="FILE.json")
    rows_output: str | None = option("file to write the figures of each answer to", metavar="FILE.jsonl")

    @property
    def files(self) -> list[str]:
        """The files of `data`."""
        return [self.data] if isinstance(self.data, str) else [*(self.data or ())]

    @property
    def bare(self) -> bool:
        """Whether only a run's own held-out metrics are requested."""
        options = (self.data, self.text, self.reference, self.base, self.generate, self.exact_kl, self.beta)
        return all(value is None for value in (*options, self.rows_output))

    @property
    def text_alone(self) -> bool:
        """Whether only a text is evaluated, and no answers."""
        others = (self.data, self.generate, self.exact_kl, self.beta)
        return self.text is not None and all(value is None for value in others)

    def check(self) -> None:
        """Refuse options that do not go together, and files that cannot be written.

        Raises:
            ConfigError: names the flag.
        """
        from penchant.base.files import COMPLETIONS, FIGURES, ROWS, check_output

        generation_options = {"--reward": self.reward, "--also": self.also, "--samples-output": self.samples_output}
        unused = next((flag for flag, value in generation_options.items() if value), None)
        if self.generate is None and unused is not None:
            raise ConfigError(unused, "is about what the model writes, and nothing is generated", "add --generate 100")
        if self.temperature == 0 and self.samples > 1:
            what = "greedy completions of one prompt are all alike"
            raise ConfigError("--samples", what, "give --temperature 1, or one sample")
        if self.text_alone and self.rows_output is not None:
            raise ConfigError("--rows-output", "is about answers, and there are none", "add --data FILE")
        files = {"--output": self.output, "--samples-output": self.samples_output, "--rows-output": self.rows_output}
        for flag, path in files.items():
            if path is not None and Path(path).expanduser().is_dir():
                raise ConfigError(flag, f"{path} is a folder", "give a file")
            if path is not None and not Path(path).expanduser().parent.is_dir():
                raise ConfigError(flag, f"{Path(path).parent}: no such folder", "make it first, or give another file")
            if path is not None:
                inputs = (self.data, self.text, self.base, self.reference, self.reward, *self.also)
                check_output(path, {"--output": FIGURES, "--samples-output": COMPLETIONS}.get(flag, ROWS), inputs, flag)
        for flag, path in list(files.items())[1:]:
            duplicate = next((f for f in files if f != flag and files[f] == path), None)
            if path is not None and duplicate is not None:
                raise ConfigError(flag, f"is the file of {duplicate}", "give another name")

    def settings(self) -> dict[str, Any]:
        """The settings that metrics depend on, apart from model and rows, for the log."""
        if self.generate is None:
            return {}
        names = ("generate", "samples", "temperature", "max_new_tokens", "seed")
        reward = dict(self.reward) if isinstance(self.reward, Mapping) else self.reward
        return {n: getattr(self, n) for n in names} | {"reward": reward} | ({"also": [*self.also]} if self.also else {})


# ---- `penchant compare` ----

HUMANS = "humans:"  # prefix in `--judge` for a file of human preferences


@dataclass(frozen=True, slots=True)
class CompareRequest:
    """Options of `penchant compare`; docs/compare.md explains each. `judge` is a text or `JudgeOptions`."""

    reward: Any = option("any reward: sentiment, path.py:function, a reward model's run (default: none)")  # noqa: RUF009
    also: tuple[str, ...] = option("another reward to report beside it (repeatable)", (), "NAME")
    judge: Any = option(  # noqa: RUF009
        "judge that picks the better of two answers: path.py:function, http://HOST:PORT/v1, or humans:preferences.jsonl",
        metavar="JUDGE",
    )
    judge_model: str | None = option("the model's name at the endpoint", metavar="NAME")
    judge_key_env: str | None = option("environment variable with its key (default: OPENAI_API_KEY)", metavar="NAME")
    judge_instruction: str | None = option("file with a template that replaces the built-in one", metavar="FILE")
    judge_parameters: Mapping[str, Any] | str | None = option(
        "sampling parameters that replace the built-in ones", metavar="JSON"
    )
    judge_concurrency: int | None = option("how many questions to ask at a time (default: 4)", metavar="N", low=1)
    against: str | None = option("run to compare all others with (default: their common start)", metavar="RUN")
    prompts: int = option("number of held-out prompts (default: %(default)d)", 200, low=1)
    samples: int = option("completions per prompt (default: %(default)d)", 1, low=1)
    max_new_tokens: int = option("maximum number of tokens in a completion (default: %(default)d)", 64, low=1)
    seed: int = option("seed for sampling (default: %(default)d)", 0, low=0)
    step: str | None = option("checkpoint: best, last or a step's number (default: best if one is tracked, else last)")
    data: str | None = option("test rows; every use of them is recorded beside the file", metavar="FILE")
    output: str | None = option("where to write the comparison (default: beside the first run)", metavar="FOLDER")


# ---- `penchant export` ----


@dataclass(frozen=True, slots=True)
class ExportRequest:
    """Options of `penchant export`; docs/export.md explains each."""

    run: str = option("a run's folder, or a checkpoint in it", MISSING, "RUN", positional=True)
    to: str = option("safetensors, pt, merged, adapter or gguf", MISSING, "FORMAT")
    step: str = option("last, best or a number (default: last)", "last")
    output: str | None = option("where to write (default: RUN/export/step-N-FORMAT)", metavar="FOLDER")
    dtype: str = option("fp32, bf16, fp16, and q8_0 for gguf (default: as stored)", "auto")
    max_shard_size: str = option("largest size of a safetensors file (default: %(default)s)", "5GB", "SIZE")
    push: str | None = option("upload the folder to the hub (token: HF_TOKEN or login)", metavar="OWNER/NAME")
    private: bool = option("if --push creates the repository, make it private", False)


# ---- `penchant data get` ----


def workers_in(text: str) -> int | str:
    """Parse a number of processes, or ``ray``."""
    if text != "ray" and not (text.isdecimal() and 1 <= int(text) <= 4096):
        raise ConfigError("--workers", f"is {text!r}", "give 1 or more, or ray for a cluster's")
    return text if text == "ray" else int(text)


SPLIT = "split (prompts that are equal or nearly equal stay together)"
WHICH = "which rows"
BECOME = "what the rows become"


def _shares(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError("--split", f"is {text!r}", "give three numbers, such as 0.9,0.05,0.05") from error


def _rule(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        return text


def _value(text: str) -> Any:
    import yaml

    from penchant.base.files import yaml_value

    try:
        return yaml_value(text)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError("--set", f"{text!r} is not YAML", "write name=value, such as margin=1.5") from error


@dataclass(frozen=True, slots=True)
class GetRequest:
    """Options of `penchant data get`; docs/data_get.md explains each."""

    name: str = option(
        "a name in the catalog or a hub id (owner/name); without one the catalog is listed",
        "",
        "NAME",
        positional=True,
    )
    source: str | None = option("a copy on this machine: a file or a folder", None, "PATH", flag="--from")
    subsets: tuple[str, ...] = option("subset to read (repeatable), or all", (), "NAME", flag="--subset")
    revision: str | None = option("branch, tag or commit (default: the published one)", metavar="NAME")
    output: str | None = option("where to write (default: data/NAME)", metavar="FOLDER")
    first: int | None = option("read only the first N rows, and download no more than they need", metavar="N", low=1)
    redo: bool = option("start again if the folder holds another result", False)
    quiet: bool = option("do not show progress", False)
    workers: int | str | None = option(
        "processes that share the files of a large set, or ray: those of a cluster (default: one per core)",
        metavar="N",
        read=workers_in,
    )
    split: tuple[float, ...] = option(
        "shares of train, validation and test (default: 0.9,0.05,0.05)",
        (0.9, 0.05, 0.05),
        "A,B,C",
        group=SPLIT,
        read=_shares,
    )
    seed: int = option("seed of the split (default: %(default)d)", 0, group=SPLIT, low=0)
    published_splits: bool = option("keep the published splits; draw only the missing ones", False, group=SPLIT)
    language: tuple[str, ...] = option(
        "keep rows in this language, spelled as in the data: English, en (repeatable)", (), "NAME", group=WHICH
    )
    redacted: str = option("rows with redacted names: keep, only or drop (default: keep)", "keep", group=WHICH)
    moderation: str | float = option(
        "keep, drop-flagged, or a score at which rows are dropped", "keep", "RULE", group=WHICH, read=_rule
    )
    as_: str | None = option("sft, prompts or unpaired (default: as the rows are)", metavar="KIND", group=BECOME)
    reward: str | None = option(
        "reward that labels the answers for --as unpaired: sentiment, a run, path.py:function",
        metavar="REWARD",
        group=BECOME,
    )
    threshold: float | None = option("rewards at or above this are good", metavar="X", group=BECOME)
    label_with: str | None = option(
        "function that labels an answer: True, False, or None to leave it out", metavar="PATH.py:FUNCTION", group=BECOME
    )
    layout: str | None = option("a layout that `penchant data formats` lists", metavar="NAME", group=BECOME)
    columns: Mapping[str, str] = option("", {}, group=BECOME, also=("--columns",))
    options: Mapping[str, Any] = option(
        "an option of the layout (repeatable)", {}, "OPTION=VALUE", flag="--set", group=BECOME, read=_value
    )

    @property
    def labels(self) -> bool:
        """Whether a reward or a function decides which answers are good."""
        return self.reward is not None or self.label_with is not None


# ---- `penchant data fix` ----


def names_in(given: str | Sequence[str]) -> tuple[str, ...]:
    """Names as a tuple, from a sequence or from one text with commas between them."""
    names = given.replace(" ", "").split(",") if isinstance(given, str) else given
    return tuple(name for name in names if name)


@dataclass(frozen=True, slots=True)
class FixRequest:
    """Options of `penchant data fix`; docs/data_audit.md explains each rule."""

    source: str = option("a data file, which is left as it is", MISSING, "IN", positional=True)
    output: str = option("the copy: JSONL, or Parquet if IN is Parquet", MISSING, "OUT", positional=True)
    drop: str | tuple[str, ...] = option(
        "rules to apply beyond the safe ones (bad_rows, empty, identical, duplicates): near_duplicates, contradictions, "
        "near_contradictions, cycles, secrets, pii, leakage; separated by commas",
        "",
        "RULES",
        read=names_in,
    )
    keep: str | tuple[str, ...] = option("safe rules to switch off", "", "RULES", read=names_in)
    redact: str | tuple[str, ...] = option(
        "what to mask in the rows that stay: pii, secrets", "", "KINDS", read=names_in
    )
    against: tuple[str, ...] = option("for --drop leakage: a split whose prompts are dropped (repeatable)", (), "FILE")
    shape: str = option("layout of the rows (default: detected from the columns)", "auto")
    columns: Mapping[str, str] = option("", {})
    overwrite: bool = option("overwrite OUT", False)
    workers: int | str | None = option(
        "processes that look at parts of a large file, or ray: those of a cluster (default: one per core)",
        metavar="N",
        read=workers_in,
    )
    edits: str | None = option(
        "edits of rows made in penchant studio: a file of .studio/edits in its folder", metavar="FILE"
    )


# ---- `penchant chat`, `penchant serve` ----

TEMPLATES = ("auto", "chat", "transcript", "plain")


@dataclass(frozen=True, slots=True)
class ModelRequest:
    """Options of the model to load."""

    model: str = option(
        "a run, a CONFIG.yaml, the folder of a checkpoint, an adapter or a model, or a hub id",
        MISSING,
        "RUN",
        positional=True,
    )
    step: str = option("checkpoint of a run: last, best, 0 (the start) or a step's number (default: last)", "last")
    base: str | None = option("base model of an adapter (default: the one that the adapter names)", metavar="MODEL")
    template: str = option(
        "how messages are written for the model (default: its chat template where it has one)",
        "auto",
        choices=TEMPLATES,
    )
    dtype: str | None = option("precision (default: the run's, else auto)", choices=("auto", "fp32", "bf16"))
    device: str | None = option("device (default: the run's, else auto)", choices=DEVICES)


@dataclass(frozen=True, slots=True)
class ChatRequest(ModelRequest):
    """Options of `penchant chat`."""

    against: str | None = option("a second model, which answers the same messages", metavar="RUN")
    against_step: str = option("which checkpoint of the second model, if it is a run (default: last)", "last", "STEP")
    prefer: str | None = option("file for /left and /right (default: preferences.jsonl)", metavar="FILE.jsonl")
    blind: bool = option("do not show which answer is whose", False)
    system: str = option("system prompt", "", "TEXT")
    tools: str | None = option("file with a JSON list of tools for the chat template", metavar="FILE.json")
    temperature: float = option("temperature; 0: the likeliest token (default: %(default)g)", 0.7, low=0)
    top_p: float = option(
        "sample from the smallest set of tokens with this probability (default: %(default)g)", 1.0, above=0, high=1
    )
    top_k: int = option("sample from this many of the likeliest tokens; 0 means all (default: %(default)d)", 0, low=0)
    max_new_tokens: int = option("maximum number of tokens in an answer (default: %(default)d)", 256, low=1)
    seed: int = option("random seed (default: %(default)d)", 0, low=0)


@dataclass(frozen=True, slots=True)
class ServeRequest(ModelRequest):
    """Options of `penchant serve`."""

    host: str = option(
        "address to listen on (default: 127.0.0.1); any other needs PENCHANT_API_KEY in the environment", "127.0.0.1"
    )
    port: int = option("port; 0 takes a free one (default: %(default)d)", 8000, low=0, high=65535)
    name: str | None = option("the model's name for clients (default: the folder's name or the hub id)")
    at_once: int = option("how many prompts are answered at the same time (default: %(default)d)", 4, low=1, high=64)
    waiting: int = option("how many prompts may wait (default: %(default)d)", 64, low=0)
    max_tokens: int = option("most tokens in one answer (default: %(default)d)", 4096, low=1)
    max_body: int = option("largest request body (default: 4 MiB)", 4 << 20, "BYTES", low=1)
    timeout: float = option("longest time for a request (default: %(default)g)", 600.0, "SECONDS", above=0)
    quiet: bool = option("do not log requests", False)


# ---- `penchant studio` ----


@dataclass(frozen=True, slots=True)
class StudioRequest:
    """Options of `penchant studio`; docs/studio.md explains it."""

    folder: str = option(
        "the folder with your runs, data and arenas (default: the current one)", ".", "FOLDER", positional=True
    )
    host: str = option(
        "address to listen on (default: 127.0.0.1); any other needs PENCHANT_API_KEY in the environment", "127.0.0.1"
    )
    port: int = option("port; 0 takes a free one (default: %(default)d)", 8700, low=0, high=65535)
    log: bool = option("print a line for every request", False)
