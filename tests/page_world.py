"""The folder in which the documentation's pages run: data, models and finished runs under the names that the pages use."""

from __future__ import annotations

import json
import shutil
from contextlib import chdir
from pathlib import Path
from typing import Any

from filelock import FileLock
from studio_people import word
from tiny import polite_rows, tiny_model_folder, write_jsonl

from penchant import api
from penchant.demo import asset

ROOT = Path(__file__).parents[1]
SMALL = [
    "train.max_steps=1",
    "data.max_length=128",
    "evaluation.samples=2",
    "evaluation.kl_prompts=2",
    "evaluation.sample_tokens=4",
]


def shared_world(base: Path) -> Path:
    """The world, made once for all worker processes of a test run, which share `base`."""
    folder, done = base / "page-world", base / "page-world.done"
    with FileLock(base / "page-world.lock"):
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            with chdir(folder):
                _make()  # at its final path, because runs store paths of data and models
            done.touch()
    return folder


def _make() -> None:
    rows = polite_rows(120)  # the README holds out a hundred of them
    for name, part in {"train": rows, "test": polite_rows(132)[120:]}.items():
        write_jsonl(Path(f"{name}.jsonl"), part)
    write_jsonl(Path("prompts.jsonl"), [{"prompt": r["prompt"]} for r in rows])
    Path("book.txt").write_text("It was a dark night.\n\nThen it was day.\n")
    start = tiny_model_folder(Path("base"))
    config = json.loads(Path("base/config.json").read_text())
    config["max_position_embeddings"] = 2048  # fits the default data.max_length, as in the models that the pages name
    Path("base/config.json").write_text(json.dumps(config))
    Path("HuggingFaceTB").mkdir()
    for name in ("tuned", "HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M-Instruct"):
        shutil.copytree(start, name)
    for part in ("recipes", "src"):  # the pages assume the repository as working folder
        Path(part).symlink_to(ROOT / part)
    _runs(start)
    _arena()
    shutil.copyfile("train.jsonl", "runs/demo/pairs.jsonl")


def _arena() -> None:
    """An arena with judgments."""
    file = Path("arenas/film/preferences.jsonl")
    file.parent.mkdir(parents=True)
    words = [word(i, prompt=f"Question {i}?", verdict="a" if i % 4 else "tie") for i in range(12)]
    write_jsonl(file, [w.to_json() for w in words])


def _runs(start: str) -> None:
    base: dict[str, Any] = {
        "model": {"path": start},
        "data": {"path": "train.jsonl", "validation_rows": 8, "limit": 40},
        "train": {"batch_size": 8},
    }
    seed_1 = {"train": {"batch_size": 8, "seed": 1}}
    online = {"algorithm": {"name": "ppo", "max_new_tokens": 4}, "reward": "words"}
    demo = {"model": {"path": str(asset("model"))}}  # its tokenizer can be stored in GGUF
    more: dict[str, dict[str, Any]] = {
        "runs/first": {}, "runs/second": {"loss": "ipo"}, "runs/dpo": {}, "runs/dpo-seed-1": seed_1, "runs/reward": {"algorithm": "reward_model"},
        "runs/ppo": online, "runs/ppo-seed-1": {**online, **seed_1}, "runs/demo": demo, "lora-run": {"lora": {"r": 2}},
    }  # fmt: skip
    for output, settings in more.items():
        result = api.train({**base, **settings, "output": output}, *SMALL, quiet=True)
        if output == "lora-run":
            shutil.copytree(result.model, "adapters/polite")
    sweep = {"output": "runs/sweep", "base": {**base, "evaluation": {"samples": 0}}, "grid": {"loss.beta": [0.1, 0.3]}}
    Path("world_sweep.yaml").write_text(json.dumps(sweep))
    api.sweep("world_sweep.yaml", *SMALL, quiet=True)
    api.compare("runs/dpo", "runs/ppo", prompts=4, max_new_tokens=4, output="runs/compare-dpo-ppo", quiet=True)
