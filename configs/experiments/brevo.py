"""Brevo, the topological order of all that a node depends on: do loops buy depth of a graph?

  ouro experiment brevo --protocol=smoke --workdir=runs/brevo_smoke    under two minutes
  ouro experiment brevo --protocol=small --workdir=runs/brevo          on two cores
  ouro experiment brevo --protocol=paper --workdir=runs/brevo_paper    72 runs of 26 to 74B tokens

Needs nothing: problems are drawn while training, and the graphs evaluated are kept out of it.
`small` trains each model on 28.8 M tokens. Answers are decoded and judged, since each problem has
many right ones; chance is near 0.

`paper` has the problems, steps and optimizer of Physics of Language Models 4.1 (Brevo1 and
Brevo2). Its models are not looped; here 3 ⊗ 4 of width 768 stands beside 3 ⊗ 1 and 12 ⊗ 1, one of
its sizes.
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

TASKS = {
    "smoke": {"name": "brevo", "max_nodes": 4, "symbols": 8, "heldout_problems": 20},
    "small": {"name": "brevo", "max_nodes": 10, "symbols": 16, "heldout_problems": 256,
              "other_nodes": (5, 7, 13)},
    "paper": {"name": "brevo", "max_nodes": 70, "symbols": 70, "min_name": 1, "max_name": 1},
}  # fmt: skip
# About a thousand tokens at a time stay in a CPU's cache, as in Mano.
SHAPES = {
    "smoke": Shape(layers=1, width=32, heads=2, mlp=64, rows=64, length=42,
                   steps=200, warmup_steps=20, learning_rate=4e-3),
    "small": Shape(layers=1, width=96, heads=3, mlp=256, rows=64, length=150,
                   steps=3000, warmup_steps=100, learning_rate=3e-3, microbatch_rows=8),
    "paper": Shape(layers=3, width=768, heads=12, mlp=2048, rows=256, length=1024,
                   steps=100_000, warmup_steps=1000, learning_rate=1e-3),
}  # fmt: skip
# Nodes, symbols, shortest and longest name; rows of a batch, row length, steps.
PAPER_RUNS = [
    (70, 70, 1, 1, 256, 1024, 100_000),
    (90, 90, 1, 1, 256, 1024, 125_000),
    (110, 110, 1, 1, 256, 1024, 150_000),
    (30, 4, 2, 4, 192, 1536, 200_000),
    (40, 4, 2, 4, 192, 1536, 225_000),
    (50, 4, 2, 4, 192, 1536, 250_000),
]


def get_config(protocol: str = "small") -> ConfigDict:
    """`smoke`, `small` or `paper`: the looped model; `get_experiment` changes layers and loops."""
    require_choice(protocol, PROTOCOLS, "configs/experiments/brevo.py protocol")
    config = task_config(
        protocol, TASKS[protocol], SHAPES[protocol], {"brevo": 1.0}, weight_decay=0.03
    )  # fmt: skip
    return to_config_dict(config)


def get_experiment(protocol: str = "small") -> Experiment:
    """The models of a protocol, their seeds, and the published scores of an unlooped model."""
    layers, rate = SHAPES[protocol].layers, SHAPES[protocol].learning_rate
    if protocol == "paper":
        return Experiment("brevo", _paper_runs(), axis="max_nodes", published=PUBLISHED)
    loops, seeds = (2, (0,)) if protocol == "smoke" else (4, (0, 1, 2))
    task = TASKS[protocol]
    differences = [
        f"graphs of up to {task['max_nodes']} nodes with names of one of {task['symbols']} tokens, "
        "not 30 to 110 nodes",
        f"width {SHAPES[protocol].width} and one layer, not 768 and 3",
        "one learning rate for all models, not the best of four",
    ]
    runs = seeds_first(product(rates([rate]), looped_and_baselines(layers, loops)), seeds)
    # Decoding is compiled for each number of loops, which is most of the time of an evaluation.
    depths = (1, 2) if protocol == "smoke" else (1, 2, 4, 6, 8)
    return Experiment("brevo", runs, depths, published=PUBLISHED, differences=differences)


def _paper_runs() -> list[Overrides]:
    problems = []
    for nodes, symbols, shortest, longest, rows, length, steps in PAPER_RUNS:
        names = {"max_nodes": nodes, "symbols": symbols, "min_name": shortest, "max_name": longest}
        problems.append({
            **{f"data.task.{key}": value for key, value in names.items()},
            "model.vocab_size": len(make_task({"name": "brevo", **names}).vocabulary),
            "stages.*.sequence_length": length,
            "stages.*.batch_tokens": rows * length,
            "stages.*.warmup_tokens": SHAPES["paper"].warmup_steps * rows * length,
            "stages.*.tokens": steps * rows * length,
        })  # fmt: skip
    return product(
        problems, rates([3e-4, 5e-4, 1e-3, 2e-3]), seeds_first(looped_and_baselines(3, 4), (0,))
    )


# Physics of Language Models 4.1, Brevo1, Llama with RoPE, 12 layers of width 768: read from a
# picture, so roughly.
PUBLISHED = [
    {"layers": 12, "loops": 1, "max_nodes": nodes, "exact": exact}
    for nodes, exact in ((70, 0.88), (90, 0.63), (110, 0.28))
]
