"""Retake the screenshots of docs/studio.md in headless Chromium, of a studio on a generated folder.

    penchant demo                                    # makes runs/demo, whose pairs the run is trained on
    .venv/bin/python docs/tools/pictures.py runs/demo

The run is real and started through the form. The texts in the screenshots of the arena and of the data are handwritten, and the
annotators in the screenshot of arena results are simulated (tests/studio_people.py).
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from itertools import count
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from chromium import Browser  # noqa: E402
from studio_people import judged, texts  # noqa: E402
from studios import SOURCE, Person, arena_of, studio_of  # noqa: E402

from penchant.demo import asset  # noqa: E402
from penchant.runfolder.read import lock_state  # noqa: E402
from penchant.studio.pairs import Answers, Arena  # noqa: E402
from penchant.studio.queue import next_item  # noqa: E402

IMAGES = ROOT / "docs/images"
READY = "document.readyState === 'complete' && !!window.htmx && !document.querySelector('.htmx-request')"
SYSTEM = {"role": "system", "content": "You review films in one sentence."}
ASKED = "I work at a desk all day. Which small habits would help me most?"
GOOD = """Plenty of good ones. Three to begin with:

1. **Stand up** between meetings, even for a minute.
2. Keep a bottle of water *on the desk*, not in the kitchen.
3. Look out of the window: twenty seconds, every twenty minutes.

Start with the one that costs you least, and keep it for a week before you add another."""
DULL = (
    "There are many healthy habits. You should exercise and eat well and sleep well and drink water. These habits are important for "
    "everyone who works at a desk, because sitting is not healthy. Therefore it is recommended to have healthy habits."
)
OTHERS = (
    (
        "Explain to a child why the sky is blue.",
        "Blue light bounces around in the air the most.",
        "Rayleigh scattering.",
    ),
    ("Name a prime number between 20 and 30.", "23.", "27 is a prime number."),
    ("Suggest a title for a diary of a garden.", "A Year in Green", "Garden Diary Diary"),
)
FILMS = (
    ("What did you think of the ending?", "I loved the quiet ending, and the last shot stays with me.", "I hated the quiet ending, and the last shot bored me."),
    ("What did you think of the music?", "The score is warm, and never loud.", "The score is loud, and never warm."),
    ("Would you see it again?", "Tomorrow, if I could.", "Not even if I was paid."),
)  # fmt: skip


def first_arena(folder: Path) -> Arena:
    """An arena in which Ada sees the prompt about the desk first, with the better completion on the left."""
    rows = [(ASKED, {"dpo": GOOD, "start": DULL}), *((p, {"dpo": a, "start": b}) for p, a, b in OTHERS)]
    answers = Answers(rows, {"dpo": SOURCE, "start": SOURCE})
    for seed in count():
        arena = arena_of(
            folder, "dpo-or-start", answers=answers, seed=seed, reasons=("correct", "clear", "helpful", "concise")
        )
        item = next_item(arena, "Ada")
        if item is not None and (item.pair.prompt, item.left) == (ASKED, "a"):
            return arena
        shutil.rmtree(arena.folder)
    raise AssertionError


def world(folder: Path, demo: Path) -> None:
    """Fill the studio's folder with two arenas and two files of rows."""
    first_arena(folder)
    answers, quality = texts(140, 8)
    second = arena_of(folder, "two-models", answers=answers, gold=12, overlap=0.4, checks=0.1, repeats=0.1, seed=8)
    judged(second, quality, 8, file=True)
    shutil.copy(demo / "pairs.jsonl", folder / "pairs.jsonl")
    rows: list[dict[str, Any]] = [
        {
            "prompt": [SYSTEM, {"role": "user", "content": question}],
            "chosen": [assistant_turn(good)],
            "rejected": [assistant_turn(bad)],
        }
        for question, good, bad in FILMS
    ]
    (folder / "reviews.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def assistant_turn(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def show(browser: Browser, address: str, height: int = 900) -> None:
    browser.send("Emulation.setScrollbarsHidden", hidden=True)
    browser.open(address, width=1200, height=height)
    browser.wait(READY)


def arena_and_data(browser: Browser, address: str) -> None:
    show(browser, f"{address}arena/dpo-or-start", 760)
    browser.send("Input.insertText", text="Ada")
    browser.press("Enter")
    browser.wait("!!document.querySelector('.tag input')")
    browser.run("document.querySelectorAll('.tag input')[1].click()")
    browser.picture(IMAGES / "arena.png")
    show(browser, f"{address}arena/two-models/results")
    browser.picture(IMAGES / "arena_results.png", whole=True)
    show(browser, f"{address}data/view?file=reviews.jsonl&show=diff")
    browser.picture(IMAGES / "studio_data.png")


def a_run(browser: Browser, server: Any, folder: Path) -> None:
    """Start a run through the form, take its screenshot at 70% of its steps, and stop it."""
    person, output = Person(server), "runs/dpo-beta-0.1"
    form = {
        **{"model.path": str(asset("model")), "data.path": "pairs.jsonl", "output": output, "loss.beta": "0.1"},
        **{"train.epochs": "3", "train.lr": "3e-4", "train.batch_size": "16", "data.validation_fraction": "0.1"},
        **{"data.max_length": "256", "data.add_eos": "false", "evaluation.every": "15"},
    }  # fmt: skip
    started = person.post("/runs/start", form)
    assert started.is_success, started.text
    progress = 0.0
    while progress < 0.7:
        time.sleep(2)
        show(browser, f"{server.address}runs/view?run={output}")
        progress = browser.run("+(document.querySelector('progress')?.value || 0)")
    browser.wait("document.querySelectorAll('#curves canvas').length > 2")
    browser.picture(IMAGES / "studio_run.png")
    person.post("/runs/stop", {"run": output})
    while lock_state(folder / output) == "held":  # the run is writing a checkpoint
        time.sleep(0.2)


def main(demo: Path) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "film"
        folder.mkdir()
        world(folder, demo)
        with studio_of(folder) as server, Browser() as browser:
            browser.open(server.open)
            arena_and_data(browser, server.address)
            a_run(browser, server, folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
