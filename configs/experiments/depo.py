"""Depo, the k-th successor on a cycle shown in the problem: do loops buy hops?

  ouro experiment depo --protocol=smoke --workdir=runs/depo_smoke    under two minutes
  ouro experiment depo --protocol=small --workdir=runs/depo          on two cores
  ouro experiment depo --protocol=paper --workdir=runs/depo_paper    72 runs of 23 to 39B tokens

Needs nothing: problems are drawn while training, and the cycles evaluated are kept out of it.
`small` trains each model on 24.6 M tokens. Chance is 1/(N-1), any other name of the problem.

`paper` has the problems, steps and optimizer of Physics of Language Models 4.1 (Depo1 and Depo2).
Its models are not looped; here 3 ⊗ 4 of width 768 stands beside 3 ⊗ 1 and 12 ⊗ 1, one of its sizes.
"""

from ml_collections import ConfigDict

from ouro_jax.config import to_config_dict
from ouro_jax.data.tasks.rows import make_task
from ouro_jax.errors import require_choice
from ouro_jax.experiments.experiment import (
    PROTOCOLS,
    Experiment,
    Shape,
    looped_and_baselines,
    rates,
    seeds_first,
    task_config,
)
from ouro_jax.experiments.sweep import Overrides, product

DEPO1 = {"symbols": 50, "min_name": 1, "max_name": 2, "max_hops": 8}
DEPO2 = {"symbols": 4, "min_name": 5, "max_name": 7, "max_hops": 16}
TASKS = {
    "smoke": {"name": "depo", "max_nodes": 5, "symbols": 8, "max_name": 1, "max_hops": 2,
              "queries": 3, "heldout_problems": 20},
    "small": {"name": "depo", "max_nodes": 10, "symbols": 16, "max_name": 1, "max_hops": 4,
              "other_hops": (1, 3)},
    "paper": {"name": "depo", "max_nodes": 225, **DEPO1},
}  # fmt: skip
# About a thousand tokens at a time stay in a CPU's cache, as in Mano.
SHAPES = {
    "smoke": Shape(layers=1, width=32, heads=2, mlp=64, rows=64, length=48,
                   steps=200, warmup_steps=20, learning_rate=4e-3),
    "small": Shape(layers=1, width=96, heads=3, mlp=256, rows=64, length=128,
                   steps=3000, warmup_steps=100, learning_rate=3e-3, microbatch_rows=8),
    "paper": Shape(layers=3, width=768, heads=12, mlp=2048, rows=128, length=2048,
                   steps=87_500, warmup_steps=1000, learning_rate=1e-3),
}  # fmt: skip
PAPER_STEPS = [
    (DEPO1, {225: 87_500, 300: 100_000, 375: 112_500}),
    (DEPO2, {75: 100_000, 100: 125_000, 125: 150_000}),
]


def get_config(protocol: str = "small") -> ConfigDict:
    """`smoke`, `small` or `paper`: the looped model; `get_experiment` changes layers and loops."""
    require_choice(protocol, PROTOCOLS, "configs/experiments/depo.py protocol")
    config = task_config(
        protocol, TASKS[protocol], SHAPES[protocol], {"depo": 1.0}, weight_decay=0.03
    )  # fmt: skip
    return to_config_dict(config)


def get_experiment(protocol: str = "small") -> Experiment:
    """The models of a protocol and their seeds. The paper's scores are in pictures only."""
    layers, rate = SHAPES[protocol].layers, SHAPES[protocol].learning_rate
    if protocol == "paper":
        return Experiment("depo", _paper_runs(), axis="max_nodes")
    loops, seeds = (2, (0,)) if protocol == "smoke" else (4, (0, 1, 2))
    task = TASKS[protocol]
    differences = [
        f"cycles of up to {task['max_nodes']} nodes with names of one token and up to "
        f"{task['max_hops']} hops, not 75 to 375 nodes and 8 or 16 hops",
        f"width {SHAPES[protocol].width} and one layer, not 768 and 3",
        "one learning rate for all models, not the best of four",
    ]
    runs = seeds_first(product(rates([rate]), looped_and_baselines(layers, loops)), seeds)
    return Experiment("depo", runs, differences=differences)


def _paper_runs() -> list[Overrides]:
    batch_tokens = SHAPES["paper"].rows * SHAPES["paper"].length
    problems = [
        {
            "data.task.max_nodes": nodes,
            **{f"data.task.{key}": value for key, value in variant.items()},
            "model.vocab_size": len(make_task({"name": "depo", "max_nodes": nodes, **variant})
                                    .vocabulary),
            "stages.*.tokens": steps * batch_tokens,
        }
        for variant, sizes in PAPER_STEPS
        for nodes, steps in sizes.items()
    ]  # fmt: skip
    return product(
        problems, rates([3e-4, 5e-4, 1e-3, 2e-3]), seeds_first(looped_and_baselines(3, 4), (0,))
    )
