"""Ouro 1.4B through the whole curriculum of the paper (Table 1): 7.7T tokens and the tuning after.

  ouro train --config=configs/ouro_1p4b.py --dry_run
  ouro train --config=configs/ouro_1p4b.py --workdir=runs/ouro_1p4b

Needs: prepared rows of every source in `configs/data/mixtures.py` under `data.root`, with the
49,152-entry SmolLM2 tokenizer. 4.3e23 FLOPs, as `--dry_run` prints: 78 days on 256 v5p chips at
55 % of their 459 TFLOP/s. Expect (paper, Table 7): MMLU 67.35, GSM8K 78.92 at 4 loops.

What the paper leaves open, and what stands here:
  warm-up             8B tokens (2,000 steps of 4M)
  4M → 8M batch       in steps of 1M, 100B tokens each
  AdamW epsilon       1e-8
  weight decay        matrices only
  SFT                 100B tokens (2 epochs of 8.3M examples at 6K tokens), batches of 1M,
                      equation 4 with the β of pre-training, cosine to 0
  gate                1B tokens of the annealing mixture, 1e-4
"""

import runpy
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from ouro_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    GuardConfig,
    ModelConfig,
    Stage,
    to_config_dict,
)

MIXTURES = runpy.run_path(str(Path(__file__).with_name("data") / "mixtures.py"))
MILLION, BILLION, TRILLION = 2**20, 10**9, 10**12
# Eight loops gave loss spikes, says the paper. Their rows are skipped here.
GUARD = GuardConfig(spike_deviations=10.0)


def get_stages(num_layers: int) -> dict[str, Stage]:
    """The paper's stages for a model of `num_layers`; stable_1a is trained with 24."""

    def stage(tokens: int, sequence_length: int, rope_theta: float, mixture: str, **rest) -> Stage:
        usual: dict[str, Any] = {
            "num_layers": num_layers, "num_loops": 4, "batch_tokens": 8 * MILLION,
        }  # fmt: skip
        return Stage(
            tokens=tokens,
            sequence_length=sequence_length,
            rope_theta=rope_theta,
            mixture=MIXTURES[mixture],
            **(usual | rest),
        )

    ramp = (
        (100 * BILLION, 4 * MILLION),
        (200 * BILLION, 5 * MILLION),
        (300 * BILLION, 6 * MILLION),
        (400 * BILLION, 7 * MILLION),
    )
    return {
        "stable_1a": stage(
            3 * TRILLION, 4096, 1e4, "STABLE", num_layers=24, num_loops=8, entropy_weight=0.1,
            batch_ramp=ramp, warmup_tokens=8 * BILLION, learning_rate=3e-4,
        ),
        "stable_1b": stage(3 * TRILLION, 4096, 1e4, "STABLE", learning_rate=3e-4),
        "anneal": stage(
            1400 * BILLION, 16_384, 4e4, "ANNEAL",
            schedule="cosine", learning_rate=3e-4, final_learning_rate=3e-5,
        ),
        "long_context": stage(20 * BILLION, 65_536, 1e6, "LONG_CONTEXT", learning_rate=3e-5),
        "mid_training": stage(
            300 * BILLION, 32_768, 1e6, "MID_TRAINING",
            schedule="cosine", learning_rate=3e-5, final_learning_rate=1e-5,
        ),
        "sft": stage(
            100 * BILLION, 32_768, 1e6, "SFT", batch_tokens=1 * MILLION,
            schedule="cosine", learning_rate=2e-5, reset_optimizer=True,
        ),
        "gate": stage(
            1 * BILLION, 4096, 1e6, "ANNEAL", batch_tokens=1 * MILLION,
            objective="gate", learning_rate=1e-4, weight_decay=0.0,
        ),
    }  # fmt: skip


def get_model(num_layers: int) -> ModelConfig:
    """The released models' shape (paper, Table 2, and their config.json)."""
    return ModelConfig(
        vocab_size=49_152,
        hidden_size=2048,
        intermediate_size=5632,
        num_layers=num_layers,
        num_heads=16,
        num_kv_heads=16,
        head_dim=128,
        num_loops=4,
        max_position_embeddings=65_536,
    )


def get_config() -> ConfigDict:
    """The run that keeps 24 layers."""
    return to_config_dict(
        Config(
            name="ouro_1p4b",
            model=get_model(24),
            stages=get_stages(24),
            data=DataConfig(root="data/ouro", source_tokens=MIXTURES["SOURCE_TOKENS"]),
            checkpoint=CheckpointConfig(every_tokens=100 * BILLION, keep=3),
            guard=GUARD,
        )
    )
