"""Data at scale: rows/s and peak memory of `data audit` and of tokenising, on synthetic rows; found against planted.

    python benchmarks/data_scale.py                      # 10k, 100k and 1M rows
    python benchmarks/data_scale.py --rows 10000 100000 --no-tokens

Rows are pairs of conversations with the columns of the arena sets of lmsys (models, language, who won), seeded, with words
drawn at random. Each size is audited in a process of its own; its peak memory is that process's, Python and libraries included.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

PLANTED = {  # share of rows
    "duplicates": 0.02,
    "near_duplicates": 0.02,
    "contradictions": 0.01,
    "pii_email": 0.01,
    "secrets_api_key": 0.005,
    "refusals_chosen": 0.01,
}
REFUSAL = "I'm sorry, but I can't help with that. "


def main() -> None:
    """Generate, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where the rows go and stay (default: a temporary folder)")
    parser.add_argument("--no-tokens", action="store_true", help="leave tokenising out")
    parser.add_argument("--no-audit", action="store_true", help="leave the audit out")
    parser.add_argument(
        "--max-token-rows", type=int, default=100_000, help="tokenise no more rows than this without a cache hit"
    )
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--worker", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(WORKERS[args.worker[0]](*args.worker[1:])))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        figures = [measure(folder, n, args) for n in args.rows]
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1))


def measure(folder: Path, n: int, args: argparse.Namespace) -> dict[str, Any]:
    """All figures of one size, printed as they come."""
    path = folder / f"rows-{args.seed}-{n}.jsonl"
    planted_at = path.with_suffix(".planted.json")
    if not planted_at.exists():
        planted_at.write_text(json.dumps(generate(path, n, args.seed)))
    planted = json.loads(planted_at.read_text())
    print(f"\n{n:,} rows, {path.stat().st_size / 1e6:,.0f} MB")
    figures: dict[str, Any] = {"rows": n, "bytes": path.stat().st_size, "planted": planted}
    if not args.no_audit:
        figures["audit"] = made = worker("audit", str(path))
        print(
            f"  audit: {made['seconds']:.1f} s, {n / made['seconds']:,.0f} rows/s, {1e6 * made['seconds'] / n:.0f} us a row, "
            f"peak {made['peak_mb']:,.0f} MB ({made['start_mb']:,.0f} MB before the first row)"
        )
        for name, count in planted.items():
            print(f"    {name:<18} planted {count:>7,}  found {made['found'].get(name, 0):>7,}")
    if not args.no_tokens:
        figures["tokens"] = tokens(path, n, folder, args.max_token_rows)
    return figures


def tokens(path: Path, n: int, folder: Path, most: int) -> dict[str, Any]:
    """Rows/s of tokenising with one and two threads, and of a start with and without the cache."""
    figures: dict[str, Any] = {}
    if n <= most:
        for threads in (1, 2):
            figures[f"threads_{threads}"] = made = worker("tokenise", str(path), RAYON_NUM_THREADS=str(threads))
            print(
                f"  tokenise, {threads} thread(s): {n / made['seconds']:,.0f} rows/s (loading the rows: {made['load']:.1f} s)"
            )
    cache = folder / f"cache-{n}"
    for start in ("cold", "warm"):
        figures[start] = made = worker("start", str(path), PENCHANT_CACHE=str(cache))
        print(f"  {start} start: {made['seconds']:.1f} s to the first batch, peak {made['peak_mb']:,.0f} MB")
        print("    " + ", ".join(f"{part} {seconds:.1f} s" for part, seconds in made["parts"].items()))
    return figures


def worker(what: str, *arguments: str, **environment: str) -> dict[str, Any]:
    """Run one measurement in a process of its own."""
    command = [sys.executable, __file__, "--worker", what, *arguments]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def _model() -> str:
    """The bundled model, for its tokenizer."""
    import penchant

    return str(Path(penchant.__file__).parent / "assets" / "model")


def _peak() -> float:
    """Peak memory of this process since it began, MB; ru_maxrss would count the parent's at the fork."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return float(line.split()[1]) / 1024
    return float("nan")


def _audit(path: str) -> dict[str, Any]:
    from penchant.data.audit import audit_files

    before, start = _peak(), time.perf_counter()
    result = audit_files({"rows": path})
    seconds = time.perf_counter() - start
    found = {name: f.count for name, f in result.findings.items()}
    return {"seconds": seconds, "peak_mb": _peak(), "start_mb": before, "found": found}


def _tokenise(path: str) -> dict[str, Any]:
    from penchant.data.load import load_preferences
    from penchant.data.tokenise import tokenise
    from penchant.models.load import load_tokenizer

    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    start = time.perf_counter()
    rows = load_preferences(path, on_bad_row="skip")
    load = time.perf_counter() - start
    tokenizer = load_tokenizer(_model())
    start = time.perf_counter()
    tokenise(rows, tokenizer, max_length=1024, on_bad_row="skip")
    return {"seconds": time.perf_counter() - start, "load": load, "peak_mb": _peak()}


def _start(path: str) -> dict[str, Any]:
    """All that a training run does with its rows before the first step; models and weights are left out."""
    from penchant.config import RunConfig
    from penchant.run import Run

    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    data = {"path": path, "max_length": 1024, "validation_rows": 500, "on_bad_row": "skip"}
    with tempfile.TemporaryDirectory() as output:
        config = {
            "model": {"path": _model()},
            "data": data,
            "loss": {"name": "dpo"},
            "train": {"epochs": 1},
            "output": output,
        }
        parts: dict[str, float] = {}
        start = last = time.perf_counter()
        run = Run(RunConfig.model_validate(config), quiet=True)

        def said(part: str) -> None:
            nonlocal last
            parts[part], last = time.perf_counter() - last, time.perf_counter()

        _ = run.tokenizer
        said("libraries and tokenizer")  # the same for every size
        _ = run.loaded
        said("load")
        _ = run.datasets
        said("split")
        for tokenised in run.tokenised:
            assert tokenised is not None
            tokenised.summary()
        said("tokenise")
        json.dumps(run.audit().to_json())
        said("audit")
        train, _ = run.trees
        batch = [train[i] for i in run._schedule.batch(0)]
        said("first batch")
        seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak_mb": _peak(), "parts": parts, "trees": len(train), "batch": len(batch)}


WORKERS = {"audit": _audit, "tokenise": _tokenise, "start": _start}


# ---------------------------------------------------------------------------------------------------------------------
# rows


def generate(path: Path, n: int, seed: int) -> dict[str, int]:
    """Write `n` rows; how many of each kind were planted."""
    rng = np.random.default_rng(seed)
    letters = np.array(list("etaoinshrdlucmfwypvbgkqjxz"))
    words = ["".join(letters[rng.integers(0, 20, rng.integers(2, 10))]) for _ in range(20_000)]
    kinds = list(PLANTED)
    shares = np.array(list(PLANTED.values()))
    planted = dict.fromkeys(kinds, 0)
    recent: list[dict[str, Any]] = []
    with path.open("w") as out:
        for start in range(0, n, 10_000):
            count = min(10_000, n - start)
            drawn = np.searchsorted(np.cumsum(shares), rng.random(count), side="right")
            for i, kind in enumerate(drawn.tolist()):
                name = kinds[kind] if kind < len(kinds) and recent else ""
                row = (
                    MAKERS[name](_row(rng, words, start + i), recent, rng, words)
                    if name
                    else _row(rng, words, start + i)
                )
                if name:
                    planted[name] += 1
                elif len(recent) < 50_000:
                    recent.append(row)
                out.write(json.dumps(row) + "\n")
    return planted


def _text(rng: np.random.Generator, words: list[str], mean: int) -> str:
    length = max(8, int(rng.lognormal(np.log(mean), 0.6)))
    return " ".join([words[j] for j in rng.integers(0, len(words), length).tolist()])


def _row(rng: np.random.Generator, words: list[str], number: int) -> dict[str, Any]:
    prompt = [{"role": "user", "content": _text(rng, words, 30)}]
    first = bool(rng.random() < 0.55)
    return {
        "conversation_id": f"{number:08x}",
        "model_a": "one",
        "model_b": "two",
        "winner_model_a": int(first),
        "winner_model_b": int(not first),
        "language": "English",
        "chosen": [*prompt, {"role": "assistant", "content": _text(rng, words, 100)}],
        "rejected": [*prompt, {"role": "assistant", "content": _text(rng, words, 90)}],
    }


def _earlier(recent: list[dict[str, Any]], rng: np.random.Generator) -> dict[str, Any]:
    return recent.pop(int(rng.integers(len(recent))))  # each is copied once, so that every copy counts once


def _changed(row: dict[str, Any], change: Any) -> dict[str, Any]:
    return row | {side: [m | {"content": change(m["content"])} for m in row[side]] for side in ("chosen", "rejected")}


def _near(
    row: dict[str, Any], recent: list[dict[str, Any]], rng: np.random.Generator, words: list[str]
) -> dict[str, Any]:
    return _changed(_earlier(recent, rng), lambda text: f"{text} indeed" if len(text) > 100 else text)


def _swapped(
    row: dict[str, Any], recent: list[dict[str, Any]], rng: np.random.Generator, words: list[str]
) -> dict[str, Any]:
    old = _earlier(recent, rng)
    return old | {"chosen": old["rejected"], "rejected": old["chosen"]}


def _answer_begins(row: dict[str, Any], what: str) -> dict[str, Any]:
    *before, last = row["chosen"]
    return row | {"chosen": [*before, last | {"content": f"{what} {last['content']}"}]}


def _secret(row: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    return _answer_begins(row, "use AKIA" + "".join(rng.choice(list("ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"), 16)))


MAKERS: dict[str, Any] = {
    "duplicates": lambda row, recent, rng, words: _earlier(recent, rng),
    "near_duplicates": _near,
    "contradictions": _swapped,
    "pii_email": lambda row, recent, rng, words: _answer_begins(
        row, f"write to {words[int(rng.integers(99))]}@mail.example"
    ),
    "secrets_api_key": lambda row, recent, rng, words: _secret(row, rng),
    "refusals_chosen": lambda row, recent, rng, words: _answer_begins(row, REFUSAL),
}

if __name__ == "__main__":
    main()
