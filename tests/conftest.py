"""Tests run on 8 virtual CPU devices, whatever the machine has.

Compiling takes most of their time: what is compiled once is kept for the session.
"""

import os
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

# Of this session and all its workers, whose environment is that of the process that starts them.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _PROGRAMS = tempfile.TemporaryDirectory(prefix="programs-", ignore_cleanup_errors=True)
    os.environ["TEST_PROGRAMS"] = _PROGRAMS.name

from pathlib import Path  # noqa: E402

import jax  # noqa: E402
import pytest  # noqa: E402
from jax.experimental.compilation_cache import compilation_cache  # noqa: E402

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


@pytest.fixture(scope="module", autouse=True)
def kept_programs():
    """What a module compiles is kept and not optimized; for tests of what runs do, not how fast."""
    changes = {
        "jax_compilation_cache_dir": os.environ["TEST_PROGRAMS"],
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_disable_most_optimizations": True,
    }
    before = {name: jax.config.values[name] for name in changes}
    for name, value in changes.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Outputs of the published code: `edge_cases.json` and `set_a/` (shapes in its meta.json)."""
    return Path(__file__).parent / "golden"
