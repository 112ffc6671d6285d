"""Four sizes × three numbers of loops, for the scaling law of Appendix D: twelve runs.

  ouro sweep configs/sweeps/scaling_law.py --workdir=runs/scaling_law --workers=2

Needs nothing: the text is what `configs/tiny.py` uses. One pass over it, 200,000 tokens a run. The
paper has 53M to 1.36B parameters, T = 1, 2, 4, 8 and 20B tokens: at this size the embedding is most
of the model, and what the fit says holds for this size.
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
