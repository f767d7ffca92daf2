"""A run's identity, which must not change on resume: its settings, its rows and the other files it uses."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penchant.base.files import file_sha256
from penchant.base.hub import snapshot
from penchant.base.text import without_passwords
from penchant.config import RunConfig, result_settings
from penchant.data.cached import AUTO_BYTES, hashes_of
from penchant.data.mapped import row_weights
from penchant.errors import ModelError
from penchant.logprobs.reference import hash_trees
from penchant.models.lora import adapter_base, is_adapter
from penchant.models.options import looks_like_folder
from penchant.rewards.reward_model import content_sha256, contents_beside
from penchant.runfolder import CONTENT, IDENTITY, IN_CACHE, TOKENS, is_intact
from penchant.runfolder.read import read_folder

if TYPE_CHECKING:
    from penchant.runs.rows import Rows


def run_identity(config: RunConfig, fingerprints: list[str], contents: Mapping[str, str]) -> dict[str, Any]:
    """All settings that affect the result, the fingerprints of the data, and the hashes in `contents`."""
    settings = result_settings(config)
    for name in ("cache", "bounds", "workers"):  # they do not affect the rows
        settings["data"].pop(name, None)
    if settings["algorithm"] is not None and settings["algorithm"].get("value_init") == "auto":
        settings["algorithm"].pop("value_init")  # older runs do not have it
    return json.loads(without_passwords(json.dumps({"config": settings, "data": fingerprints, **contents})))


def content_hashes(config: RunConfig) -> dict[str, str]:
    """SHA-256 of all files that a run uses besides its config and rows, keyed by the name to report if one has changed."""
    section = "loss" if config.algorithm is None else "algorithm"
    own_hashes = {f"content of {section} {n}": sha256 for n, sha256 in config.own_contents().items()}
    return reward_contents(config) | own_hashes | model_contents(config)


def reward_contents(config: RunConfig) -> dict[str, str]:
    """SHA-256 of every reward's Python file and its imports, or of its model."""
    rewards = [r for r in (config.reward, config.evaluation.reward) if r is not None]
    names = dict.fromkeys(name for reward in rewards for name in reward.terms)
    hashes = {f"content of reward {name}": sha256 for name in names if (sha256 := content_sha256(name)) is not None}
    return hashes | {f"content of reward {n}: {f}": sha256 for n in names for f, sha256 in contents_beside(n).items()}


MODEL_FILES = re.compile(r"(adapter_|generation_)?config\.json")
TOKENIZER_FILES = re.compile(
    r"(tokenizer|special_tokens|added_tokens|vocab|merges|spiece|sentencepiece|chat_template).*\.(json|txt|model|jinja)"
)
PROCESSOR_FILES = re.compile(r"(pre)?processor_config\.json")
WEIGHT_FILES = re.compile(r".*\.(safetensors|bin)")


def model_contents(config: RunConfig) -> dict[str, str]:
    """SHA-256 of the files of models and tokenizers, in folders and in the hub cache.

    Starting weights are covered by the hash of the loaded model in manifest.json, except for reward models, whose head is
    initialized randomly.
    """
    weight_patterns = [WEIGHT_FILES] if config.method.learns_reward else []
    tokenizer_key = "model.path" if config.model.tokenizer is None else "model.tokenizer"
    sources = (
        ("model.path", config.model.path, [MODEL_FILES, *weight_patterns]),
        (
            tokenizer_key,
            config.model.tokenizer or config.model.path,
            [TOKENIZER_FILES, *([PROCESSOR_FILES] * config.model.sees)],
        ),
        ("model.adapter", config.model.adapter, [MODEL_FILES, WEIGHT_FILES]),
        ("reference.path", config.reference.path, [MODEL_FILES, WEIGHT_FILES]),
    )
    hashes: dict[str, str] = {}
    for key, path, patterns in sources:
        is_hub_id = path is not None and not looks_like_folder(path)
        folders = (
            _cached_hub_folder(key, str(path), config.model.revision_of(path), patterns)
            if is_hub_id
            else _model_folders(key, path)
        )
        for label, folder in folders:
            files = sorted(p for p in folder.iterdir() if p.is_file() and any(t.fullmatch(p.name) for t in patterns))
            # a large file is hashed once; afterwards its size and timestamps tell whether it has changed
            large_files = {p for p in files if p.stat().st_size >= AUTO_BYTES}
            sums = {p: hashes_of([p])[0] if p in large_files else file_sha256(p) for p in files}
            hashes |= {f"content of {label}: {p.name}": sha256 for p, sha256 in sums.items()}
    return hashes


def _cached_hub_folder(
    key: str, name: str, revision: str | None, patterns: Sequence[re.Pattern[str]]
) -> Iterator[tuple[str, Path]]:
    """The cached folder of a hub id, with all the files to hash."""
    globs = ["*.json", *(["*.txt", "*.model", "*.jinja"] if TOKENIZER_FILES in patterns else [])]
    folder = snapshot(name, revision, [*globs, *(["*.safetensors"] if WEIGHT_FILES in patterns else [])])
    if folder is not None and WEIGHT_FILES in patterns and not any(folder.glob("*.safetensors")):
        folder = snapshot(name, revision, [*globs, "*.bin"])
    if folder is not None:
        yield f"{key}{IN_CACHE}", folder


def _model_folders(key: str, path: str | None) -> Iterator[tuple[str, Path]]:
    """The folder at a path and, if it holds an adapter, that of its base; nothing for a hub id."""
    folder = None if path is None else Path(path).expanduser()
    if folder is None or not folder.is_dir():
        return
    yield key, folder
    if is_adapter(folder) and key != "model.adapter" and not key.startswith("the base of the base"):
        with suppress(ModelError):  # loading the adapter will report it
            base = adapter_base(folder)
            yield from _model_folders(f"the base of {key}", None if base == path else base)


def changed_since(folder: Path, config: RunConfig) -> list[str]:
    """A sentence for each file besides config and rows that has changed or disappeared since the run was trained."""
    recorded, current = read_folder(folder).identity if is_intact(folder / IDENTITY) else {}, content_hashes(config)
    recorded_hashes = {key: value for key, value in recorded.items() if key.startswith(CONTENT) and key != TOKENS}
    # not overridden
    common = {key.partition(": ")[0] for key in recorded_hashes} & {key.partition(": ")[0] for key in current}
    keys = {*recorded_hashes, *current} if TOKENS in recorded else {*recorded_hashes}
    names = [
        key for key in sorted(keys) if current.get(key) != recorded_hashes.get(key) and key.partition(": ")[0] in common
    ]
    sentence = f"has changed since {folder.name} was trained with it: these figures are of what it is now."
    return [f"{key.removeprefix(CONTENT)} {sentence}" for key in names]


def trees_sha256(rows: Rows) -> str:
    """SHA-256 of the tokenized rows in order, with their weights; it covers every change in how rows are read or tokenized."""
    digest = hashlib.sha256()
    for trees in (*rows.trees, list(rows.mismatched.values())):
        digest.update(f"{len(trees)};".encode())
        hash_trees(digest, trees)
        weights = row_weights(trees)
        if weights is not None:
            digest.update(weights.astype("<f8").tobytes())
    return digest.hexdigest()
