"""Learning rate × entropy weight on the tiny model: six runs, two minutes on two CPU cores.

  ouro sweep configs/sweeps/tiny_rates.py --workdir=runs/tiny_rates --workers=2

Needs nothing. Expect the entropy weight to decide: with 0.02 the gate sends every token to loop 1
(mean exit depth 1.0 of 4 at the higher rates), the last loop is hardly trained, and at 1e-2 it
needs 3.85 bits per byte after it instead of 3.10.
"""

import dataclasses
import runpy
from pathlib import Path

from ml_collections import ConfigDict

from ouro_jax.config import from_config_dict, to_config_dict
from ouro_jax.experiments.sweep import Sweep, one_of, product

CONFIGS = Path(__file__).parent.parent


def get_sweep() -> Sweep:
    """Every learning rate with every entropy weight."""
    return Sweep(
        base=__file__,
        runs=product(
            one_of("stages.stable_1a.learning_rate", [1e-3, 3e-3, 1e-2]),
            one_of("stages.stable_1a.entropy_weight", [0.02, 0.5]),
        ),
    )


def get_config() -> ConfigDict:
    """The first stage of `configs/tiny.py:smoke`, made longer, with four loops."""
    smoke = from_config_dict(runpy.run_path(str(CONFIGS / "tiny.py"))["get_config"]("smoke"))
    stage = dataclasses.replace(smoke.stages["stable_1a"], tokens=60_000, num_loops=4, num_layers=2)
    return to_config_dict(
        dataclasses.replace(smoke, name="tiny_rates", stages={"stable_1a": stage})
    )
