"""ouro_jax: train, study and serve looped language models (Ouro, arXiv 2510.25741) in JAX."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ouro_jax.config import ModelConfig
    from ouro_jax.inference.generate import generate
    from ouro_jax.interop.huggingface import load_huggingface, save_huggingface
    from ouro_jax.model.exit import exit_distribution
    from ouro_jax.model.loop_lm import LoopLM, LoopOutput
    from ouro_jax.objectives.cross_entropy import cross_entropy
    from ouro_jax.objectives.losses import expected_loss, gate_loss

_HOMES = {
    "ModelConfig": "ouro_jax.config",
    "LoopLM": "ouro_jax.model.loop_lm",
    "LoopOutput": "ouro_jax.model.loop_lm",
    "exit_distribution": "ouro_jax.model.exit",
    "cross_entropy": "ouro_jax.objectives.cross_entropy",
    "expected_loss": "ouro_jax.objectives.losses",
    "gate_loss": "ouro_jax.objectives.losses",
    "load_huggingface": "ouro_jax.interop.huggingface",
    "save_huggingface": "ouro_jax.interop.huggingface",
    "generate": "ouro_jax.inference.generate",
}

__all__ = [
    "LoopLM",
    "LoopOutput",
    "ModelConfig",
    "cross_entropy",
    "exit_distribution",
    "expected_loss",
    "gate_loss",
    "generate",
    "load_huggingface",
    "save_huggingface",
]


def __getattr__(name: str) -> Any:
    # Loaded on first use: a wrong flag should not wait for jax to import.
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'ouro_jax' has no attribute {name!r}")
