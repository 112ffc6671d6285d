"""Real processes over loopback train as one device does: 2 × 4 and 4 × 2 virtual devices.

Their meshes together use every axis, and every one crosses processes somewhere.
"""

import dataclasses
import functools
import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest
from micro_run import BATCH, ROOT, free_port, micro_config, ouro, virtual_devices, write_config
from prepared import write_rows
from train_hosts import ten_steps

from ouro_jax.config import (
    Config,
    DataConfig,
    LoggingConfig,
    MeshConfig,
    ModelConfig,
    Stage,
    to_dict,
)
from ouro_jax.data.rows import Row
from ouro_jax.data.tokenizer import tokenizer_hash
from ouro_jax.parallel.mesh import make_mesh
from ouro_jax.training.run_log import read_log

LENGTH, LONG, ROWS, VOCAB = 16, 64, 16, 64
# (stage, sizes of the axes slice, data, fsdp, tensor, context; layout) by number of processes.
RUNS = {
    2: [
        ("stable_1a", (2, 1, 2, 2, 1), "once"),  # slice crosses processes
        ("stable_1a", (1, 1, 2, 2, 2), "each_loop"),  # fsdp
        ("long_context", (1, 1, 1, 2, 4), "each_loop"),  # tensor
    ],
    4: [
        ("stable_1a", (1, 2, 1, 4, 1), "once"),  # data and tensor
        ("long_context", (1, 1, 2, 1, 4), "once"),  # fsdp and context
    ],
}


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Config:
    """Packed rows of one to four documents, of two lengths, and a model of two layers and loops."""
    root = tmp_path_factory.mktemp("rows")
    (root / "tokenizer.json").write_text("{}")
    rng = np.random.default_rng(0)
    for length in (LENGTH, LONG):
        rows = [
            Row(
                rng.integers(0, VOCAB, length),
                rng.integers(1, length // 4, rng.integers(1, 5)).astype(np.uint32),
            )
            for _ in range(200)
        ]
        write_rows(
            root / "code" / f"train-{length}", rows, sequence_length=length, vocab_size=VOCAB,
            tokenizer_hash=tokenizer_hash(root / "tokenizer.json"), source="code",
        )  # fmt: skip
    stages = {
        name: Stage(
            tokens=10 * ROWS * length, sequence_length=length, batch_tokens=ROWS * length,
            num_layers=2, num_loops=2, mixture={"code": 1.0}, learning_rate=1e-3,
        )
        for name, length in (("stable_1a", LENGTH), ("long_context", LONG))
    }  # fmt: skip
    model = ModelConfig(VOCAB, 32, 48, 2, 4, 4, 8, dtype="float32")
    return Config("hosts", model, stages, data=DataConfig(root=str(root)))


@pytest.fixture(scope="module")
def one_device(config):
    """What one device makes of a stage."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    return functools.cache(lambda stage: ten_steps(config, stage, mesh, "each_loop"))


def start_together(hosts: int, arguments: Callable[[int, str], list[str]]) -> list[str]:
    """What each of `hosts` processes of 8 devices together prints; all must succeed."""
    address, environment = f"127.0.0.1:{free_port()}", virtual_devices(8 // hosts)
    # Compiling takes most of the time, half of it optimizing what runs for a second.
    environment["XLA_FLAGS"] += " --xla_backend_optimization_level=0"
    processes = [
        subprocess.Popen(
            [sys.executable, *arguments(host, address)], env=environment,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for host in range(hosts)
    ]  # fmt: skip
    with ThreadPoolExecutor(hosts) as readers:
        printed = list(readers.map(lambda process: process.communicate(timeout=300), processes))
    assert not any(process.returncode for process in processes), [err for _, err in printed]
    return [out for out, _ in printed]


@pytest.mark.parametrize("hosts", RUNS)
def test_ten_steps_of_many_processes_are_those_of_one_device(config, one_device, hosts, tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(to_dict(config)))
    task = {"hosts": hosts, "runs": RUNS[hosts], "config": str(file), "output": str(tmp_path)}
    script = str(ROOT / "tests" / "train_hosts.py")
    start_together(
        hosts, lambda host, address: [script, json.dumps(task | {"host": host, "address": address})]
    )
    for number, (stage, *_) in enumerate(RUNS[hosts]):
        expected, found = one_device(stage), np.load(tmp_path / f"{number}.npz")
        np.testing.assert_allclose(found["losses"], expected["losses"], rtol=1e-5)
        # Without the norms, whose ones would hide differences.
        names = [name for name in expected if name != "losses" and "norm" not in name]
        ours, theirs = (np.concatenate([of[name].ravel() for name in names])
                        for of in (found, expected))  # fmt: skip
        assert np.linalg.norm(ours - theirs) < 1e-5 * np.linalg.norm(theirs), RUNS[hosts][number]


def test_a_run_goes_on_with_another_number_of_processes(tmp_path):
    """2 × 4 devices, then 1 × 8, then 4 × 2, as one device that is never stopped."""
    config = micro_config(tmp_path / "data", logging=LoggingConfig(1, tensorboard=False))
    stage = dataclasses.replace(config.stages["stable_1a"], batch_ramp=(), warmup_tokens=BATCH)

    def file_of(steps: int, **mesh: int) -> Path:
        stages = {"stable_1a": dataclasses.replace(stage, tokens=steps * BATCH)}
        changed = dataclasses.replace(config, stages=stages, mesh=MeshConfig(**mesh))
        return write_config(tmp_path / "config.py", changed)

    def go_on(hosts: int, file: Path) -> list[str]:
        return start_together(hosts, lambda host, address: [
            "-m", "ouro_jax.cli.train", f"--config={file}", f"--workdir={tmp_path / 'stopped'}",
            "--json", f"--coordinator={address}", f"--num_processes={hosts}",
            f"--process_id={host}", "--allow_config_change=stages.stable_1a.tokens",
        ])  # fmt: skip

    go_on(2, file_of(3, fsdp=4, tensor=2))
    go_on(1, file_of(6, fsdp=2, context=2))
    first, *others = go_on(4, file_of(10, fsdp=2, tensor=2, context=2))
    assert json.loads(first.splitlines()[-1])["step"] == 10
    # The others print what Gloo says, in lines that it tears, and nothing of ours.
    ours = "stable_1a", "held-out", "step"
    assert all(word in first for word in ours)
    assert not any(word in text for word in ours for text in others), others
    result = ouro("train", f"--config={file_of(10)}", f"--workdir={tmp_path / 'whole'}")
    assert result.returncode == 0, result.stderr
    records = {name: read_log(tmp_path / name) for name in ("stopped", "whole")}
    losses = {
        name: [record["loss"] for record in log if record["kind"] == "train"]
        for name, log in records.items()
    }
    assert len(losses["stopped"]) == 10
    np.testing.assert_allclose(losses["stopped"], losses["whole"], rtol=1e-5)
