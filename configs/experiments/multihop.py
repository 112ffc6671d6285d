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
Expect 1 ⊗ 4 above .85 and 1 ⊗ 1 below .4 on new questions after 6,000; a run of 1 ⊗ 4 takes 11
minutes of a core, of 1 ⊗ 1 four (`docs/experiments.md`).

`paper` follows section 6.2 and appendix B.3. The paper does not say how profiles and questions are
mixed (here one row in ten holds profiles), which tokens of a question are learnt (all), the weight
decay (0.1), nor which loss a looped model takes (the last loop's).
"""

from ml_collections import ConfigDict

from ouro_jax.config import to_config_dict
from ouro_jax.errors import require_choice
from ouro_jax.experiments.experiment import (
    PROTOCOLS,
    Experiment,
    Shape,
    model,
    seeds_first,
    task_config,
)
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
SHAPES = {
    "smoke": Shape(layers=1, width=32, heads=2, mlp=64, rows=32, length=30,
                   steps=200, warmup_steps=20, learning_rate=4e-3),
    "small": Shape(layers=1, width=96, heads=3, mlp=256, rows=64, length=30,
                   steps=4000, warmup_steps=100, learning_rate=4e-3),
    "paper": Shape(layers=6, width=1024, heads=16, mlp=2816, rows=2048, length=1024,
                   steps=20_000, warmup_steps=1000, learning_rate=5e-4),
}  # fmt: skip
PROFILES = {"smoke": 0.2, "small": 0.2, "paper": 0.1}  # the share of rows with profiles


def get_config(protocol: str = "small") -> ConfigDict:
    """`smoke`, `small` or `paper`: the model of four loops."""
    require_choice(protocol, PROTOCOLS, "configs/experiments/multihop.py protocol")
    config = task_config(
        protocol, TASKS[protocol], SHAPES[protocol],
        {"profiles": PROFILES[protocol], "questions": 1 - PROFILES[protocol]}
    )  # fmt: skip
    return to_config_dict(config)


def get_experiment(protocol: str = "small") -> Experiment:
    """Loops by the number of questions trained on, and the paper's curves."""
    questions = {"smoke": [80], "small": [3000, 6000, 12_000],
                 "paper": [100_000, 120_000, 140_000]}  # fmt: skip
    loops = {"smoke": (1, 2), "small": (1, 2, 4), "paper": (1, 2, 4)}
    models = [run for number in loops[protocol] for run in model(SHAPES[protocol].layers, number)]
    if protocol == "paper":
        models += model(24, 1)  # as many FLOPs as 6 ⊗ 4
    seeds = {"smoke": (0,), "small": (0, 1), "paper": (0, 1, 2, 3)}
    runs = seeds_first(
        product(one_of("data.task.train_questions", questions[protocol]), models), seeds[protocol]
    )
    differences = [] if protocol == "paper" else [
        f"{TASKS[protocol]['entities']} people and {TASKS[protocol]['relations']} relations, not "
        "500 and 20",
        f"width {SHAPES[protocol].width} and one layer, not 1,024 and six",
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
