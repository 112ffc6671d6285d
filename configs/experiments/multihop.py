"""Three-hop questions over stored facts: more loops need fewer questions to learn to combine them.

  ouro experiment multihop --protocol=smoke --workdir=runs/multihop_smoke
  ouro experiment multihop --protocol=small --workdir=runs/multihop
  ouro experiment multihop --protocol=paper --workdir=runs/multihop_paper    48 runs of 42B tokens

Needs nothing: people, facts and questions are invented, and those evaluated are kept out of
training. Sets: `questions` is what counts; `facts` says whether the facts are stored, and
`seen_questions` what was learnt by heart.

`small` has 17,280 questions over 360 facts: many relations and few people, since questions must
outnumber facts by far (15 to 1 in the paper at 120,000). With 2,000 questions over 288 facts 1 ⊗ 4
learnt them by heart: its loss on new ones rose from 1.96 to 2.18 nats (steps 166 to 332) while the
loss in training fell to 0.50.
Its effect is not measured yet.

`paper` follows section 6.2 and appendix B.3. The paper does not say how profiles and questions are
mixed (here one row in ten holds profiles), which tokens of a question are learnt (all), the weight
decay (0.1), nor which loss a looped model takes (the last loop's).
"""

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
from ouro_jax.experiments.sweep import one_of, product

TASKS = {
    "smoke": {"name": "multihop", "entities": 20, "layers": 4, "relations": 3, "hops": 3,
              "train_questions": 80, "heldout_problems": 20, "facts_per_profile": 2,
              "loss_on": "answer"},
    "small": {"name": "multihop", "entities": 40, "layers": 4, "relations": 12, "hops": 3,
              "train_questions": 12_000, "heldout_problems": 500, "facts_per_profile": 4,
              "loss_on": "answer"},
    "paper": {"name": "multihop", "train_questions": 120_000},
}  # fmt: skip
# Layers, width, heads, MLP width; rows of a batch, row length, steps, warm-up steps, learning
# rate, and the share of rows with profiles.
SHAPES = {
    "smoke": (1, 32, 2, 64, 32, 30, 200, 20, 4e-3, 0.2),
    "small": (1, 96, 3, 256, 64, 30, 4000, 100, 4e-3, 0.2),
    "paper": (6, 1024, 16, 2816, 2048, 1024, 20_000, 1000, 5e-4, 0.1),
}


def get_config(protocol: str = "small") -> ConfigDict:
    """`smoke`, `small` or `paper`: the model of four loops."""
    require_choice(protocol, PROTOCOLS, "configs/experiments/multihop.py protocol")
    layers, width, heads, mlp, rows, length, steps, warmup, rate, profiles = SHAPES[protocol]
    task = TASKS[protocol]
    stage = Stage(
        tokens=steps * rows * length,
        sequence_length=length,
        batch_tokens=rows * length,
        num_layers=layers,
        num_loops=4,
        mixture={"profiles": profiles, "questions": 1 - profiles},
        learning_rate=rate,
        final_learning_rate=rate / 10,
        schedule="cosine",
        warmup_tokens=warmup * rows * length,
        objective="last_loop",
    )
    config = Config(
        name=f"multihop_{protocol}",
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
        evaluation=EvaluationConfig(every_tokens=stage.tokens // 12),
        logging=LoggingConfig(every_steps=100 if protocol == "small" else 10, tensorboard=False),
    )  # fmt: skip
    return to_config_dict(config)


def get_experiment(protocol: str = "small") -> Experiment:
    """Loops by the number of questions trained on, and the paper's curves."""
    questions = {"smoke": [80], "small": [3000, 6000, 12_000],
                 "paper": [100_000, 120_000, 140_000]}  # fmt: skip
    loops = {"smoke": (1, 2), "small": (1, 2, 4), "paper": (1, 2, 4)}
    models = [run for number in loops[protocol] for run in model(SHAPES[protocol][0], number)]
    if protocol == "paper":
        models += model(24, 1)  # as many FLOPs as 6 ⊗ 4
    seeds = {"smoke": (0,), "small": (0, 1), "paper": (0, 1, 2, 3)}
    runs = seeds_first(
        product(one_of("data.task.train_questions", questions[protocol]), models), seeds[protocol]
    )
    differences = [] if protocol == "paper" else [
        f"{TASKS[protocol]['entities']} people and {TASKS[protocol]['relations']} relations, not "
        "500 and 20",
        f"width {SHAPES[protocol][1]} and one layer, not 1,024 and six",
        "loss on the answer of a question, not on all tokens",
    ]  # fmt: skip
    return Experiment(
        "multihop", runs, axis="train_questions", published=PUBLISHED, differences=differences
    )


# Paper, Figures 7 and 11, read off the curves: accuracy in percent after 20,000 steps.
PUBLISHED = [
    {"layers": layers, "loops": loops, "train_questions": questions, "exact": percent / 100}
    for layers, loops, percents in (
        (6, 1, (5.8, 14, 27)), (6, 2, (10, 32.5, 97)), (6, 4, (16.5, 61.5, 99.5)),
    )
    for questions, percent in zip((100_000, 120_000, 140_000), percents, strict=True)
]  # fmt: skip
