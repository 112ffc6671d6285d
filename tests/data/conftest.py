"""One tiny embedded build, shared by the tests of the data room."""

from pathlib import Path
from typing import Any

import hypothesis
import pytest
from tokenizers import Tokenizer

from ouro_jax.data.embedded import build_embedded
from ouro_jax.data.tokenizer import load_tokenizer

# A slow example on a busy machine is no failure.
hypothesis.settings.register_profile("data", deadline=None)
hypothesis.settings.load_profile("data")


@pytest.fixture(scope="session")
def embedded_settings() -> dict[str, Any]:
    """The arguments that `embedded_root` was built with: a vocabulary of 300, rows of 64."""
    return {
        "vocab_size": 300,
        "sequence_lengths": {"code": [32, 64], "prose": [64], "math": [64], "sft": [64]},
        "max_bytes_per_source": 100_000,
    }


@pytest.fixture(scope="session")
def embedded_root(
    tmp_path_factory: pytest.TempPathFactory, embedded_settings: dict[str, Any]
) -> Path:
    """A data root with four sources of rows of 64 tokens."""
    return build_embedded(tmp_path_factory.mktemp("data"), **embedded_settings)


@pytest.fixture(scope="session")
def tokenizer(embedded_root: Path) -> Tokenizer:
    """The tokenizer of `embedded_root`."""
    return load_tokenizer(embedded_root / "tokenizer.json")
