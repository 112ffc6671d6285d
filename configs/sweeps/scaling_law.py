"""Four sizes × three numbers of loops, for the scaling law of Appendix D: twelve runs.

  ouro sweep configs/sweeps/scaling_law.py --workdir=runs/scaling_law --workers=2

  ouro experiment scaling_law --checkpoint=runs/scaling_law --workdir=runs/law

Needs nothing: the text is what `configs/tiny.py` uses. 91,000 to 665,000 parameters, 200,000 tokens
a run; five minutes on two cores. The paper has 53M to 1.36B, T = 1, 2, 4, 8 and 20B tokens.

It shows that the fit works, and no law: expect R² 0.976 for the total loss, 0.92 on sizes held out,
0 and less on tokens held out (the first half says little of the rest), 0.98 and 0.95 step-wise.
Loops do not pay so early: the first loop has the lowest loss, the fitted C is 0, and with more of
them more bits are needed (2.11, 2.14, 2.31 per byte for T = 1, 2, 4 at the largest size).
"""

import dataclasses
import runpy
from pathlib import Path

from ml_collections import ConfigDict

from ouro_jax.config import from_config_dict, to_config_dict
from ouro_jax.experiments.sweep import Sweep, one_of, product, zipped

CONFIGS = Path(__file__).parent.parent
WIDTHS = (32, 64, 96, 128)


def get_sweep() -> Sweep:
    """Every width with every number of loops; a wider model takes a smaller learning rate."""
    sizes = zipped(
        one_of("model.hidden_size", WIDTHS),
        one_of("model.intermediate_size", [11 * width // 4 for width in WIDTHS]),
        one_of("model.num_heads", [width // 32 for width in WIDTHS]),
        one_of("model.num_kv_heads", [width // 32 for width in WIDTHS]),
        one_of("stages.stable_1a.learning_rate", [0.3 / width for width in WIDTHS]),
    )
    return Sweep(
        base=__file__, runs=product(sizes, one_of("stages.stable_1a.num_loops", [1, 2, 4]))
    )


def get_config() -> ConfigDict:
    """The first stage of `configs/tiny.py` alone, at a constant rate."""
    tiny = from_config_dict(runpy.run_path(str(CONFIGS / "tiny.py"))["get_config"]())
    stage = dataclasses.replace(
        tiny.stages["stable_1a"], tokens=200_000, num_loops=4, entropy_weight=0.25, batch_ramp=(),
        warmup_tokens=20_000,
    )  # fmt: skip
    return to_config_dict(
        dataclasses.replace(
            tiny, name="scaling_law", stages={"stable_1a": stage},
            evaluation=dataclasses.replace(tiny.evaluation, num_loops=4, ngram_baselines=False),
            logging=dataclasses.replace(tiny.logging, every_steps=2, tensorboard=False),
        )
    )  # fmt: skip
