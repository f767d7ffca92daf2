"""Format a plan as text for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from penchant.base.section import as_yaml
from penchant.base.text import counted, printable
from penchant.plan.memory import Memory
from penchant.plan.plan import Plan
from penchant.plan.settings import Setting
from penchant.plan.work import Rows
from penchant.training.console import duration

UNITS = ((1 << 30, "GB", 2), (1 << 20, "MB", 0), (1 << 10, "kB", 0), (1, "B", 0))


def size(n: float) -> str:
    """Bytes as ``1.25 GB`` (of 2^30) or ``312 MB``."""
    unit, name, digits = next((u for u in UNITS if abs(n) >= u[0]), UNITS[-1])
    return f"{n / unit:,.{digits}f} {name}"


def plan_text(plan: Plan, whole: bool = False) -> str:
    """Format a plan: whether it fits, time, steps, rows, and the given or resolved settings. With `whole`, every section and setting."""
    data = [line for name, rows in plan.rows.items() for line in _data(name, rows)]
    chosen = [s for s in plan.settings if s.why or not s.source.startswith("default")]
    short_sections = {"": _summary(plan), "SETTINGS, given or worked out": _settings(chosen)}
    all_sections = {
        "SETTINGS": _settings(plan.settings), "DATA": data, "WORK": _work(plan),
        "MEMORY": _memory(plan.memory, plan), "DISK": _disk(plan), "TIME": _time(plan),
    }  # fmt: skip
    lines = [f"{plan.method} in {plan.output} ({plan.folder})"]
    for title, body in (all_sections if whole else short_sections).items():
        lines += ["", *([title] if title else []), *(f"  {line}" for line in body)]
    if plan.notes:
        lines += ["", *(f"! {note}" for note in plan.notes)]
    if not whole:
        lines += ["", "Every setting, and rows, tokens, memory, disk and time in parts: --all"]
    return "\n".join(printable(line) for line in [*lines, *_ranks(plan)])


def _ranks(plan: Plan) -> list[str]:
    """Lines of the table of memory per GPU; empty if it was not requested."""
    if not plan.ranks:
        return []
    counts = list(plan.ranks)
    names = list(dict.fromkeys(name for parts in plan.ranks.values() for name in parts))
    rows = [["GPUs", *map(str, counts)]]
    rows += [[name, *(size(plan.ranks[n].get(name, 0)) for n in counts)] for name in names]
    rows.append(["of each GPU", *(size(sum(plan.ranks[n].values())) for n in counts)])
    return [
        "",
        "MEMORY PER GPU: computed, without the GPU's own context; not measured on several GPUs",
        *("  " + line for line in columns(rows)),
    ]


def _summary(plan: Plan) -> list[str]:
    memory, disk, work = plan.memory, plan.disk, plan.work
    rows = []
    for label, fits, peak, free in (
        *([] if plan.ranks else [("memory", memory.fits, memory.peak, memory.free)]),
        ("disk", disk.fits, disk.peak, disk.free),
    ):
        warning = "" if peak <= free else ": MORE THAN IS FREE NOW"
        rows.append((label, f"{'fits' + warning if fits else 'IT DOES NOT FIT'}: {size(peak)} of {size(free)} free"))
    rows += [
        ("time", _time(plan)[0]),
        ("steps", f"{work.steps:,} ({work.steps_per_epoch:,} an epoch)"),
        ("parameters", f"{plan.parameters[0]:,}, of which {plan.parameters[1]:,} are trained"),
    ]
    for name, r in plan.rows.items():
        cut = f", {r.cut:.1%} of them cut to data.max_length" if r.cut else ""
        aside = f", {r.aside:,} kept aside" if r.aside else ""
        rows.append((f"{name} rows", f"{r.used:,} of {r.read:,} read{aside}{cut}"))
    lines = columns(rows)
    if not memory.fits and not plan.ranks:
        lines += ["what to change, and about what it saves:", *(f"  {text}: {size(n)}" for text, n in memory.advice)]
    return lines


def columns(rows: Iterable[Sequence[str]]) -> list[str]:
    """Format rows of cells as aligned lines. The last column is not padded."""
    cells = [tuple(r) for r in rows]
    widths = [
        max((len(r[i]) for r in cells if len(r) > i + 1), default=0) for i in range(max(map(len, cells), default=0))
    ]
    return ["  ".join(c.ljust(w) for c, w in zip(r[:-1], widths, strict=False)) + f"  {r[-1]}" for r in cells]


def _settings(settings: Sequence[Setting]) -> list[str]:
    rows = []
    for s in settings:
        value = as_yaml(s.value)
        if s.why:
            value += f" -> {as_yaml(s.became)}"
        rows.append((s.key, value, s.source + (f"; {s.why}" if s.why else "")))
    return columns(rows)


def _data(name: str, rows: Rows) -> list[str]:
    aside = f", {rows.aside:,} kept aside" if rows.aside else ""
    kind = rows.layout if rows.layout == rows.kind else f"{rows.layout}: {rows.kind}"
    lines = [f"{name}: {counted(rows.used, 'row')} of {rows.read:,} read ({kind}){aside}"]
    for label, q in (("prompt", rows.prompts), ("completion", rows.completions)):
        if q:
            lines.append(f"  {label} tokens: half have {q[0]:,} or less, 90% {q[1]:,}, 99% {q[2]:,}, longest {q[3]:,}")
    lines.append(f"  cut to data.max_length: {rows.cut:.1%} of rows")
    return lines


def _work(plan: Plan) -> list[str]:
    w = plan.work
    prefix = "" if w.exact else "about "
    tokens = f"{prefix}{w.tokens:,} ({w.trained:,} of completions)"
    if w.saving > 0.0005:
        tokens += f"; {w.separate:,} with every prompt repeated, so shared prompts save {w.saving:.0%}"
    rows = [
        ("optimizer steps", f"{w.steps:,} ({w.steps_per_epoch:,} an epoch), the first {w.warmup:,} warm up"),
        (
            "forward/backward passes",
            f"{prefix}{w.passes:,}, {w.passes / w.steps:.1f} a step; the largest has {w.largest:,} tokens",
        ),
        ("tokens computed", tokens),
        ("evaluations, checkpoints", f"{w.evaluations}, {w.checkpoints}"),
        ("parameters", f"{plan.parameters[0]:,}, of which {plan.parameters[1]:,} are trained"),
        ("reference", plan.reference),
    ]
    return columns(rows)


def _memory(memory: Memory, plan: Plan) -> list[str]:
    rows = [(name, size(n)) for name, n in memory.parts.items() if n]
    rows += [(f"at its highest: {name}", size(n)) for name, n in memory.moments.items() if n == memory.peak]
    rows.append(("this machine", f"{size(memory.machine)}, {size(memory.free)} of it free now"))
    rows += [(f"and on {device}", size(n)) for device, n in memory.elsewhere.items()]
    lines = columns(rows)
    if plan.probe is not None:
        lines.append(f"the probe's few steps took {size(plan.probe.peak)} (they need not meet the largest micro-batch)")
    if memory.coarse:
        lines.append(f"a rougher estimate: {memory.coarse}")
    if not memory.fits:
        lines.append("IT DOES NOT FIT. What to change, and about what it saves:")
        lines += [f"  {text}: {size(saved)}" for text, saved in memory.advice]
    elif memory.peak > memory.free:
        lines.append("more than is free now: close something, or wait")
    return lines


def _disk(plan: Plan) -> list[str]:
    d = plan.disk
    rows = [
        (
            "checkpoints",
            f"{d.kept} kept x {size(d.checkpoint)} = {size(d.kept * d.checkpoint)}, one more while it is written",
        ),
        ("logs, report", size(d.logs)),
    ]
    if d.cache:
        rows.append(("reference cache", size(d.cache)))
    rows.append(("free there", size(d.free)))
    return columns(rows) + ([] if d.fits else ["IT DOES NOT FIT: lower checkpoint.keep_last, or choose another output"])


def _time(plan: Plan) -> list[str]:
    if plan.duration is None or plan.probe is None:
        return ["not probed" if not plan.notes else "no probe was taken"]
    t = plan.duration
    steps = len(plan.probe.steps)
    lines = [
        f"{duration(t.likely)}, between {duration(t.low)} and {duration(t.high)} by {steps} timed step{'s' * (steps > 1)}"
    ]
    lines += columns((name, duration(seconds)) for name, seconds in t.parts.items() if seconds >= 0.5)
    return lines
