"""Odd YAML and odd values give an error message or a config, in bounded time and memory."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from penchant.config import RunConfig, config_from_mapping, load_config, page, parse_yaml
from penchant.errors import ConfigError, PenchantError
from penchant.losses import LOSSES
from penchant.runfolder.read import yaml_object

BASE = "model: {path: m}\ndata: {path: d}\noutput: o\n"


def _bomb(line: str, first: str) -> str:
    return f"a0: &a0 {first}\n" + "".join(line.format(i, ",".join([f"*a{i - 1}"] * 9)) for i in range(1, 12))


BOMBS = {
    "aliases": _bomb("a{0}: &a{0} [{1}]\n", "[x]"),
    "merges": _bomb("a{0}: &a{0} {{<<: [{1}]}}\n", "{k: 1}"),
    "keys": _bomb("a{0}: &a{0} [{1}]\n", "[x]") + "? *a3\n: 1\n",
    "recursion": "&a [*a]",
    "merged recursion": "&a {<<: *a}",
    "depth": "[" * 100_000,
    "blocks": "- " * 100_000,
    "values": "[" + "x," * 150_000 + "]",
    "size": "#" * (5 << 20),
    "digits": "a: " + "9" * 5000,
    "tag": "a: !!python/object/apply:os.system [ls]",
    "binary": "a: !!binary aGk=",
    "boolean": "a: !!bool maybe",
    "integer": "a: !!int {b: 1}",
    "number": "a: !!float [1]",
    "text": "a: !!str {b: 1}",
    "list as key": "? [a]\n: 1",
    "control": "a: \x00",
    "surrogate": "a: \ud800",
}


@pytest.mark.parametrize("name", BOMBS)
def test_odd_yaml_is_a_sentence(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_yaml(BOMBS[name], "run.yaml")
    assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [n for n in BOMBS if n != "digits" and "key" not in n])
def test_a_run_folders_yaml_is_bounded_too(name: str) -> None:
    with pytest.raises(ValueError):
        yaml_object(BOMBS[name])


VALUES = [
    *("9" * 5000, "-" + "9" * 5000, "1" + "0" * 30, "9223372036854775808", "9223372036854775807", "-1", "0", "-0.0"),
    *(
        "1e-320",
        "1e308",
        "1e999",
        ".inf",
        "-.inf",
        ".nan",
        "true",
        "null",
        "",
        "''",
        '"\\0"',
        '"\\ud800"',
        "[]",
        "[[]]",
    ),
    *("{}", "{1: 2}", "{null: x}", "a" * 5000, "'" + "a/" * 3000 + "'", "&a [*a]", "*a", "[" * 300, "2001-01-01"),
    *("!!binary aGk=", "{from: 1, to: .nan}", "{name: {}}", "x.py:f", "/dev/null", "/proc/self/mem", "0x10", "a: b: c"),
]


def _keys() -> list[str]:
    own = [f"loss.{f.alias or n}" for spec in LOSSES.values() for n, f in spec.params.model_fields.items()]
    return sorted(
        {*(k.path for p in page.parts() for k in p.keys), *own, *RunConfig.model_fields, "a.b.c", "loss.mix.0"}
    )


def _tried(tmp_path: Path, cases: list[tuple[str, str]]) -> None:
    path = tmp_path / "run.yaml"
    for key, value in cases:
        for text, overrides in ((BASE, [f"{key}={value}"]), (f"{BASE}{key}: {value}\n", [])):
            path.write_text(text, encoding="utf-8", errors="surrogatepass")
            try:
                load_config(path, overrides)
            except PenchantError as error:
                assert len(str(error)) < 7000, (key, value[:40])
            except Exception as error:
                raise AssertionError((key, value[:40])) from error


def test_odd_values_are_sentences(tmp_path: Path) -> None:
    cases = [(key, value) for key in _keys() for value in VALUES]
    _tried(tmp_path, random.Random(0).sample(cases, 300))


@pytest.mark.slow
def test_every_odd_value_of_every_key_is_a_sentence(tmp_path: Path) -> None:
    _tried(tmp_path, [(key, value) for key in _keys() for value in VALUES])


@pytest.mark.parametrize(
    "override",
    [
        *("checkpoint.every=0", "evaluation.every=-1", "train.threads=0", "train.lr=-1", "train.epochs=1e300"),
        *("algorithm.samples=9223372036854775807", "lora.r=2147483647", "train.lr=.nan", "train.weight_decay=1e308"),
    ],
)
def test_numbers_that_no_run_can_have(tmp_path: Path, override: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"{BASE}{'algorithm: rloo' if override.startswith('algorithm') else ''}\nreward: words\n")
    with pytest.raises(ConfigError, match=override.partition("=")[0]):
        load_config(path, [override])


@pytest.mark.parametrize("key", ["data", "train", "data.template_options", "rollout.options"])
def test_what_stands_in_place_of_a_section_is_shown_in_short(key: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(BASE)
    for value in ("x" * 5000, f"[{'1,' * 5000}1]"):
        with pytest.raises(ConfigError, match=f"^command line: {key}") as caught:
            load_config(path, [f"{key}={value}"])
        assert len(str(caught.value)) < 3000 and str(caught.value).count("\n") < 25


def test_numpys_numbers_are_numbers() -> None:
    values = {"model": {"path": "m"}, "data": {"path": "d"}, "output": "o", "train": {"lr": np.float64(1e-4)}}
    assert config_from_mapping(values).train.lr == 1e-4


def test_texts_for_people_may_be_long_and_a_bad_boolean_has_its_line(tmp_path: Path) -> None:
    path, long = tmp_path / "run.yaml", "be kind " * 1000
    path.write_text(f"{BASE}data: {{path: d, template_options: {{style: {long}}}}}\n".replace("data: {path: d}\n", ""))
    assert load_config(path).data.template_options["style"] == long.strip()
    path.write_text(f"{BASE}train:\n  shuffle: !!bool maybe\n")
    with pytest.raises(
        ConfigError, match=r"run\.yaml:\d+: not valid YAML \(maybe is neither true nor false\); write true or false"
    ):
        load_config(path)
    path.write_text(f"{BASE}train:\n  shuffle: !!bool no\n")
    assert load_config(path).train.shuffle is False
