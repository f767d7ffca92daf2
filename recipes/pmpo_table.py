"""PMPO on unpaired labels: alpha 1 (accepted only), 0.5 and 0 (rejected only) x beta x three divergences (arXiv 2410.04166).

    .venv/bin/python recipes/pmpo_table.py

The training rows are the completions of the pairs with their labels, shuffled. With alpha 0 and a beta below 1 the objective is
unbounded, and a run that falls below train.logp_floor stops with a message. The columns are those of `loss_table.py`.
"""

from __future__ import annotations

from experiments import arguments, fill, make_task, print_table, selected

BETAS = (0.1, 0.5, 2.0)


def main() -> None:
    args = arguments(__doc__.splitlines()[0]).parse_args()
    task = make_task(args)
    settings = {
        f"{divergence} alpha={alpha:g} beta={beta:g}": {
            "name": "pmpo",
            "alpha": alpha,
            "beta": beta,
            "divergence": divergence,
        }
        for divergence in ("kl", "js", "renyi")
        for alpha in (1.0, 0.5, 0.0)
        for beta in BETAS
    }
    results = fill(args, task, "pmpo", selected(settings, args.only), unpaired=True)
    print(task.describe(), "\n")
    print_table("PMPO", results)


if __name__ == "__main__":
    main()
