"""`penchant demo`: the DPO paper's controlled-sentiment experiment in miniature, offline (arXiv 2305.18290, section 6).

The bundled model writes continuations of film-review openings, a sentiment lexicon (VADER) ranks them, DPO trains on the
pairs, and held-out openings show the gain and its cost. The lexicon is the true reward here, so the report can be checked
against the truth.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from penchant import api, runfolder
from penchant.base.text import counted, for_terminal, unescaped

if TYPE_CHECKING:
    from penchant.metrics.completions import Completions

SAMPLES = 8  # continuations per training opening
PAIRS = 3  # pairs per opening: the best against the worst, the second best against the second worst, ...
EVAL_SAMPLES = 4  # continuations per held-out opening, before and after
NEW_TOKENS = 40
MIN_GAP = 0.3  # pairs whose rewards are closer than this are dropped, as they carry little signal
TEMPERATURE = 1.0
MARK = ".penchant-demo"  # marks a folder as a demo's, which the next one may replace

TRAINING: dict[str, Any] = {
    "loss": {"name": "dpo", "beta": 0.1},
    "train": {"epochs": 1, "batch_size": 32, "tokens_per_step": 2048, "lr": 3e-4, "schedule": "linear"},
    "data": {"validation_rows": 40, "max_length": 256, "add_eos": False},
    "evaluation": {"samples": 0, "kl_prompts": 0},
    "reference": {"kind": "frozen"},
}


def asset(name: str) -> Path:
    """The path of a bundled file."""
    return Path(str(resources.files("penchant") / "assets" / name))


def run_demo(
    output: str | Path = "runs/demo", *, reviews: str | None = None, seed: int = 0, quiet: bool = False
) -> int:
    """Run the whole experiment and print the results; return 0 if every goal was met, else 1.

    Args:
        output: the run folder. A finished or partial demo in it is replaced; any other non-empty folder is refused.
        reviews: film reviews (JSONL with a ``text`` field) for a second held-out perplexity.
        seed: of sampling and training.
    """
    import torch

    from penchant.models.load import load_tokenizer
    from penchant.report import write_report

    torch.set_num_threads(1)  # a model of this size runs fastest on one
    folder = Path(output)
    started = time.monotonic()
    display = _Stages(quiet)
    splits = json.loads(asset("openings.json").read_text())
    start_folder = str(asset("model"))
    tokenizer = load_tokenizer(start_folder)
    start = _load(start_folder)
    if reviews is not None:
        _check_reviews(reviews)
    _fresh(folder)

    openings, held_out = splits["train"], splits["eval"]
    with display.stage(f"writing {SAMPLES} continuations of each of {len(openings)} openings") as progress:
        pairs = _make_pairs(start, tokenizer, openings, seed, progress)
        data = folder / "pairs.jsonl"
        data.write_text("".join(json.dumps(p, ensure_ascii=False) + "\n" for p in pairs))
    display.line(f"{counted(len(pairs), 'pair')} whose sentiment differs by at least {MIN_GAP} (VADER, from -1 to 1)")

    title = f"writing {EVAL_SAMPLES} continuations of {len(held_out)} held-out openings"
    with display.stage(f"{title}, before") as progress:
        before = _write(start, tokenizer, held_out, EVAL_SAMPLES, seed + 1, progress)
    with display.stage("training with DPO"):
        config: dict[str, Any] = {k: dict(v) for k, v in TRAINING.items()}
        config["data"]["path"] = str(data)
        config["train"]["seed"] = seed
        config |= {"model": {"path": start_folder, "dtype": "fp32"}, "output": str(folder)}
        result = api.train(config, quiet=quiet)
    aligned = _load(str(result.model))
    with display.stage(f"{title}, after") as progress:
        after = _write(aligned, tokenizer, held_out, EVAL_SAMPLES, seed + 1, progress)
    with display.stage("measuring perplexity and KL"):
        results = _measure(start, aligned, tokenizer, before, after, reviews)
    results["seconds"] = round(time.monotonic() - started, 1)
    (folder / runfolder.RESULTS).write_text(json.dumps(results, indent=1))
    _write_samples(folder, held_out, before, after)
    report = write_report(folder)
    display.results(results)
    display.line(f"report: {report}  ({results['seconds']:.0f} s in all)")
    return 0 if all(h.get("met", True) for h in results["headline"]) else 1


def _fresh(folder: Path) -> None:
    """Empty the folder of an earlier demo; only a folder with a demo's mark is ever deleted."""
    import shutil

    from penchant.errors import CheckpointError
    from penchant.runfolder import RunLock

    try:
        if folder.exists() and any(folder.iterdir()):
            if folder.is_symlink() or not (folder / MARK).is_file():
                what = "is not empty and was not made by `penchant demo`"
                raise CheckpointError(str(folder), what, "give another --output")
            with RunLock(folder):  # refuses if a demo is still training there
                shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MARK).write_text("made by `penchant demo`, which may delete this folder to start over\n")
    except (FileExistsError, NotADirectoryError) as error:
        raise CheckpointError(str(folder), "is a file, or lies below one", "give another --output") from error
    except OSError as error:
        raise CheckpointError(str(folder), f"cannot be written ({error.strerror})", "give another --output") from error


def _check_reviews(reviews: str) -> None:
    """Check the user's reviews now, as they are only needed after minutes of work."""
    from penchant.data.load import load_preferences
    from penchant.errors import DataError

    if not load_preferences(reviews, shape="text", on_bad_row="skip").trees:
        raise DataError(reviews, "holds no usable reviews", 'give JSONL rows such as {"text": "..."}')


def _load(folder: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def _write(model: Any, tokenizer: Any, openings: Sequence[str], n: int, seed: int, progress: Any) -> Completions:
    """Sample `n` continuations of each opening, scored by the lexicon."""
    from penchant.metrics.completions import sample_completions
    from penchant.rewards.builtin import sentiment

    return sample_completions(
        model,
        tokenizer,
        [[tokenizer.bos_token_id, *tokenizer(o, add_special_tokens=False)["input_ids"]] for o in openings],
        n=n,
        max_new_tokens=NEW_TOKENS,
        seed=seed,
        temperature=TEMPERATURE,
        judge=lambda _prompts, texts, _trees: sentiment(texts),
        progress=progress,
    )


def _make_pairs(model: Any, tokenizer: Any, openings: Sequence[str], seed: int, progress: Any) -> list[dict[str, Any]]:
    """Pairs of the best and the worst continuations of each opening, by the lexicon."""
    completions = _write(model, tokenizer, openings, SAMPLES, seed, progress)
    assert completions.rewards is not None
    pairs = []
    for i, opening in enumerate(openings):
        span = slice(i * SAMPLES, (i + 1) * SAMPLES)
        texts, rewards = completions.texts[span], completions.rewards[span]
        order = rewards.argsort(kind="stable")
        for best, worst in zip(order[::-1][:PAIRS].tolist(), order[:PAIRS].tolist(), strict=True):
            if rewards[best] - rewards[worst] >= MIN_GAP and texts[best].strip() and texts[worst].strip():
                scores = {"chosen_score": float(rewards[best]), "rejected_score": float(rewards[worst])}
                pairs.append({"prompt": opening, "chosen": texts[best], "rejected": texts[worst], **scores})
    return pairs


# ---- What was gained, and what it cost ----


def _measure(
    start: Any, aligned: Any, tokenizer: Any, before: Completions, after: Completions, reviews: str | None
) -> dict[str, Any]:
    from penchant.metrics.completions import distinct_n
    from penchant.metrics.stats import bootstrap_ci, paired_bootstrap, win_rate

    assert before.rewards is not None and after.rewards is not None
    prompts = after.prompts
    gain = paired_bootstrap(before.rewards, after.rewards, clusters=prompts)
    wins = win_rate(before.rewards, after.rewards, clusters=prompts)
    kl = _logps(aligned, after.trees) - _logps(start, after.trees)
    per_sequence = bootstrap_ci(kl, clusters=prompts)
    tokens = sum(map(len, after.ids))
    headline: list[dict[str, Any]] = []

    def add_figure(name: str, **figures: Any) -> None:
        headline.append({"name": name, **figures})

    add_figure(
        "mean sentiment reward",
        before=float(before.rewards.mean()),
        after=float(after.rewards.mean()),
        change=gain.estimate,
        ci=[gain.low, gain.high],
        goal="up by at least 0.3",
        met=gain.estimate >= 0.3,
    )
    share, ci = wins.estimate, [wins.low, wins.high]
    add_figure("win rate against the start", after=share, ci=ci, goal="above 0.75", met=share > 0.75)
    sources = {"perplexity of hand-written reviews": str(asset("reviews.jsonl"))}
    if reviews is not None:
        sources["perplexity of the given reviews"] = reviews
    for name, path in sources.items():
        b, a = (_perplexity(m, tokenizer, path) for m in (start, aligned))
        add_figure(name, before=b, after=a, ratio=a / b, goal="at most 1.3 times the start's", met=a / b <= 1.3)
    ci = [per_sequence.low, per_sequence.high]
    add_figure("KL(policy || start) per continuation, nats", after=per_sequence.estimate, ci=ci)
    add_figure("KL(policy || start) per token, nats", after=float(kl.sum() / tokens))
    add_figure("distinct-2", before=distinct_n(before.ids), after=distinct_n(after.ids))
    length = float(np.mean([len(i) for i in before.ids]))
    add_figure("tokens per continuation", before=length, after=tokens / len(after.ids))
    met, openings = all(h.get("met", True) for h in headline), len(after.trees)
    verdict = (
        f"{'Every goal was met' if met else 'Not every goal was met'}: sentiment rose by {gain.estimate:.2f} "
        f"[{gain.low:.2f}, {gain.high:.2f}] on {openings} openings that were not trained on, and the aligned model wins "
        f"{wins.estimate:.0%} [{wins.low:.0%}, {wins.high:.0%}] of comparisons with its start."
    )
    return {"verdict": verdict, "headline": headline, "openings": openings, "samples_per_opening": EVAL_SAMPLES}


def _logps(model: Any, trees: list[Any]) -> np.ndarray:
    from penchant.logprobs import Scorer
    from penchant.logprobs.reference import LiveReference, compute_logps

    reference = LiveReference(Scorer(model, "shared"))
    result: np.ndarray = compute_logps(reference, trees, tokens_per_step=4096).sums.double().numpy()
    return result


def _perplexity(model: Any, tokenizer: Any, path: str) -> float:
    """exp of the mean negative log-likelihood per token, EOS included."""
    from penchant.data.load import load_preferences
    from penchant.data.tokenize import tokenize

    dataset = load_preferences(path, shape="text", on_bad_row="skip")
    trees = list(tokenize(dataset, tokenizer, max_length=256).trees)
    tokens = sum(len(t.completion_ids[0]) for t in trees)
    return float(np.exp(-_logps(model, trees).sum() / tokens))


def _write_samples(folder: Path, openings: Sequence[str], before: Completions, after: Completions) -> None:
    """Write the first continuation of the first openings, before and after training, without any selection."""
    assert before.rewards is not None and after.rewards is not None
    lines = []
    for i, opening in enumerate(openings[:12]):
        index = i * EVAL_SAMPLES
        rewards = {"reward_before": float(before.rewards[index]), "reward_after": float(after.rewards[index])}
        row = {"prompt": opening, "before": before.texts[index], "after": after.texts[index], **rewards}
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    runfolder.write_summed(folder / runfolder.SAMPLES, "".join(lines))


# ---- Progress and results ----


class _Stages:
    """Numbered stages with progress and timing."""

    def __init__(self, quiet: bool) -> None:
        from rich.console import Console

        self.console = Console(file=unescaped(sys.stderr), quiet=quiet, highlight=False)
        self.number = 0

    @contextlib.contextmanager
    def stage(self, title: str) -> Iterator[Any]:
        self.number += 1
        self.line(f"[{self.number}/5] {title}")
        started = last = time.monotonic()

        def progress(done: int, total: int) -> None:
            nonlocal last
            now = time.monotonic()
            if now - last > 3 and done < total:
                last = now
                self.line(f"      {done}/{total}, {(now - started) / done * (total - done):.0f} s left")

        yield progress
        self.line(f"      {time.monotonic() - started:.1f} s")

    def line(self, text: str) -> None:
        self.console.print(for_terminal(text), markup=False, soft_wrap=True)

    def results(self, results: dict[str, Any]) -> None:
        """Print the headline figures to standard output, so that they can be piped."""
        if self.console.quiet:
            return
        lines = ["", results["verdict"], ""]
        for h in results["headline"]:
            value = f"{h['before']:.3f} -> {h['after']:.3f}" if "before" in h else f"{h['after']:.3f}"
            interval = f"  95% interval [{h['ci'][0]:.3f}, {h['ci'][1]:.3f}]" if "ci" in h else ""
            ratio = f"  ratio {h['ratio']:.3f}" if "ratio" in h else ""
            goal = f"  goal: {h['goal']}, {'met' if h['met'] else 'NOT met'}" if "goal" in h else ""
            lines.append(f"{h['name']:<44} {value:<18}{ratio}{interval}{goal}")
        print("\n".join(lines), file=sys.stdout, flush=True)
