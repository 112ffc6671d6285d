"""Learning rate × entropy weight on Ouro 1.4B, 20B tokens of stable_1a each: twelve runs.

  ouro sweep configs/sweeps/ouro_1p4b_rates.py --workdir=/shared/rates \\
      --submit='slurm --nodes=4 --gpus=8 --sbatch=--partition=gpu'

Needs what `configs/ouro_1p4b.py` needs. 1.5e21 FLOPs a run: 26 hours on 32 H100s at half of their
peak. The paper trained stable_1a with 3e-4 and β = 0.1, and later stages with β = 0.05.
"""

import dataclasses
import runpy
from pathlib import Path

from ml_collections import ConfigDict

from ouro_jax.config import from_config_dict, to_config_dict
from ouro_jax.experiments.sweep import Sweep, one_of, product

CONFIGS, BILLION = Path(__file__).parent.parent, 10**9


def get_sweep() -> Sweep:
    """Every learning rate with every entropy weight."""
    return Sweep(
        base=__file__,
        runs=product(
            one_of("stages.stable_1a.learning_rate", [1.5e-4, 3e-4, 6e-4, 1.2e-3]),
            one_of("stages.stable_1a.entropy_weight", [0.025, 0.05, 0.1]),
        ),
    )


def get_config() -> ConfigDict:
    """stable_1a alone, short: warm-up over 1B tokens, then constant, in batches of 4M tokens."""
    full = from_config_dict(runpy.run_path(str(CONFIGS / "ouro_1p4b.py"))["get_config"]())
    stage = dataclasses.replace(
        full.stages["stable_1a"], tokens=20 * BILLION, batch_tokens=2**22, batch_ramp=(),
        warmup_tokens=1 * BILLION,
    )  # fmt: skip
    return to_config_dict(
        dataclasses.replace(
            full, name="ouro_1p4b_rates", stages={"stable_1a": stage},
            checkpoint=dataclasses.replace(full.checkpoint, every_tokens=10 * BILLION, keep=1),
        )
    )  # fmt: skip
