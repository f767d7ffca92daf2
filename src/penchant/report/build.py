"""Write a run's report: one HTML file that can be read offline, with nothing in it that could run or call home."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from penchant.errors import CheckpointError
from penchant.report.curves import Chart, Series, line_chart, number
from penchant.report.glossary import meaning

# (title, [(metric, label)]): train lines are drawn plain, held-out points are marked
CHARTS: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
    ("Loss", (("loss", "train"), ("eval/loss", "held out"))),
    ("Accuracy", (("rewards/accuracies", "train"), ("eval/rewards/accuracies", "held out"))),
    ("Reward margin", (("rewards/margins", "train"), ("eval/rewards/margins", "held out"))),
    (
        "Rewards on held-out rows",
        (("eval/rewards/chosen", "chosen"), ("eval/rewards/rejected", "rejected")),
    ),
    ("Rewards in training", (("rewards/chosen", "chosen"), ("rewards/rejected", "rejected"))),
    ("Log-probs on held-out rows", (("eval/logps/chosen", "chosen"), ("eval/logps/rejected", "rejected"))),
    (
        "Shift from the reference, held out (nats)",
        (("eval/logratios/chosen", "chosen"), ("eval/logratios/rejected", "rejected")),
    ),
    ("KL to the reference (nats per completion)", (("eval/kl/policy_ref", "held-out prompts"),)),
    ("Perplexity", (("eval/perplexity", "held out"),)),
    ("Learning rate", (("lr", "learning rate"),)),
    ("Gradient norm", (("grad_norm", "before clipping"),)),
)
HELD_OUT = (
    "eval/loss",
    "eval/rewards/accuracies",
    "eval/rewards/margins",
    "eval/rewards/chosen",
    "eval/rewards/rejected",
    "eval/logps/chosen",
    "eval/logps/rejected",
    "eval/logps/accuracies",
    "eval/calibration/ece",
    "eval/calibration/brier",
    "eval/length/longer_wins",
    "eval/kl/policy_ref",
    "eval/perplexity",
)


def write_report(run: Path | str, output: Path | str | None = None) -> Path:
    """Write ``report.html`` of a run folder; whatever the folder lacks is said, not guessed.

    Raises:
        CheckpointError: the folder does not exist or holds no run.
    """
    run = Path(run)
    if not run.is_dir():
        raise CheckpointError(str(run), "no such run folder", "give the folder that `output` names in the config")
    if not any((run / n).exists() for n in ("metrics.jsonl", "manifest.json", "config.resolved.yaml", "results.json")):
        raise CheckpointError(str(run), "holds no run", "give the folder that `output` names in the config")
    target = Path(output) if output is not None else run / "report.html"
    try:
        target.write_text(render(run), encoding="utf-8")
    except OSError as error:
        raise CheckpointError(
            str(target), f"cannot be written ({error.strerror})", "choose another --output"
        ) from error
    return target


def render(run: Path) -> str:
    """The page as text."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("penchant.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    environment.filters["visible"] = visible
    environment.filters["short_path"] = short_path
    metrics = _jsonl(run / "metrics.jsonl")
    manifest = _json(run / "manifest.json")
    quality = _json(run / "calibration.json")
    return environment.get_template("report.html.j2").render(
        name=run.resolve().name,
        manifest=manifest,
        results=_json(run / "results.json"),
        held_out=held_out_table(metrics),
        charts=charts(metrics) + reliability(quality),
        by_length=quality.get("length", {}),
        samples=_jsonl(run / "samples.jsonl"),
        audit=_json(run / "audit.json"),
        config=_text(run / "config.resolved.yaml"),
        facts=facts(manifest),
        speed=speed(_jsonl(run / "perf.jsonl")),
        glossary=glossary(metrics),
        verdict=verdict(manifest, metrics),
    )


def verdict(manifest: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> str:
    """One sentence from the held-out figures, for runs that bring no verdict of their own."""
    evals = [m for m in metrics if m.get("kind") == "eval"]
    state = {
        "finished": "",
        "running": "The run is still going on, or was killed. ",
        "stopped": "The run stopped before its end. ",
        "interrupted": "The run was interrupted before its end. ",
        "paused": "The run paused before its end. ",
    }
    prefix = state.get(str(manifest.get("status")), "")
    if len(evals) < 2:
        return prefix + "No held-out comparison: nothing was held out, or it was evaluated less than twice."
    first, last = evals[0], evals[-1]
    accuracy = last.get("eval/rewards/accuracies")
    if accuracy is None and "eval/reward" in last:
        ci = last.get("eval/reward/ci")
        interval = f" (95% interval {number(ci[0])} to {number(ci[1])})" if ci else ""
        return (
            f"{prefix}The reward of fresh completions of held-out prompts went from {number(first.get('eval/reward'))} to "
            f"{number(last['eval/reward'])}{interval}, at a KL of {number(last.get('eval/kl/policy_ref'))} nats per completion."
        )
    if accuracy is None:
        name = "eval/perplexity" if "eval/perplexity" in last else "eval/loss"
        label = name.removeprefix("eval/")
        return f"{prefix}Held-out {label} went from {number(first.get(name))} to {number(last.get(name))}."
    ci = last.get("eval/rewards/accuracies/ci")
    interval = f" (95% interval {ci[0]:.1%} to {ci[1]:.1%})" if ci else ""
    beyond = ""
    if ci and ci[0] <= 0.5:
        beyond = " The interval includes one half: no preference was shown to be learned."
    judged = manifest.get("loss") == "reward_model"
    who = "reward model scores the chosen answer higher in" if judged else "policy prefers the chosen answer of"
    return (
        f"{prefix}After {last['step']:,} steps the {who} {accuracy:.1%} of "
        f"{last.get('eval/rows', '?')} held-out pairs{interval}, by a mean reward margin of {number(last.get('eval/rewards/margins'))}.{beyond}"
    )


def held_out_table(metrics: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Before, after and interval of every held-out figure."""
    evals = [m for m in metrics if m.get("kind") == "eval"]
    if not evals:
        return []
    rows = []
    for name in HELD_OUT:
        if name not in evals[-1]:
            continue
        ci = evals[-1].get(f"{name}/ci")
        rows.append(
            {
                "name": name.removeprefix("eval/"),
                "before": number(evals[0].get(name)) if len(evals) > 1 else "-",
                "after": number(evals[-1][name]),
                "interval": f"{number(ci[0])} to {number(ci[1])}" if ci else "",
                "meaning": meaning(name),
            }
        )
    return rows


def charts(metrics: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """Every chart that has at least one point."""
    made = []
    for title, lines in CHARTS:
        series = []
        for metric, label in lines:
            kind = "eval" if metric.startswith("eval/") else "train"
            points = tuple(
                (float(m["step"]), float(m[metric]))
                for m in metrics
                if m.get("kind") == kind and m.get(metric) is not None
            )
            series.append(Series(label, points, marked=kind == "eval"))
        chart = line_chart(title, series)
        if chart is not None:
            made.append(chart)
    return made


def reliability(quality: Mapping[str, Any]) -> list[Chart]:
    """A reward model's confidence against the share of pairs that it ranks right, in percent; on the line it is calibrated."""
    bins = (quality.get("calibration") or {}).get("bins") or []
    points = tuple((100 * b["confidence"], 100 * b["right"]) for b in bins)
    series = [Series("share right, %", points, marked=True)]
    if points:
        series.append(Series("calibrated", ((50.0, 50.0), (100.0, 100.0)), marked=True))
    chart = line_chart("Reliability on held-out pairs", series, x_label="confidence, %")
    return [] if chart is None else [chart]


def facts(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The manifest as flat (key, value) rows."""
    rows: list[tuple[str, str]] = []

    def walk(value: Any, prefix: str) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                walk(inner, f"{prefix}.{key}" if prefix else str(key))
        elif value is not None:
            rows.append(
                (prefix, f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value))
            )

    walk(manifest, "")
    return rows


def speed(perf: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Median speed and peak memory of the steps."""
    if not perf:
        return []
    middle = lambda key: sorted(float(p[key]) for p in perf)[len(perf) // 2]  # noqa: E731
    return [
        ("time in optimiser steps", f"{sum(float(p['seconds']) for p in perf):,.1f} s"),
        ("median tokens per second", f"{middle('tokens_per_second'):,.0f}"),
        ("median rows per second", number(middle("trees_per_second"))),
        ("peak memory of the process", f"{max(float(p['peak_memory_gb']) for p in perf):.2f} GB"),
    ]


def glossary(metrics: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Definitions of every metric that was logged."""
    names = sorted({k.removeprefix("eval/") for m in metrics for k in m if not k.endswith("/ci")})
    return [(n, meaning(n)) for n in names if meaning(n)]


def visible(text: Any) -> str:
    """Text with control and direction marks shown by name: a right-to-left override must not reorder the page."""
    return "".join(
        c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Co") else f"\u27e8U+{ord(c):04X}\u27e9"
        for c in str(text)
    )


def short_path(path: str) -> str:
    """An absolute path by its last two parts, so that a report can be shown around; hub ids as they are."""
    parts = Path(path).parts
    return str(Path("\u2026", *parts[-2:])) if Path(path).is_absolute() and len(parts) > 3 else path


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _json(path: Path) -> Any:
    try:
        value = json.loads(_text(path) or "{}")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _jsonl(path: Path) -> list[dict[str, Any]]:
    """Whole lines only: the last line of a run that goes on may be half written."""
    rows = []
    for line in _text(path).split("\n"):  # not splitlines: JSON strings may hold U+2028
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            rows.append(value)
    return rows
