"""Capo, how many bits about made-up people a model stores: looping adds none and takes none.

  ouro experiment capo --protocol=smoke --workdir=runs/capo_smoke
  ouro experiment capo --protocol=small --workdir=runs/capo
  ouro experiment capo --protocol=paper --workdir=runs/capo_paper    40 runs of 1.2 to 31B tokens

Needs nothing: names, values and sentences are invented. The answer is R, bits per parameter
(`experiments/capacity.py`), and means something only well below its maximum: a model that could
hold everyone is bounded by the data. Each person is met `exposures` times, but for the last
biographies that do not fill a batch.

`small` has 27,649 parameters and rows of four biographies without padding; its 12 runs take 50
minutes of one core. After 100 exposures expect 0.8 to 1.1 bits per parameter of at most 1.78 for
both, each at the better of two learning rates. It has two layers because a single one without
loops stores a third less (`docs/experiments.md`).

`paper` follows appendix B.1. The paper gives sizes of 1 to 40M parameters and not the models; ours
have SwiGLU, and an embedding and a head of their own, so a million parameters hold fewer layers. It
does not say which loss a looped model takes; here it is the last loop's.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from ouro_jax.config import to_config_dict
from ouro_jax.data.tasks.rows import make_task
from ouro_jax.errors import require_choice
from ouro_jax.experiments.experiment import (
    PROTOCOLS,
    Experiment,
    Shape,
    model,
    rates,
    seeds_first,
    task_config,
)
from ouro_jax.experiments.sweep import Overrides, product

SMALL = {
    "name": "capo", "people": 1600, "exposures": 100, "first_names": 16, "middle_names": 16,
    "last_names": 16, "birth_years": 16, "cities": 16, "universities": 16, "majors": 16,
    "employers": 16, "templates": 2, "order": "fixed", "pronouns": "he_she", "work_city": False,
    "heldout_problems": 400,
}  # fmt: skip
TASKS = {
    "smoke": SMALL | {"people": 200, "exposures": 20, "heldout_problems": 50},
    "small": SMALL,
    "paper": {"name": "capo", "people": 20_000, "exposures": 1000},
}
# Steps are as many as the exposures make.
SHAPES = {
    "smoke": Shape(layers=1, width=16, heads=1, mlp=48, rows=16, length=124,
                   steps=0, warmup_steps=10, learning_rate=8e-3),
    "small": Shape(layers=2, width=24, heads=2, mlp=96, rows=16, length=124,
                   steps=0, warmup_steps=100, learning_rate=8e-3),
    "paper": Shape(layers=2, width=128, heads=2, mlp=352, rows=192, length=512,
                   steps=0, warmup_steps=1000, learning_rate=1e-3),
}  # fmt: skip


def get_config(protocol: str = "small") -> ConfigDict:
    """`smoke`, `small` or `paper`: the model of four loops."""
    require_choice(protocol, PROTOCOLS, "configs/experiments/capo.py protocol")
    shape = SHAPES[protocol]
    shape = dataclasses.replace(shape, steps=_steps(shape, TASKS[protocol]))
    # The sets are not named like the source: bits are measured when a model is trained.
    config = task_config(
        protocol, TASKS[protocol], shape, {"biographies": 1.0}, weight_decay=0.02,
        evaluations=1
    )  # fmt: skip
    return to_config_dict(config)


def get_experiment(protocol: str = "small") -> Experiment:
    """Looped and not, with as many parameters, over numbers of people and sizes of model."""
    if protocol == "paper":
        return Experiment(
            "capo", _paper_runs(), axis="people", main_set="biographies", published=PUBLISHED
        )
    loops, seeds = (2, (0,)) if protocol == "smoke" else (4, (0, 1, 2))
    task, shape = TASKS[protocol], SHAPES[protocol]
    differences = [
        f"{task['people']:,} people met {task['exposures']} times, not 20,000 to 500,000 met 1,000 "
        "times",
        f"width {shape.width} and {shape.layers} layers, not 1 to 40M parameters",
        "pools of 16 values, two sentences per attribute in a fixed order, and no city of work",
    ]
    peak = shape.learning_rate
    peaks = [peak] if protocol == "smoke" else [peak, 2 * peak]
    models = product(rates(peaks), model(shape.layers, loops) + model(shape.layers, 1))
    runs = seeds_first(models, seeds)
    return Experiment(
        "capo", runs, main_set="biographies", published=PUBLISHED, differences=differences
    )


def _steps(shape: Shape, task: Mapping[str, Any]) -> int:
    """The full batches that all exposures make."""
    return make_task(task).num_rows("biographies", shape.length) // shape.rows


def _paper_runs() -> list[Overrides]:
    shape = SHAPES["paper"]
    batch_tokens = shape.rows * shape.length
    people = [
        {"data.task.people": number, "stages.*.tokens": _steps(shape, task) * batch_tokens}
        for number in (20_000, 50_000, 100_000, 200_000, 500_000)
        for task in [TASKS["paper"] | {"people": number}]
    ]
    # 1.2, 4.7, 13 and 41M parameters; heads of 64, as in the paper.
    sizes = [
        {
            "model.hidden_size": 64 * heads, "model.intermediate_size": 176 * heads,
            "model.num_heads": heads, "model.num_kv_heads": heads, "model.head_dim": 64,
            "model.initializer_range": (64 * heads) ** -0.5, "stages.*.num_layers": layers,
        }
        for heads, layers in ((2, 2), (4, 4), (6, 6), (8, 12))
    ]  # fmt: skip
    return product(people, sizes, [{"stages.*.num_loops": loops} for loops in (4, 1)])


# Paper, Figure 6 (left): both lie along the line of two bits per parameter.
PUBLISHED = [{"loops": 1, "bits_per_parameter": 2.0}, {"loops": 4, "bits_per_parameter": 2.0}]
