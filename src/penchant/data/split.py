"""Split by prompt: all rows of one prompt go to one side, the same side for the same seed whatever the file's order."""

from __future__ import annotations

import hashlib
from collections import defaultdict

from penchant.data.load import Dataset, prompt_text
from penchant.data.near import normalise
from penchant.errors import DataError
from penchant.types import PromptTree


def prompt_key(prompt: object, text: str = "") -> str:
    """What counts as the same prompt: case and white space do not matter; plain texts are keyed by themselves."""
    shown = prompt_text(prompt) or text  # type: ignore[arg-type]
    return normalise(shown)


def first_text(tree: PromptTree) -> str:
    """The first completion's text; empty where there is none."""
    return tree.completions[0].text if tree.completions else ""


def split_by_prompt(
    dataset: Dataset, *, validation_rows: int | None = None, validation_fraction: float | None = None, seed: int = 0
) -> tuple[Dataset, Dataset]:
    """(train, validation) without a prompt in both; arguments and errors as for `held_out_rows`."""
    held = held_out_rows(dataset, validation_rows=validation_rows, validation_fraction=validation_fraction, seed=seed)
    outside = set(held)
    return dataset.subset([i for i in range(len(dataset.trees)) if i not in outside]), dataset.subset(held)


def held_out_rows(
    dataset: Dataset, *, validation_rows: int | None = None, validation_fraction: float | None = None, seed: int = 0
) -> list[int]:
    """The rows to hold out, ascending: all rows of a prompt or none.

    Args:
        validation_rows: rows to hold out (met exactly where group sizes allow, else the most that fit);
            validation_fraction: the same as a share.
        seed: of the order in which prompts are drawn.

    Raises:
        DataError: too few rows or prompts to leave something on both sides.
    """
    wanted = (
        validation_rows if validation_rows is not None else round((validation_fraction or 0.0) * len(dataset.trees))
    )
    if not 0 < wanted < len(dataset.trees):
        raise DataError(
            "data.validation_rows",
            f"{wanted} of {len(dataset.trees)} rows cannot be held out",
            "leave at least one row on both sides",
        )
    groups: dict[str, list[int]] = defaultdict(list)
    for i, tree in enumerate(dataset.trees):
        groups[prompt_key(tree.prompt, first_text(tree))].append(i)
    drawn = [groups[key] for key in sorted(groups, key=lambda key: _draw(seed, key))]
    held: list[int] = []
    for group in drawn:
        if len(held) + len(group) <= wanted:
            held += group
    if not held:
        raise DataError(
            "data.validation_rows or data.validation_fraction",
            f"the {len(groups)} prompt(s) have more rows each than the {wanted} that are to be held out, and prompts stay whole",
            "hold out more rows, give data.eval_path, or leave both out (data.validation_fraction=null)",
        )
    return sorted(held)


def _draw(seed: int, key: str) -> bytes:
    return hashlib.blake2b(f"{seed}:{key}".encode(), digest_size=16).digest()
