"""Ouro 2.6B: forks off the 1.4B run after stable_1a, upcycled to 48 layers (paper, 4.3.1).

  ouro train --config=configs/ouro_2p6b.py --dry_run
  ouro train --config=configs/ouro_2p6b.py --workdir=runs/ouro_2p6b \\
      --config.init_from=runs/ouro_1p4b/stable_1a

Needs: what `configs/ouro_1p4b.py` needs, and its finished stable_1a. About 1.9 × its time after
the fork. Expect (paper, Table 7): MMLU 74.60, GSM8K 81.58 at 4 loops.

The order of the duplicated layers is open in the paper. Stacked, 1 … 24, 1 … 24, stands here: at
4 loops it computes what 24 layers computed at 8, but for the final norm between the halves.
"""

import dataclasses
import runpy
from pathlib import Path

from ml_collections import ConfigDict

from ouro_jax.config import CheckpointConfig, Config, DataConfig, to_config_dict

BASE = runpy.run_path(str(Path(__file__).with_name("ouro_1p4b.py")))


def get_config() -> ConfigDict:
    """The run from the fork on."""
    stages = BASE["get_stages"](48)
    stages["stable_1b"] = dataclasses.replace(stages["stable_1b"], transition="upcycle_stacked")
    return to_config_dict(
        Config(
            name="ouro_2p6b",
            model=BASE["get_model"](48),
            stages=stages,
            first_stage="stable_1b",
            init_from="runs/ouro_1p4b/stable_1a",
            data=DataConfig(root="data/ouro", source_tokens=BASE["MIXTURES"]["SOURCE_TOKENS"]),
            checkpoint=CheckpointConfig(every_tokens=100 * BASE["BILLION"], keep=3),
            guard=BASE["GUARD"],
        )
    )
