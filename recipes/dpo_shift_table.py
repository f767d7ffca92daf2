"""DPO-Shift with lambda fixed at 1 (DPO), 0.95, 0.75 and 0.5, and with both linear schedules (arXiv 2502.07599).

    .venv/bin/python recipes/dpo_shift_table.py

The paper's trade-off: with a smaller lambda, the log-prob of the chosen completion falls less and the margin is smaller. The
schedules go between 0.5 and 1. The columns are those of `loss_table.py`.
"""

from __future__ import annotations

from experiments import arguments, fill, make_task, print_table, selected


def main() -> None:
    args = arguments(__doc__.splitlines()[0]).parse_args()
    task = make_task(args)
    settings = {f"lambda={v:g}": {"name": "dpo_shift", "lambda": v} for v in (1.0, 0.95, 0.75, 0.5)}
    settings |= {s: {"name": "dpo_shift", "schedule": s} for s in ("increase_linear", "decrease_linear")}
    results = fill(args, task, "dpo_shift", selected(settings, args.only))
    print(task.describe(), "\n")
    print_table("DPO-Shift", results)


if __name__ == "__main__":
    main()
