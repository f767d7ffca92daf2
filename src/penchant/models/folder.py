"""Check an untrusted model folder before torch or transformers build anything from its files.

Reading is bounded in time and memory, no code from the folder is executed, and a library's error becomes one sentence.
"""

from __future__ import annotations

import json
import re
import resource
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from penchant.errors import ModelError, PenchantError

CONFIGS = ("config.json", "generation_config.json", "adapter_config.json")
OBJECTS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json")
READ = (".json", ".jinja", ".txt", ".model", ".safetensors", ".bin")
SMALL, LARGE = 64 << 20, 512 << 20  # bytes of a config or index; of a tokenizer, a template or any other text file
# limits of counts in config.json by a word in their key (sizes excepted), far above any real model: such parts are built one by one
SIZE = re.compile("size|dim|width|length", re.IGNORECASE)
COUNTED = {"layer": 2_000, "block": 2_000, "expert": 100_000, "label": 1_000_000}
MOST_TOKENS = 1 << 24
ROOM = 1 << 24  # elements that a model may have beyond those in its files: new heads, position tables
PLACES = re.compile(r"\.(?:layers?|h|blocks?)\.(\d+)\.")


def first_line(error: BaseException) -> str:
    """The first line of an error's text, with the next one if it ends in a colon; its type if it has no text."""
    first, *rest = str(error).strip().splitlines() or [type(error).__name__]
    return (f"{first} {rest[0].strip()}" if rest and first.rstrip().endswith(":") else first)[:300]


def config_of(path: str) -> str:
    """The path of a folder's config.json if it exists, else `path`: what an error message names."""
    config = Path(path).expanduser() / "config.json"
    return str(config) if config.exists() else path


@contextmanager
def loading(path: str | Callable[[], str], what: str, how: str) -> Iterator[None]:
    """Turn any error in the block into one sentence about `path` (or its return value), even a Rust panic, which is no Exception.

    Raises:
        ModelError: in place of any other error; a PenchantError, KeyboardInterrupt, SystemExit or GeneratorExit passes through.
    """
    try:
        yield
    except (PenchantError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        prefix = f"{type(error).__name__}: " if isinstance(error, (AttributeError, KeyError, IndexError)) else ""
        where = path() if callable(path) else path
        raise ModelError(where, f"{what} ({prefix}{first_line(error)})", how) from error


def read_object(path: Path, max_bytes: int = SMALL) -> dict[str, Any]:
    """Read a JSON object from a file of a model folder.

    Raises:
        ModelError: the file is too large, not a regular file, not JSON, or not an object.
    """
    check_file(path, max_bytes)
    with loading(str(path), "is not JSON that can be read", "get it again from where the model comes from"):
        content = json.loads(path.read_bytes())
    if not isinstance(content, dict):
        raise ModelError(str(path), f"holds {type(content).__name__} where an object ({{...}}) belongs", "get it again")
    return content


def check_file(path: Path, max_bytes: int) -> None:
    """Refuse a file that is far too large, or not a regular file (opening it may block)."""
    if not path.is_file():
        raise ModelError(str(path), "is not a regular file", "get it again from where the model comes from")
    if path.stat().st_size > max_bytes:
        raise ModelError(
            str(path), f"has {path.stat().st_size:,} bytes (at most {max_bytes:,} are read)", "get it again"
        )


def check_folder(folder: Path) -> None:
    """Check the small files of a model or adapter folder, and the headers of its weights. Does nothing for a hub id.

    Raises:
        ModelError: a file cannot be loaded, or describes a model larger than any real one.
    """
    if folder.is_dir():
        files = sorted(folder.iterdir())
        stats = [path.stat() if path.exists() else None for path in files]
        _check_files(folder, tuple((p, s and (s.st_size, s.st_mtime_ns)) for p, s in zip(files, stats, strict=True)))


@lru_cache(maxsize=32)  # each loader checks the folder first, and a tokenizer.json may have 30 MB
def _check_files(folder: Path, files: Sequence[tuple[Path, tuple[int, int] | None]]) -> None:
    for path, _ in files:
        if path.name.endswith(".index.json"):
            _check_index(path)
        elif path.name in CONFIGS:
            _check_numbers(path, read_object(path))
        elif path.name in OBJECTS:
            _check_ids(path, read_object(path, LARGE))
        elif path.suffix in READ:
            check_file(path, LARGE if path.suffix in READ[:4] else 1 << 62)
    weights = headers(folder)
    adapter = folder / "adapter_config.json"
    if adapter.exists() and weights:
        _check_ranks(adapter, [size for _, shape, _ in weights.values() for size in shape])


def _check_ids(path: Path, values: Mapping[str, Any]) -> None:
    """Refuse token ids so large that the tokenizers library would build a table of billions of entries."""
    model, added = values.get("model"), values.get("added_tokens")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    ids = [*vocabulary.values()] if isinstance(vocabulary, dict) else []
    ids += [t.get("id") for t in added if isinstance(t, dict)] if isinstance(added, list) else []
    decoder = values.get("added_tokens_decoder")
    ids += [int(k) for k in decoder if k.isdecimal() and len(k) < 100] if isinstance(decoder, dict) else []
    ids += values.values() if path.name in ("added_tokens.json", "vocab.json") else []
    largest = max((i for i in ids if isinstance(i, int)), default=0)
    if largest >= MOST_TOKENS:
        what = f"has a token with the id {_short(largest)} (below {MOST_TOKENS:,})"
        raise ModelError(str(path), what, "get it again")


def _check_index(path: Path) -> None:
    """Check that every shard in the index is a file in this folder."""
    index = read_object(path)
    shards = index.get("weight_map")
    if not isinstance(index.get("metadata", {}), dict):
        raise ModelError(str(path), "has metadata that is not an object", "get it again")
    if not isinstance(shards, dict) or not all(isinstance(s, str) for s in shards.values()):
        raise ModelError(str(path), "has no weight_map from tensors to files", "get it again")
    for name in sorted(set(shards.values())):
        if Path(name).name != name or name in ("", ".", ".."):
            raise ModelError(str(path), f"names {name!r}, which is not a file of this folder", "get it again")
        if not (path.parent / name).is_file():
            raise ModelError(str(path), f"names {name}, which is not there", "get the folder again: a shard is missing")


def _check_numbers(path: Path, values: Any, key: str = "") -> None:
    """Refuse numbers in a config that would make building the model take forever."""
    if isinstance(values, dict):
        for name, value in values.items():
            _check_numbers(path, value, str(name))
    elif isinstance(values, list):
        for value in values:
            _check_numbers(path, value, key)
    elif isinstance(values, int) and not isinstance(values, bool):
        counts = {} if SIZE.search(key) else COUNTED
        limit = next((limit for word, limit in counts.items() if word in key.lower()), 2**63 - 1)
        if abs(values) > limit:
            raise ModelError(str(path), f"{key} is {_short(values)} (at most {limit:,})", "get it again")


def _short(number: int) -> str:
    return f"{number:,}" if abs(number) < 10**24 else f"a number of {number.bit_length()} bits"


def headers(folder: Path) -> dict[str, tuple[str, tuple[int, ...], str]]:
    """(dtype, shape, file name) of each tensor in a folder's safetensors, by name; safetensors checks headers against file sizes.

    Raises:
        ModelError: a header does not match its file.
    """
    from safetensors import safe_open

    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        check_file(path, 1 << 62)
        how = "get it again from where the model comes from"
        with loading(str(path), "its header does not fit the file", how), safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                part = file.get_slice(name)
                tensors[name] = (str(part.get_dtype()), tuple(part.get_shape()), path.name)
    return tensors


def _check_ranks(path: Path, sizes: Iterable[int]) -> None:
    """Check that each rank of an adapter divides a dimension of its weights (several experts side by side have a multiple of it)."""
    config, dimensions = read_object(path), set(sizes)
    pattern = config.get("rank_pattern")
    for rank in (config.get("r"), *(pattern.values() if isinstance(pattern, dict) else ())):
        if rank is not None and not (type(rank) is int and rank > 0 and any(size % rank == 0 for size in dimensions)):
            raise ModelError(str(path), f"says rank {rank!r}, which no weight of the adapter has", "get it again")


def check_built(folder: Path, built: Any, *, whole: bool = True) -> None:
    """Check that the model built from config.json (on the meta device, without memory) matches the folder's weights.

    Args:
        whole: also compare shapes and dtypes by name; False if the folder holds a larger or another model than `built`.

    Raises:
        ModelError: shapes differ, weights have an integer dtype, or the model has far more weights than the files can hold.
    """
    stored = headers(folder)
    parameters = dict(built.named_parameters())
    quantized = getattr(built.config, "quantization_config", None) is not None
    if whole and not quantized:
        for name, (dtype, shape, file) in stored.items():
            parameter = parameters.get(name)
            if parameter is not None and tuple(parameter.shape) != shape:
                what = f"{name} has the shape {list(shape)}, but config.json makes it {list(parameter.shape)}"
                raise ModelError(str(folder / file), what, "get both files again")
            if parameter is not None and not re.match(r"B?F\d", dtype):
                what = f"{name} is of type {dtype}, which is not a floating-point type"
                raise ModelError(str(folder / file), what, "get it again")
    files = [p.stat().st_size for pattern in ("*.safetensors", "*.bin") for p in folder.glob(pattern)]
    elements = sum(p.numel() for p in (*parameters.values(), *built.buffers()))
    if files and elements > 8 * sum(files) + ROOM:
        what = f"describes a model of {elements:,} weights, which the folder's {sum(files):,} bytes cannot hold"
        raise ModelError(str(folder / "config.json"), what, "get both again")


def check_finite(path: str, named: Iterable[tuple[str, Any]]) -> None:
    """Refuse NaN and infinite weights, and name the first; `aminmax` propagates NaN and needs no extra memory."""
    import torch

    for name, p in named:
        if p.numel() and p.is_floating_point() and p.device.type != "meta":
            low, high = torch.aminmax(p.detach())
            if not bool(torch.isfinite(low) & torch.isfinite(high)):
                raise ModelError(path, f"the weight {name} holds NaN or infinite numbers", "get the model again")


def check_layers(path: str, leftover_names: Iterable[str], config: Any) -> None:
    """Refuse a folder with weights for more layers than its config has: transformers would ignore them silently."""
    layers = getattr(config, "num_hidden_layers", None)
    if not isinstance(layers, int) or getattr(config, "num_nextn_predict_layers", None):
        return
    for name in leftover_names:
        match = PLACES.search(f".{name}")
        if match and int(match[1]) >= layers:
            raise ModelError(path, f"holds {name}, but config.json says {layers} layers", "get config.json again")


# ---- Chat templates: sandboxed programs, which may still loop or write endlessly ----

SECONDS, STEPS = 5.0, 100_000  # a rendering is aborted after this time if it has also taken this many steps
LONGEST = 1 << 26  # characters that one rendering may write, or a product or sum of strings may have
MEMORY = 1 << 30  # bytes that the first rendering may allocate on top of what the process has


class _Spent(threading.local):
    steps, written, started = 0, 0, 0.0


_spent = _Spent()


def _step(written: int = 0) -> None:
    _spent.steps += 1
    _spent.written += written
    timed_out = _spent.steps > STEPS and time.monotonic() - _spent.started > SECONDS
    if timed_out or _spent.written > LONGEST:
        what = f"does not end within {SECONDS:.0f} s" if timed_out else f"writes more than {LONGEST:,} characters"
        raise ModelError("the chat template", what, "fix it in the tokenizer's folder, or remove it")


def _counted(items: Any) -> Iterator[Any]:
    for item in items:
        _step()
        yield item


def bound_templates() -> None:
    """Make transformers compile chat templates so that loops, calls, powers, products, sums and output are counted.

    The jinja environment stays sandboxed, with its filters and extensions except `wordwrap`, `urlize` and `lipsum`. A template is code
    from the folder: without limits, two nested loops could hang a run before it starts.
    """
    from transformers.utils import chat_template_utils as theirs

    if getattr(theirs._compile_jinja_template, "bounded", False):
        return
    from jinja2 import Template, nodes

    original_compile = theirs._compile_jinja_template
    environment_class: Any = type(original_compile("").environment)

    class Bounded(environment_class):  # type: ignore[misc]
        intercepted_binops = frozenset(("*", "**", "+"))

        def _parse(self, *source: Any) -> Any:
            tree = super()._parse(*source)
            for loop in tree.find_all(nodes.For):
                loop.iter = nodes.Filter(loop.iter, "penchant_counted", [], [], None, None)
            return tree

        def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
            _step()
            return super().call(context, obj, *args, **kwargs)

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            sizes = [abs(v).bit_length() if isinstance(v, int) else 64 for v in (left, right)]
            lengths = [len(v) if hasattr(v, "__len__") else v if isinstance(v, int) else 1 for v in (left, right)]
            both_numbers = all(isinstance(v, (int, float)) for v in (left, right))
            _step()
            if operator == "**":
                allowed = both_numbers and (abs(right) * sizes[0] <= 4096)
            elif operator == "*":
                allowed = sum(sizes) <= 8192 if both_numbers else lengths[0] * lengths[1] <= LONGEST
            else:
                allowed = both_numbers or sum(lengths) <= LONGEST
            if not allowed:
                raise ModelError("the chat template", f"computes something too large ({operator})", "fix it")
            return super().call_binop(context, operator, left, right)

    class Limited(Template):
        def render(self, *args: Any, **kwargs: Any) -> str:
            _spent.steps, _spent.written, _spent.started = 0, 0, time.monotonic()
            return super().render(*args, **kwargs)

        def generate(self, *args: Any, **kwargs: Any) -> Iterator[str]:
            _spent.steps, _spent.written, _spent.started = 0, 0, time.monotonic()
            return super().generate(*args, **kwargs)

    def finalize(value: Any) -> Any:
        _step(len(value) if isinstance(value, str) else 1)
        return value

    @lru_cache
    def bounded(template: str) -> Any:
        environment = original_compile("").environment.overlay(finalize=finalize)
        environment.__class__, environment.template_class = Bounded, Limited
        slow = ("wordwrap", "urlize")  # quadratic time in the length of a text
        environment.filters = {k: f for k, f in environment.filters.items() if k not in slow}
        environment.filters["penchant_counted"] = _counted
        for extension in environment.extensions.values():  # generation tags are tracked by the overlay's own extension
            if hasattr(extension, "activate_tracker"):
                environment.activate_tracker = extension.activate_tracker
        environment.globals = {k: v for k, v in environment.globals.items() if k != "lipsum"}
        return environment.from_string(template)

    bounded.bounded = True  # type: ignore[attr-defined]
    theirs._compile_jinja_template = bounded


def check_template(path: str, tokenizer: Any) -> None:
    """Render a chat template once, in bounded time and memory.

    Raises:
        ModelError: the template exceeds a limit, or is not a string. Whether it renders these turns well is checked elsewhere.
    """
    bound_templates()
    template = getattr(tokenizer, "chat_template", None)
    if template is None:
        return
    templates = template.values() if isinstance(template, Mapping) else [template]
    if not all(isinstance(t, str) for t in templates):
        raise ModelError(path, f"its chat_template is {type(template).__name__}, not a text", "fix or remove it")
    turns = [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "That."}]
    for messages, generate in ((turns[:1], True), (turns, False)):
        try:
            with _little_memory():
                tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)
        except ModelError as error:
            raise ModelError(path, f"its chat template {error.what}", error.how) from error
        except MemoryError as error:
            raise ModelError(path, "its chat template takes more than 1 GB of memory", "fix or remove it") from error
        except Exception:  # errors that the template itself raises: it may refuse such turns
            continue


@contextmanager
def _little_memory() -> Iterator[None]:
    """Let this process allocate at most 1 GiB more within the block, if the system supports such a limit."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + MEMORY
        if limits[0] == resource.RLIM_INFINITY or limit < limits[0]:
            resource.setrlimit(resource.RLIMIT_AS, (limit, limits[1]))
    except (OSError, ValueError):
        pass  # not Linux
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
