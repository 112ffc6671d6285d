"""Mano, arithmetic on prefix expressions modulo a number: looping buys manipulation of knowledge.

  ouro experiment mano --protocol=smoke --workdir=runs/mano_smoke    under two minutes
  ouro experiment mano --protocol=small --workdir=runs/mano          on two cores, see below
  ouro experiment mano --protocol=paper --workdir=runs/mano_paper    252 runs of 10 to 26B tokens

Needs nothing: problems are drawn while training, and those evaluated are kept out of it. Expect
1 ⊗ 4 far above 1 ⊗ 1, which has as many parameters; 4 ⊗ 1, which has as many FLOPs and four times
the parameters, spreads widely over seeds. `small` trains each model on 25.9 M tokens, the unlooped
ones at three learning rates, and one at 2 to 6 loops, drawn for each step: 24 runs of 3 to 11
minutes on one core, about an hour and a half on two.

`paper` follows sections 6.2 and B.2; it trains on the last loop's loss, since the paper does not
say which it took, and on all tokens.
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
    model,
    rates,
    seeds_first,
    task_config,
)
from ouro_jax.experiments.sweep import Overrides, product

TASKS = {
    "smoke": {"name": "mano", "max_length": 2, "modulus": 3, "loss_on": "answer",
              "heldout_problems": 20, "other_lengths": (1, 3)},
    "small": {"name": "mano", "max_length": 4, "modulus": 5, "loss_on": "answer",
              "other_lengths": (2, 3, 5, 6)},
    "paper": {"name": "mano", "max_length": 10, "modulus": 23},
}  # fmt: skip
# On CPU the small model's step takes 0.26 s in microbatches of 54 rows, which stay in the cache,
# and 0.40 s in one of 216.
SHAPES = {
    "smoke": Shape(layers=1, width=32, heads=2, mlp=64, rows=64, length=16,
                   steps=300, warmup_steps=30, learning_rate=4e-3),
    "small": Shape(layers=1, width=96, heads=3, mlp=256, rows=216, length=20,
                   steps=6000, warmup_steps=100, learning_rate=4e-3, microbatch_rows=54),
    "paper": Shape(layers=2, width=1024, heads=16, mlp=2816, rows=128, length=1024,
                   steps=80_000, warmup_steps=1000, learning_rate=2e-4),
}  # fmt: skip
# As much work as four loops in the mean, and trained for no depth in particular.
DRAWN_DEPTH = [{"stages.*.num_layers": 1, "stages.*.num_loops": 6, "stages.*.min_loops": 2}]
PAPER_STEPS = {10: 80_000, 16: 110_000, 24: 200_000}


def get_config(protocol: str = "small") -> ConfigDict:
    """`smoke`, `small` or `paper`: the looped model; `get_experiment` changes layers and loops."""
    require_choice(protocol, PROTOCOLS, "configs/experiments/mano.py protocol")
    config = task_config(
        protocol, TASKS[protocol], SHAPES[protocol], {"mano": 1.0}
    )  # fmt: skip
    return to_config_dict(config)


def get_experiment(protocol: str = "small") -> Experiment:
    """The models of a protocol, their seeds, and the paper's table."""
    if protocol == "paper":
        return Experiment("mano", _paper_runs(), axis="max_length", published=PUBLISHED)
    loops, seeds = (2, (0,)) if protocol == "smoke" else (4, (0, 1, 2))
    differences = [
        f"expressions of up to {TASKS[protocol]['max_length']} operations modulo "
        f"{TASKS[protocol]['modulus']}, not 10 to 24 modulo 23",
        f"width {SHAPES[protocol].width} and one layer, not 1,024 and 2 to 6",
        "loss on the answer, not on all tokens",
        "the best of three learning rates for unlooped models and one for looped ones, not the "
        "best of four for all"
        if protocol == "small"
        else "one learning rate, not four",
    ]
    peak = SHAPES[protocol].learning_rate
    models = product(rates([peak]), looped_and_baselines(1, loops))
    if protocol == "small":
        models += product(rates([peak]), DRAWN_DEPTH)
        models += product(rates([peak / 2, 2 * peak]), model(1, 1) + model(loops, 1))
    runs = seeds_first(models, seeds)
    return Experiment("mano", runs, published=PUBLISHED, differences=differences)


def _paper_runs() -> list[Overrides]:
    models = [run for layers, loops in ((12, 1), (2, 1), (2, 6), (3, 1), (3, 4), (6, 1), (6, 2))
              for run in model(layers, loops)]  # fmt: skip
    lengths = [
        {
            "data.task.max_length": length,
            "model.vocab_size": len(make_task(TASKS["paper"] | {"max_length": length}).vocabulary),
            "stages.*.tokens": steps * 128 * 1024,
        }
        for length, steps in PAPER_STEPS.items()
    ]
    return product(lengths, rates([5e-5, 1e-4, 2e-4, 5e-4]), seeds_first(models, (0, 1, 2)))


# Paper, Figure 6 (right): accuracy in percent at L = 10, 16 and 24.
PUBLISHED = [
    {"layers": layers, "loops": loops, "max_length": length, "exact": percent / 100}
    for layers, loops, percents in (
        (12, 1, (93.6, 94.4, 34.8)),
        (2, 1, (21.5, 8.4, 7.5)), (2, 6, (98.1, 96.3, 78.0)),
        (3, 1, (75.4, 29.8, 11.0)), (3, 4, (97.9, 95.8, 92.2)),
        (6, 1, (84.7, 59.5, 20.0)), (6, 2, (93.4, 88.5, 35.1)),
    )
    for length, percent in zip((10, 16, 24), percents, strict=True)
]  # fmt: skip
