"""What a card of `configs/experiments/` says of an experiment beside its config.

An experiment is a sweep of `ouro train` over one base config whose models are evaluated when they
are trained: looped k ⊗ T beside k ⊗ 1 with as many parameters and k·T ⊗ 1 with as many FLOPs.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

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
)
from ouro_jax.data.tasks.rows import make_task
from ouro_jax.experiments.sweep import Overrides, one_of

PROTOCOLS = ("smoke", "small", "paper")


@dataclass(frozen=True)
class Experiment:
    """What `get_experiment(protocol)` of a card returns.

    `runs` override keys of the card's config, as in a sweep. Models are evaluated after `loops`
    loops. `axis` is the label of the override that is drawn along x where there is one, as the
    number of questions trained on; `main_set` is the held-out set that is drawn, the first if none
    is named. `published` are rows of the paper's table, printed beside ours;
    `differences` say how the protocol differs from the paper's.
    """

    name: str
    runs: Sequence[Overrides]
    loops: Sequence[int] = (1, 2, 3, 4, 5, 6, 7, 8)
    axis: str = ""
    main_set: str = ""
    published: Sequence[Mapping[str, Any]] = field(default_factory=tuple)
    differences: Sequence[str] = ()


@dataclass(frozen=True)
class Shape:
    """The model of a protocol and how long it trains: what differs from card to card.

    `mlp` is the width of the MLP, `rows` those of a batch, `length` their tokens; the learning rate
    falls to a tenth. `microbatch_rows` 0 leaves them to the layout.
    """

    layers: int
    width: int
    heads: int
    mlp: int
    rows: int
    length: int
    steps: int
    warmup_steps: int
    learning_rate: float
    microbatch_rows: int = 0


def task_config(
    protocol: str,
    task: Mapping[str, Any],
    shape: Shape,
    mixture: Mapping[str, float],
    weight_decay: float = 0.1,
    evaluations: int = 12,
) -> Config:
    """The config of a task's protocol: one stage of four loops on the last loop's loss.

    The optimizer is that of the paper's experiments (appendix B): AdamW with betas 0.9 and 0.98,
    eps 1e-6, clipping at 1, warm-up, cosine to a tenth. `evaluations` is how often held-out loss is
    measured on the way.
    """
    batch_tokens, dtype = (
        shape.rows * shape.length,
        "bfloat16" if protocol == "paper" else "float32",
    )
    stage = Stage(
        tokens=shape.steps * batch_tokens, sequence_length=shape.length, batch_tokens=batch_tokens,
        num_layers=shape.layers, num_loops=4, mixture=mixture,
        learning_rate=shape.learning_rate, final_learning_rate=shape.learning_rate / 10,
        schedule="cosine", warmup_tokens=shape.warmup_steps * batch_tokens,
        weight_decay=weight_decay, objective="last_loop",
    )  # fmt: skip
    model = ModelConfig(
        vocab_size=len(make_task(task).vocabulary), hidden_size=shape.width,
        intermediate_size=shape.mlp, num_layers=shape.layers, num_heads=shape.heads,
        num_kv_heads=shape.heads, head_dim=shape.width // shape.heads,
        initializer_range=shape.width**-0.5, embedding_initializer_range=1.0, dtype=dtype,
    )  # fmt: skip
    return Config(
        name=f"{task['name']}_{protocol}",
        model=model,
        stages={"stable_1a": stage},
        data=DataConfig(root="data/experiments", task=task),
        layout=LayoutConfig(microbatch_rows=shape.microbatch_rows),
        optimizer=OptimizerConfig(beta1=0.9, beta2=0.98, eps=1e-6, clip_norm=1.0),
        checkpoint=CheckpointConfig(every_tokens=stage.tokens),
        evaluation=EvaluationConfig(every_tokens=stage.tokens // evaluations),
        logging=LoggingConfig(every_steps=100 if protocol == "small" else 10, tensorboard=False),
    )


def model(layers: int, loops: int) -> list[Overrides]:
    """The overrides that make every stage train `layers` layers applied `loops` times."""
    return [{"stages.*.num_layers": layers, "stages.*.num_loops": loops}]


def looped_and_baselines(layers: int, loops: int) -> list[Overrides]:
    """k ⊗ T, and k ⊗ 1 (as many parameters) and k·T ⊗ 1 (as many FLOPs) beside it."""
    return model(layers, loops) + model(layers, 1) + model(layers * loops, 1)


def rates(peaks: Iterable[float]) -> list[Overrides]:
    """A run for each learning rate; every stage falls to a tenth of it."""
    return [{"stages.*.learning_rate": peak, "stages.*.final_learning_rate": peak / 10}
            for peak in peaks]  # fmt: skip


def seeds_first(models: Sequence[Overrides], seeds: Iterable[int]) -> list[Overrides]:
    """Every model with every seed; all models of the first seed come first."""
    return [run | seed for seed in one_of("seed", seeds) for run in models]
