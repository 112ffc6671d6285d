"""The whole curriculum in minutes on two CPU cores, on text found on any machine with Python.

  ouro train --config=configs/tiny.py --workdir=runs/tiny              every stage
  ouro train --config=configs/tiny.py:fork --workdir=runs/tiny_fork    from its stable_1a, upcycled
  ouro train --config=configs/tiny.py:smoke --workdir=runs/smoke       upcycled, under a minute
  ouro train --config=configs/tiny.py:long --workdir=runs/long         six times the tokens

Needs nothing: the standard library's source, its docstrings and help topics, generated arithmetic,
and questions made from docstrings are prepared under `data/tiny` first. Expect held-out bits per
byte below those of a bigram model fitted on the same tokens; the run prints both.

The entropy weights are five times the paper's: early losses of loop 1 and loop 4 lie 0.5 nats
apart here, and at β = 0.05 the gate sent everything to loop 1 (mean depth 1.09 of 4) within
200,000 tokens, so that the deeper loops were hardly trained.
"""

import dataclasses

from ml_collections import ConfigDict

from ouro_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    LoggingConfig,
    ModelConfig,
    Stage,
    to_config_dict,
)
from ouro_jax.errors import require_choice

STABLE = {"code": 0.5, "prose": 0.4, "math": 0.1}
ANNEAL = {"code": 0.4, "prose": 0.4, "math": 0.2}
MID_TRAINING = {"code": 0.3, "prose": 0.3, "math": 0.1, "sft": 0.3}

LAYERS = 2
LONG, LONG_GATE = 6, 30  # times the tokens of `full`, whose gate learns next to nothing


def get_config(variant: str = "full") -> ConfigDict:
    """`full`, `fork`, `smoke` or `long`."""
    require_choice(variant, ("full", "fork", "smoke", "long"), "configs/tiny.py variant")
    config = _full()
    if variant == "fork":
        config = _fork(config)
    if variant == "smoke":
        config = _smoke(config)
    if variant == "long":
        config = _long(config)
    return to_config_dict(config)


def _full() -> Config:
    def stage(tokens: int, num_loops: int = 4, sequence_length: int = 128, **kwargs) -> Stage:
        return Stage(
            tokens=tokens,
            sequence_length=sequence_length,
            num_layers=LAYERS,
            num_loops=num_loops,
            **({"batch_tokens": 1024, "entropy_weight": 0.25} | kwargs),
        )

    stages = {
        "stable_1a": stage(
            120_000, num_loops=8, mixture=STABLE, learning_rate=3e-3, warmup_tokens=20_000,
            entropy_weight=0.5, batch_ramp=((30_000, 512),),
        ),
        "stable_1b": stage(350_000, mixture=STABLE, learning_rate=3e-3),
        "anneal": stage(
            350_000, sequence_length=256, rope_theta=40_000.0, mixture=ANNEAL, schedule="cosine",
            learning_rate=3e-3, final_learning_rate=3e-4,
        ),
        "long_context": stage(
            32_000, sequence_length=512, rope_theta=1_000_000.0, mixture=ANNEAL,
            batch_tokens=2048, learning_rate=3e-4,
        ),
        "mid_training": stage(
            100_000, sequence_length=256, rope_theta=1_000_000.0, mixture=MID_TRAINING,
            schedule="cosine", learning_rate=3e-4, final_learning_rate=1e-4,
        ),
        "sft": stage(
            32_000, sequence_length=256, rope_theta=1_000_000.0, mixture={"sft": 1.0},
            schedule="cosine", learning_rate=1e-4, reset_optimizer=True,
        ),
        "gate": stage(
            32_000, sequence_length=256, rope_theta=1_000_000.0, mixture=ANNEAL, objective="gate",
            learning_rate=2e-3, weight_decay=0.0,
        ),
    }  # fmt: skip
    return Config(
        name="tiny",
        model=ModelConfig(
            vocab_size=1024,
            hidden_size=128,
            intermediate_size=352,
            num_layers=LAYERS,
            num_heads=4,
            num_kv_heads=4,
            head_dim=32,
            initializer_range=0.09,
            embedding_initializer_range=1.0,
            max_position_embeddings=512,
            dtype="float32",
        ),
        stages=stages,
        data=DataConfig(root="data/tiny", embedded_bytes=3_000_000),
        checkpoint=CheckpointConfig(every_minutes=1.0, every_tokens=1_000_000, keep=2),
        evaluation=EvaluationConfig(every_tokens=300_000, rows_per_source=48, ngram_baselines=True),
        logging=LoggingConfig(every_steps=10),
    )


def _fork(config: Config) -> Config:
    """Twice the layers from the full run's stable_1a, and a short stable_1b."""
    stable_1b = dataclasses.replace(
        config.stages["stable_1b"], tokens=60_000, num_layers=2 * LAYERS,
        transition="upcycle_stacked",
    )  # fmt: skip
    return dataclasses.replace(
        config,
        name="tiny_fork",
        model=dataclasses.replace(config.model, num_layers=2 * LAYERS),
        # Its rows go on where stable_1a stopped, so that stage stays in the config.
        stages={"stable_1a": config.stages["stable_1a"], "stable_1b": stable_1b},
        first_stage="stable_1b",
        init_from="runs/tiny/stable_1a",
    )


def _smoke(config: Config) -> Config:
    """Every stage for a few steps, upcycled from one layer to two after stable_1a."""

    def shorten(name: str, stage: Stage) -> Stage:
        length = 128 if name == "long_context" else 64
        return dataclasses.replace(
            stage, tokens=8 * 512, sequence_length=length, batch_tokens=8 * length,
            warmup_tokens=1024 if name == "stable_1a" else 0,
            batch_ramp=(),
            num_layers=1 if name == "stable_1a" else 2,
            transition="upcycle_stacked" if name == "stable_1b" else "none",
        )  # fmt: skip

    return dataclasses.replace(
        config,
        name="tiny_smoke",
        model=dataclasses.replace(
            config.model, vocab_size=512, hidden_size=32, intermediate_size=96, num_heads=2,
            num_kv_heads=2, head_dim=16, num_layers=2,
        ),
        stages={name: shorten(name, stage) for name, stage in config.stages.items()},
        data=DataConfig(root="data/tiny_smoke", embedded_bytes=150_000),
        checkpoint=CheckpointConfig(every_tokens=2048, keep=2),
        evaluation=EvaluationConfig(every_tokens=10**9, rows_per_source=16, ngram_baselines=True),
        logging=LoggingConfig(every_steps=1),
    )  # fmt: skip


def _long(config: Config) -> Config:
    """Every stage with more tokens, from all of the library: enough that depth pays."""

    def lengthen(name: str, stage: Stage) -> Stage:
        factor = LONG_GATE if name == "gate" else LONG
        return dataclasses.replace(
            stage, tokens=factor * stage.tokens, warmup_tokens=factor * stage.warmup_tokens,
            batch_tokens=2048, batch_ramp=(),
        )  # fmt: skip

    return dataclasses.replace(
        config,
        name="tiny_long",
        stages={name: lengthen(name, stage) for name, stage in config.stages.items()},
        data=DataConfig(root="data/tiny_long", embedded_bytes=30_000_000),
        checkpoint=CheckpointConfig(every_minutes=10.0, every_tokens=10**9, keep=2),
        evaluation=dataclasses.replace(config.evaluation, every_tokens=1_000_000),
        logging=LoggingConfig(every_steps=50),
    )
