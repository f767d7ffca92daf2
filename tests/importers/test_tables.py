"""The import tables: no entry is repeated, and no field is unused."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import resources
from typing import Any

import pytest
import yaml

from penchant.importers.rules import CONVERSIONS

TABLES = ["hf", "trl", "llama_factory", "axolotl", "ms_swift", "flat"]
KINDS = {
    "translated": {"to", "as", "values", "otherwise", "note", "idle"},
    "ignored": {"why", "when", "otherwise"},
    "unsupported": {"how", "idle"},
}


class _Once(yaml.SafeLoader):
    """YAML loader that rejects duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        assert len(set(keys)) == len(keys), f"{node.start_mark}: {sorted(map(str, keys))}"
        return super().construct_mapping(node, deep)


def _parts(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    table = yaml.load((resources.files("penchant.importers") / f"{name}.yaml").read_text(), _Once)
    yield name, table
    for part in ("groups", "methods"):
        for key, value in table.get(part, {}).items():
            yield f"{name} {key}", value


@pytest.mark.parametrize("name", TABLES)
def test_every_word_of_a_table_is_read(name: str) -> None:
    for where, part in _parts(name):
        keys = [key for kind in KINDS for listed in part.get(kind, {}) for key in listed.split(", ")]
        assert len(keys) == len(set(keys)), where
        assert not any(" " in key or "," in key for key in keys), where
        for kind, words in KINDS.items():
            for key, rule in part.get(kind, {}).items():
                assert (isinstance(rule, str) and kind != "translated") or rule.keys() <= words, (where, key)
        for key, rule in part.get("translated", {}).items():
            assert rule.get("as", "as it is") in CONVERSIONS and "to" in rule, (where, key)
