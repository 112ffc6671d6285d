"""Tests run on 8 virtual CPU devices, whatever the machine has."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

from pathlib import Path  # noqa: E402

import pytest  # noqa: E402


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Outputs of the published code: `edge_cases.json` and `set_a/` (shapes in its meta.json)."""
    return Path(__file__).parent / "golden"
