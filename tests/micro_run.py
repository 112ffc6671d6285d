"""Runs of seconds: `configs/tiny.py:smoke` made smaller still, and how the tests start them."""

import dataclasses
import json
import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from ouro_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    LoggingConfig,
    Stage,
    from_config_dict,
    to_dict,
)

ROOT = Path(__file__).parent.parent
MIXTURE = {"code": 0.5, "math": 0.25, "prose": 0.25}
ROW, BATCH = 64, 512


def micro_config(data_root: Path, **changes: Any) -> Config:
    """One layer for 16 steps of 8 rows, two layers for 80 steps, the gate for 8."""
    smoke = from_config_dict(
        runpy.run_path(str(ROOT / "configs" / "tiny.py"))["get_config"]("smoke")
    )
    base = dataclasses.replace(
        smoke.stages["stable_1a"], sequence_length=ROW, batch_tokens=BATCH, num_loops=2,
        mixture=MIXTURE, warmup_tokens=0,
    )  # fmt: skip

    def stage(steps: int, **kwargs: Any) -> Stage:
        return dataclasses.replace(base, tokens=steps * BATCH, **kwargs)

    config = dataclasses.replace(
        smoke,
        model=dataclasses.replace(smoke.model, vocab_size=300),
        stages={
            "stable_1a": stage(16, warmup_tokens=4 * BATCH, batch_ramp=((2 * BATCH, BATCH // 2),)),
            "stable_1b": stage(80, num_layers=2, transition="upcycle_stacked"),
            "gate": stage(8, num_layers=2, objective="gate", weight_decay=0.0),
        },
        data=DataConfig(root=str(data_root), embedded_bytes=60_000),
        checkpoint=CheckpointConfig(every_tokens=8 * BATCH, keep=2),
        evaluation=EvaluationConfig(every_tokens=10**9, rows_per_source=4, num_loops=3),
        logging=LoggingConfig(every_steps=1, tensorboard=False),
    )
    return dataclasses.replace(config, **changes)


def write_config(path: Path, config: Config) -> Path:
    """A config file that makes `config`."""
    path.write_text(
        "import json\n"
        "from ouro_jax.config import from_config_dict, to_config_dict\n\n"
        f"CONFIG = {json.dumps(to_dict(config))!r}\n\n"
        "def get_config():\n"
        "    return to_config_dict(from_config_dict(json.loads(CONFIG)))\n"
    )
    return path


def command(verb: str, *arguments: str, devices: int = 1) -> dict[str, Any]:
    """Arguments of `subprocess.run` for `ouro VERB …` on so many virtual devices."""
    return {
        "args": [sys.executable, "-m", f"ouro_jax.cli.{verb}", *arguments],
        "env": virtual_devices(devices),
        "text": True,
    }


def virtual_devices(devices: int) -> dict[str, str]:
    """The environment of a process with so many CPU devices."""
    flags = f"--xla_force_host_platform_device_count={devices} --xla_cpu_use_fusion_emitters=false"
    return os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}


def free_port() -> int:
    """A port of this machine that nobody uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def ouro(
    verb: str, *arguments: str, devices: int = 1, cwd: Path | None = None
) -> subprocess.CompletedProcess:
    """`ouro VERB …` in a process of its own, its output captured."""
    return subprocess.run(
        **command(verb, *arguments, devices=devices), capture_output=True, cwd=cwd
    )
