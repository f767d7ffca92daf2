"""Table of every preference loss at its defaults, with the same data, budget and seeds.

    .venv/bin/python recipes/loss_table.py                                         # the bundled model
    .venv/bin/python recipes/loss_table.py --task hh --seeds 1 --data hh.jsonl     # SmolLM2-135M with LoRA

Columns, all on held-out prompts and relative to the starting model: accuracy (share of pairs whose chosen completion gained more
log-prob than the rejected one), margin = d chosen - d rejected, d = change in log-prob (nats per completion), KL(policy || start)
of sampled completions (nats per completion), their length in tokens, and (demo only) their true reward, VADER's sentiment.
"""

from __future__ import annotations

from experiments import arguments, fill, make_task, print_table, selected

from penchant.losses import LOSSES


def main() -> None:
    args = arguments(__doc__.splitlines()[0]).parse_args()
    task = make_task(args)
    settings = {name: {"name": name} for name in LOSSES}
    results = fill(args, task, "losses", selected(settings, args.only))
    print(task.describe(), "\n")
    print_table("loss", results)


if __name__ == "__main__":
    main()
