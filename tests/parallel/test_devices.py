"""The denominator of MFU, and memory as a device reports it."""

import types

import jax
import pytest

from ouro_jax.parallel import devices
from ouro_jax.parallel.devices import Peak, memory_use, peak_flops


def pretend(monkeypatch, kind: str, platform: str, stats: dict | None = None) -> None:
    """Four devices of a kind that is not here."""
    device = types.SimpleNamespace(
        device_kind=kind, platform=platform, memory_stats=lambda: stats
    )  # fmt: skip
    monkeypatch.setattr(jax, "devices", lambda: [device] * 4)
    monkeypatch.setattr(jax, "local_devices", lambda: [device] * 4)
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    monkeypatch.setattr(devices, "measured_matmul_flops", lambda dtype: 1e12)


def test_a_known_chip_is_taken_from_its_data_sheet(monkeypatch):
    pretend(monkeypatch, "TPU v5 lite", "tpu")
    assert peak_flops("float32") == Peak(4 * 197e12, "TPU v5e data sheet")
    assert peak_flops("float32").mfu(197e12) == 25.0


@pytest.mark.parametrize(("platform", "count"), [("cpu", 1), ("gpu", 4)])
def test_an_unknown_device_is_measured_and_says_so(monkeypatch, platform, count):
    # Virtual CPU devices share the machine; other devices each bring their own arithmetic.
    pretend(monkeypatch, "unheard of", platform)
    assert peak_flops("bfloat16") == Peak(count * 1e12, "measured bfloat16 matmul")


def test_memory_is_as_the_device_says_or_null(monkeypatch):
    assert set(memory_use().values()) == {None}
    stats = {"bytes_in_use": 5, "peak_bytes_in_use": 7, "bytes_limit": 9, "num_allocs": 1}
    pretend(monkeypatch, "TPU v5 lite", "tpu", stats)
    assert memory_use() == {"hbm_bytes_in_use": 5, "hbm_bytes_peak": 7, "hbm_bytes_limit": 9}
