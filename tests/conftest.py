"""Tests run on 8 virtual CPU devices, whatever the machine has.

Compiling takes most of their time: what is compiled once is kept for the session.
"""

import os
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
# Without its newer emitters XLA compiles the same program for CPU in 2.5 to 3.3 s instead of 8.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8 --xla_cpu_use_fusion_emitters=false"
)

# Of this session: its workers and all processes that tests start have this environment. Nothing
# is optimized, as tests are of what programs do and not of how fast.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _PROGRAMS = tempfile.TemporaryDirectory(prefix="programs-", ignore_cleanup_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _PROGRAMS.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"

from pathlib import Path  # noqa: E402

import pytest  # noqa: E402

# Those of a minute and more come first, the longest before all, so that none is left for the end.
LONG = (
    "planning/test_fit_table.py", "training/test_multihost.py", "training/test_preemption.py",
    "training/test_recovery.py", "training/test_trainer.py", "launch/test_real_runs.py",
    "cli/test_plan.py", "training/test_program.py", "planning/test_hlo.py",
)  # fmt: skip


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Files go to workers whole, as they share what they prepared, in the order below."""
    from xdist.scheduler import LoadFileScheduling

    config.option.loadscopereorder = False
    return LoadFileScheduling(config, log)


def pytest_collection_modifyitems(items):
    """Puts long files first."""
    places = {Path(__file__).parent / name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Outputs of the published code: `edge_cases.json` and `set_a/` (shapes in its meta.json)."""
    return Path(__file__).parent / "golden"
