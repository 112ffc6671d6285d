"""What a card of `configs/experiments/` says of an experiment beside its config.

An experiment is a sweep of `ouro train` over one base config whose models are evaluated when they
are trained: looped k ⊗ T beside k ⊗ 1 with as many parameters and k·T ⊗ 1 with as many FLOPs.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

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
