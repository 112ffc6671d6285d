"""One tiny embedded build, shared by the tests of the data room."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer

from ouro_jax.data.embedded import build_embedded
from ouro_jax.data.tokenizer import load_tokenizer

VOCAB_SIZE = 300
SETTINGS = {
    "vocab_size": VOCAB_SIZE,
    "sequence_lengths": {"code": [32, 64], "prose": [64], "math": [64], "sft": [64]},
    "max_bytes_per_source": 100_000,
}


@pytest.fixture(scope="session")
def embedded_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root with four sources of rows of 64 tokens."""
    return build_embedded(tmp_path_factory.mktemp("data"), **SETTINGS)


@pytest.fixture(scope="session")
def tokenizer(embedded_root: Path) -> Tokenizer:
    """The tokenizer of `embedded_root`, 300 entries."""
    return load_tokenizer(embedded_root / "tokenizer.json")
