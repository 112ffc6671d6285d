"""Capo, how many bits about made-up people a model stores: looping adds none and takes none.

  ouro experiment capo --protocol=smoke --workdir=runs/capo_smoke
  ouro experiment capo --protocol=small --workdir=runs/capo
  ouro experiment capo --protocol=paper --workdir=runs/capo_paper    40 runs of 1.2 to 31B tokens

Needs nothing: names, values and sentences are invented. The answer is R, bits per parameter
(`experiments/capacity.py`), and means something only well below its maximum: a model that could
hold everyone is bounded by the data. Each person is met `exposures` times, but for the last
biographies that do not fill a batch.

`small` has 28,545 parameters, and rows of four biographies without padding. Expect about 0.6 bits
per parameter of at most 1.72: 1 ⊗ 1 had 0.63 after 84 of 100 exposures. (2,500 people met 60 times,
at a rate of 4e-3 and with an MLP of 88, gave 0.24 of 2.99.) Whether 1 ⊗ 4 has as many is not
measured yet.

`paper` follows appendix B.1. The paper gives sizes of 1 to 40M parameters and not the models; ours
have SwiGLU, and an embedding and a head of their own, so a million parameters hold fewer layers. It
does not say which loss a looped model takes; here it is the last loop's.
"""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from ouro_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    Stage,
    to_config_dict,
)
from ouro_jax.data.tasks.rows import make_task
from ouro_jax.errors import require_choice
from ouro_jax.experiments.experiment import PROTOCOLS, Experiment, model, seeds_first
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
# Layers, width, heads, MLP width; rows of a batch, row length, warm-up steps, learning rate.
SHAPES = {
    "smoke": (1, 16, 1, 48, 16, 124, 10, 8e-3),
    "small": (1, 32, 2, 128, 16, 124, 100, 8e-3),
    "paper": (2, 128, 2, 352, 192, 512, 1000, 1e-3),
}


def get_config(protocol: str = "small") -> ConfigDict:
    """`smoke`, `small` or `paper`: the model of four loops."""
    require_choice(protocol, PROTOCOLS, "configs/experiments/capo.py protocol")
    layers, width, heads, mlp, rows, length, warmup, rate = SHAPES[protocol]
    task = TASKS[protocol]
    stage = Stage(
        tokens=_tokens(protocol, task),
        sequence_length=length,
        batch_tokens=rows * length,
        num_layers=layers,
        num_loops=4,
        mixture={"biographies": 1.0},
        learning_rate=rate,
        final_learning_rate=rate / 10,
        schedule="cosine",
        warmup_tokens=warmup * rows * length,
        weight_decay=0.02,
        objective="last_loop",
    )
    config = Config(
        name=f"capo_{protocol}",
        model=ModelConfig(
            vocab_size=len(make_task(task).vocabulary), hidden_size=width, intermediate_size=mlp,
            num_layers=layers, num_heads=heads, num_kv_heads=heads, head_dim=width // heads,
            initializer_range=width**-0.5, embedding_initializer_range=1.0,
            dtype="bfloat16" if protocol == "paper" else "float32",
        ),
        stages={"stable_1a": stage},
        data=DataConfig(root="data/experiments", task=task),
        optimizer=OptimizerConfig(beta1=0.9, beta2=0.98, eps=1e-6, clip_norm=1.0),
        checkpoint=CheckpointConfig(every_tokens=stage.tokens),
        # The sets are not named like the source: bits are measured when a model is trained.
        evaluation=EvaluationConfig(every_tokens=stage.tokens),
        logging=LoggingConfig(every_steps=100 if protocol == "small" else 10, tensorboard=False),
    )  # fmt: skip
    return to_config_dict(config)


def get_experiment(protocol: str = "small") -> Experiment:
    """Looped and not, with as many parameters, over numbers of people and sizes of model."""
    if protocol == "paper":
        return Experiment(
            "capo", _paper_runs(), axis="people", main_set="biographies", published=PUBLISHED
        )
    layers, loops, seeds = (1, 2, (0,)) if protocol == "smoke" else (1, 4, (0, 1, 2))
    task, width = TASKS[protocol], SHAPES[protocol][1]
    differences = [
        f"{task['people']:,} people met {task['exposures']} times, not 20,000 to 500,000 met 1,000 "
        "times",
        f"width {width} and one layer, not 1 to 40M parameters",
        "pools of 16 values, two sentences per attribute in a fixed order, and no city of work",
    ]
    runs = seeds_first(model(layers, loops) + model(layers, 1), seeds)
    return Experiment(
        "capo", runs, main_set="biographies", published=PUBLISHED, differences=differences
    )


def _tokens(protocol: str, task: Mapping[str, Any]) -> int:
    """Of the full batches that all exposures make."""
    *_, batch, length, _, _ = SHAPES[protocol]
    rows = make_task(task).num_rows("biographies", length)
    return rows // batch * batch * length


def _paper_runs() -> list[Overrides]:
    people = [
        {"data.task.people": number, "stages.*.tokens": _tokens("paper", task)}
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
