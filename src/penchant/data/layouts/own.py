"""A user's own layout, from a file: ``data.shape: my_layout.py:MyLayout``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from penchant.base.functions import own_sha256, python_function
from penchant.data.layouts.fields import LeftOut, RowError
from penchant.data.layouts.layout import LAYOUTS, Fields, Layout, UserRow
from penchant.errors import ConfigError
from penchant.types import PromptTree

# checks that a tree is of a kind; a mapping that `convert` returns is a row of the plain layout with the kind's name
KINDS: dict[str, Callable[[PromptTree], bool]] = {
    "pairs": lambda tree: [c.label for c in tree.completions] == [True, False],
    "unpaired": lambda tree: all(c.label is not None for c in tree.completions),
    "scored": lambda tree: all(c.score is not None for c in tree.completions),
    "sft": lambda tree: bool(tree.completions),
    "prompts": lambda tree: not tree.completions,
    "text": lambda tree: bool(tree.completions),
}
DESCRIBED = "see `Your own layout` in docs/data_formats.md"


def own_layout(name: str, where: str = "data.shape") -> Layout:
    """The layout at ``path.py:Name``: a class without constructor arguments, or a function that returns a `Layout`.

    The class has `kind`; `columns`, which every row must have; `example`, a row; and `convert(row)`, which returns a row of the
    plain layout of its kind (``{"prompt", "chosen", "rejected"}`` for pairs), a `PromptTree`, a list of these, or None to leave the
    row out.

    Raises:
        ConfigError: it does not exist, or fails the checks that Penchant's own layouts pass in the tests.
    """
    return _load_checked(name, own_sha256(name), where)


@lru_cache(maxsize=32)
def _load_checked(name: str, sha256: str | None, where: str) -> Layout:
    """`own_layout`, cached; `sha256` is part of the key so that an edited file is read again."""
    function = python_function(name, where, ())
    try:
        instance = function()
    except Exception as error:
        raise ConfigError(where, f"{name} cannot be made ({type(error).__name__}: {error})", "fix it") from error
    layout = replace(instance, name=name) if isinstance(instance, Layout) else _layout_of(instance, name, where)
    missing = [c for c in layout.columns if c not in layout.example]
    if missing:
        raise ConfigError(where, f"{name}: its example has no column {missing[0]!r}", "add it to the example")
    try:
        trees = layout.example_trees
    except RowError as error:
        what = f"{name}: its example does not convert: {error.what}"
        raise ConfigError(where, what, error.how or "fix it") from error
    except Exception as error:
        cause = f"{type(error).__name__}: {error}"
        raise ConfigError(where, f"{name}: its example does not convert ({cause})", "fix it") from error
    if not trees:
        raise ConfigError(where, f"{name}: its example gives nothing", "give a row that becomes an example")
    return layout


def _layout_of(layout_object: Any, name: str, where: str) -> Layout:
    convert, kind, columns = (getattr(layout_object, n, None) for n in ("convert", "kind", "columns"))
    example = getattr(layout_object, "example", None)
    if not callable(convert):
        raise ConfigError(where, f"{name} has no method convert(row)", DESCRIBED)
    if kind not in KINDS:
        raise ConfigError(where, f"{name}: its kind is {kind!r}", f"set kind to one of {', '.join(KINDS)}")
    if isinstance(columns, str) or not all(isinstance(c, str) for c in columns or ()):
        raise ConfigError(where, f"{name}: its columns are {columns!r}", "give a tuple of names")
    if not isinstance(example, Mapping):
        raise ConfigError(where, f"{name} has no example", "set example to a row that it converts")
    converter = _converter(
        convert, str(kind), Path(name.rpartition(":")[0]).name + ":" + name.rpartition(":")[2], columns or ()
    )
    summary = (type(layout_object).__doc__ or "a layout of your own").strip().splitlines()[0].rstrip(".")
    return Layout(
        name,
        str(kind),
        tuple(columns or ()),
        converter,
        summary,
        example,
        "a file of yours",
        shows="of your own layout",
    )


def _converter(
    convert: Callable[[Fields], Any], kind: str, display_name: str, columns: tuple[str, ...]
) -> Callable[[Fields, Fields], tuple[PromptTree, ...]]:
    def tree_of(item: Any) -> PromptTree:
        if isinstance(item, Mapping):
            (tree,) = LAYOUTS[kind].convert(item, {})
        elif isinstance(item, PromptTree):
            tree = item
        else:
            raise RowError(f"{display_name} returned {type(item).__name__}, not a row or a PromptTree", DESCRIBED)
        if not KINDS[kind](tree):
            raise RowError(f"{display_name} returned an example that is not of kind {kind}", DESCRIBED)
        return tree

    def convert_row(row: Fields, options: Fields) -> tuple[PromptTree, ...]:
        missing = [c for c in columns if c not in row]
        if missing:
            raise RowError(
                f"has no column {missing[0]!r}, which {display_name} needs", "fix the row, or map data.columns"
            )
        try:
            result = convert(row if isinstance(row, UserRow) else dict(row))
        except RowError:
            raise
        except Exception as error:
            what = f"cannot be converted by {display_name} ({type(error).__name__}: {error})"
            raise RowError(what, "fix the row or the layout") from error
        if result is None:
            raise LeftOut(f"is left out by {display_name}", "return an example for it to keep it")
        trees = tuple(tree_of(item) for item in (result if isinstance(result, (list, tuple)) else [result]))
        if not trees:
            raise RowError(f"gives no example in {display_name}", "return None to leave a row out")
        return trees

    return convert_row
