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

from ouro_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    LayoutConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    Stage,
    to_config_dict,
)
from ouro_jax.data.tasks.rows import make_task
from ouro_jax.errors import require_choice
from ouro_jax.experiments.experiment import (
    PROTOCOLS,
    Experiment,
    looped_and_baselines,
    rates,
    seeds_first,
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
# Layers, width, heads, MLP width; rows of a batch, row length, steps, warm-up steps, learning rate.
SHAPES = {
    "smoke": (1, 32, 2, 64, 64, 48, 200, 20, 4e-3),
    "small": (1, 96, 3, 256, 64, 128, 3000, 100, 3e-3),
    "paper": (3, 768, 12, 2048, 128, 2048, 87_500, 1000, 1e-3),
}
PAPER_STEPS = [
    (DEPO1, {225: 87_500, 300: 100_000, 375: 112_500}),
    (DEPO2, {75: 100_000, 100: 125_000, 125: 150_000}),
]


def get_config(protocol: str = "small") -> ConfigDict:
    """`smoke`, `small` or `paper`: the looped model; `get_experiment` changes layers and loops."""
    require_choice(protocol, PROTOCOLS, "configs/experiments/depo.py protocol")
    layers, width, heads, mlp, rows, length, steps, warmup, rate = SHAPES[protocol]
    task = TASKS[protocol]
    stage = Stage(
        tokens=steps * rows * length,
        sequence_length=length,
        batch_tokens=rows * length,
        num_layers=layers,
        num_loops=4,
        mixture={"depo": 1.0},
        learning_rate=rate,
        final_learning_rate=rate / 10,
        schedule="cosine",
        warmup_tokens=warmup * rows * length,
        weight_decay=0.03,
        objective="last_loop",
    )
    config = Config(
        name=f"depo_{protocol}",
        model=ModelConfig(
            vocab_size=len(make_task(task).vocabulary), hidden_size=width, intermediate_size=mlp,
            num_layers=layers, num_heads=heads, num_kv_heads=heads, head_dim=width // heads,
            initializer_range=width**-0.5, embedding_initializer_range=1.0,
            dtype="bfloat16" if protocol == "paper" else "float32",
        ),
        stages={"stable_1a": stage},
        data=DataConfig(root="data/experiments", task=task),
        # About a thousand tokens at a time stay in a CPU's cache, as in Mano.
        layout=LayoutConfig(microbatch_rows=8 if protocol == "small" else 0),
        optimizer=OptimizerConfig(beta1=0.9, beta2=0.98, eps=1e-6, clip_norm=1.0),
        checkpoint=CheckpointConfig(every_tokens=stage.tokens),
        evaluation=EvaluationConfig(every_tokens=stage.tokens // 12),
        logging=LoggingConfig(every_steps=100 if protocol == "small" else 10, tensorboard=False),
    )  # fmt: skip
    return to_config_dict(config)


def get_experiment(protocol: str = "small") -> Experiment:
    """The models of a protocol and their seeds. The paper's scores are in pictures only."""
    layers, rate = SHAPES[protocol][0], SHAPES[protocol][-1]
    if protocol == "paper":
        return Experiment("depo", _paper_runs(), axis="max_nodes")
    loops, seeds = (2, (0,)) if protocol == "smoke" else (4, (0, 1, 2))
    task = TASKS[protocol]
    differences = [
        f"cycles of up to {task['max_nodes']} nodes with names of one token and up to "
        f"{task['max_hops']} hops, not 75 to 375 nodes and 8 or 16 hops",
        f"width {SHAPES[protocol][1]} and one layer, not 768 and 3",
        "one learning rate for all models, not the best of four",
    ]
    runs = seeds_first(product(rates([rate]), looped_and_baselines(layers, loops)), seeds)
    return Experiment("depo", runs, differences=differences)


def _paper_runs() -> list[Overrides]:
    _, _, _, _, rows, length, _, _, _ = SHAPES["paper"]
    problems = [
        {
            "data.task.max_nodes": nodes,
            **{f"data.task.{key}": value for key, value in variant.items()},
            "model.vocab_size": len(make_task({"name": "depo", "max_nodes": nodes, **variant})
                                    .vocabulary),
            "stages.*.tokens": steps * rows * length,
        }
        for variant, sizes in PAPER_STEPS
        for nodes, steps in sizes.items()
    ]  # fmt: skip
    return product(
        problems, rates([3e-4, 5e-4, 1e-3, 2e-3]), seeds_first(looped_and_baselines(3, 4), (0,))
    )
