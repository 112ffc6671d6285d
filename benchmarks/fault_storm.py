"""Kills a run over and over, and compares what comes of it with a run that was left alone.

    python -m benchmarks.fault_storm [--kills=100] [--processes=1] [--seed=0] [--workdir=DIR]

A curriculum of three stages, upcycled after the first, with asynchronous checkpoints every second.
Every attempt is ended by SIGKILL at a random moment: half of them so many seconds after the start,
half at a place drawn from PLACES (`tests/fault_run.py` plants it) and a random moment later. With
several processes one of them is killed, and the others as a launcher would. Then it runs to its
end. Parameters, optimizer state and everything else of every stage's last checkpoint, and every
logged loss, are compared bit for bit.

    python -m benchmarks.fault_storm --elastic

runs the same with 2, 1 and 4 processes in turn: every step's loss is that of one process, to 1e-3,
as it would not be with other rows, and the first ten losses after a change agree to 1e-5.
"""

import collections
import dataclasses
import json
import os
import random
import runpy
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging

from ouro_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    LoggingConfig,
    MeshConfig,
    from_config_dict,
    to_dict,
)
from ouro_jax.parallel.mesh import make_mesh
from ouro_jax.training.checkpoints import StageCheckpoints, load_position
from ouro_jax.training.events import read_events
from ouro_jax.training.run_log import read_log
from ouro_jax.training.state import StateFactory
from ouro_jax.training.timing import goodput, read_times, time_spent
from ouro_jax.training.trainer import prepare_data

ROOT = Path(__file__).parent.parent
BATCH_ROWS, ROW = 8, 64
STEPS = {"stable_1a": 1000, "stable_1b": 4000, "gate": 4000}
ELASTIC_STEPS = {"stable_1a": 60, "stable_1b": 120, "gate": 30}
# What is killed, at most so many calls and seconds after it has begun.
PLACES = {
    "start": (1, 0.5), "compile": (1, 1.0), "step": (60, 0.02), "transition": (1, 0.3),
    "checkpoint": (3, 0.1), "finishing": (3, 0.05), "evaluation": (1, 0.2), "data": (60, 0.01),
}  # fmt: skip
# An attempt is at its first step after 4 to 6 of them.
LONGEST_SECONDS = 9.0
# A place that does not come again is left by the clock; the end of a stage comes late.
PLACE_SECONDS = collections.defaultdict(lambda: 12.0, transition=40.0, evaluation=40.0)
TIMES = {
    "time", "tokens_per_second", "tokens_per_second_per_device", "mfu", "seconds", "step_seconds",
    "hbm_bytes_in_use", "hbm_bytes_peak", "hbm_bytes_limit",
}  # fmt: skip

_KILLS = flags.DEFINE_integer("kills", 100, "How often to kill the run.", 0)
_PROCESSES = flags.DEFINE_integer("processes", 1, "Processes of the run, on this machine.", 1)
_SEED = flags.DEFINE_integer("seed", 0, "Of the moments.")
_WORKDIR = flags.DEFINE_string("workdir", "", "Where to work; a temporary folder if not given.")
_ELASTIC = flags.DEFINE_bool("elastic", False, "Change the number of processes instead.")


def main(_: Sequence[str]) -> None:
    """Prints what happened, and the same as one JSON line last; fails where the runs differ."""
    logging.set_verbosity(logging.ERROR)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(_WORKDIR.value or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        config = make_config(folder)
        config_file = folder / "config.json"
        config_file.write_text(json.dumps(to_dict(config)))
        run = elastic if _ELASTIC.value else storm
        print(json.dumps(run(config, config_file, folder)))


def make_config(folder: Path) -> Config:
    """`configs/tiny.py:smoke` with more and smaller steps, and checkpoints without pause."""
    smoke = from_config_dict(
        runpy.run_path(str(ROOT / "configs" / "tiny.py"))["get_config"]("smoke")
    )
    stages = {
        name: dataclasses.replace(
            smoke.stages[name], tokens=steps * BATCH_ROWS * ROW, batch_tokens=BATCH_ROWS * ROW,
            num_loops=2, sequence_length=ROW,
        )
        for name, steps in planned_steps().items()
    }  # fmt: skip
    config = dataclasses.replace(
        smoke, stages=stages, data=DataConfig(str(folder / "data"), embedded_bytes=150_000),
        checkpoint=CheckpointConfig(every_minutes=1 / 60, every_tokens=10**9, keep=2),
        evaluation=EvaluationConfig(10**9, rows_per_source=8, num_loops=2),
        logging=LoggingConfig(every_steps=1, tensorboard=False),
    )  # fmt: skip
    return dataclasses.replace(config, data=DataConfig(str(prepare_data(config))))


def planned_steps() -> dict[str, int]:
    """Of every stage."""
    return ELASTIC_STEPS if _ELASTIC.value else STEPS


def storm(config: Config, config_file: Path, folder: Path) -> dict[str, Any]:
    """Kills one run, leaves another one alone, and compares them."""
    draw, count = random.Random(_SEED.value), _PROCESSES.value
    alone, stormed = folder / "alone", folder / "stormed"
    shutil.rmtree(alone, ignore_errors=True)
    shutil.rmtree(stormed, ignore_errors=True)
    wait(attempt(config_file, alone, [{}] * count, folder))
    killed: collections.Counter[str] = collections.Counter()
    began = time.monotonic()
    while sum(killed.values()) < _KILLS.value:
        where = kill_once(config_file, stormed, draw, folder)
        if where is None:
            break  # it came to its end first
        killed[where] += 1
        print(f"kill {sum(killed.values()):3d}: {where:12s} {newest(stormed)}", flush=True)
    wait(attempt(config_file, stormed, [{}] * count, folder))
    compare(config, alone, stormed)
    happened = read_events(stormed)
    events = collections.Counter(event["kind"] for event in happened)
    starts = [event["seconds"] for event in happened if event["kind"] == "first_step"]
    return {
        "kills": sum(killed.values()), "places": dict(killed), "processes": count,
        "seconds": round(time.monotonic() - began),
        "steps": sum(STEPS.values()), "attempts": events["start"],
        "set_aside": events["set_aside"], "checkpoints": events["checkpoint"],
        "start_seconds": {  # medians of the attempts that came to a step
            cause: round(statistics.median(start[cause] for start in starts), 3)
            for cause in starts[0]
        },
        "goodput_percent": goodput(time_spent(read_times(stormed))), "equal": True,
    }  # fmt: skip


def kill_once(config_file: Path, workdir: Path, draw: random.Random, folder: Path) -> str | None:
    """One attempt, killed; returns where, or None if it had ended by itself."""
    number = draw.randrange(_PROCESSES.value)
    if draw.random() < 0.5:
        processes = attempt(config_file, workdir, [{}] * _PROCESSES.value, folder)
        time.sleep(draw.uniform(0.5, LONGEST_SECONDS))
        where, killed = "any moment", processes[number].poll() is None
        processes[number].kill()
    else:
        where = draw.choice(list(PLACES))
        calls, seconds = PLACES[where]
        fault = {
            "at": "step" if where == "compile" else where, "do": "kill",
            "call": draw.randrange(calls), "delay": draw.uniform(0, seconds),
        }  # fmt: skip
        faults: list[dict[str, Any]] = [{}] * _PROCESSES.value
        faults[number] = fault
        processes = attempt(config_file, workdir, faults, folder)
        try:
            killed = processes[number].wait(PLACE_SECONDS[where]) == -signal.SIGKILL
        except subprocess.TimeoutExpired:
            where, killed = "any moment", True
    for process in processes:  # what a launcher does with the others
        process.kill()
        process.wait()
    return where if killed else None


def attempt(
    config_file: Path, workdir: Path, faults: Sequence[dict[str, Any]], folder: Path
) -> list[subprocess.Popen]:
    """Starts the processes of an attempt."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    devices = 4 // len(faults) if _ELASTIC.value else 1
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(folder / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }  # fmt: skip
    if _ELASTIC.value:  # compiling for four processes takes most of the time, half of it for speed
        environment["XLA_FLAGS"] += " --xla_backend_optimization_level=0"
    processes = []
    for number, fault in enumerate(faults):
        place = [address, len(faults), number] if len(faults) > 1 else ["", 0, 0]
        task = {"config": str(config_file), "workdir": str(workdir), "at": "", "place": place}
        with (folder / f"process_{number}.log").open("a") as log:
            processes.append(subprocess.Popen(
                [sys.executable, str(ROOT / "tests" / "fault_run.py"), json.dumps(task | fault)],
                env=environment, stdout=log, stderr=log,
            ))  # fmt: skip
    return processes


def wait(processes: list[subprocess.Popen], codes: Sequence[int] = (0,)) -> None:
    """Until all have ended, as they should."""
    ends = [process.wait() for process in processes]
    if not set(ends) <= set(codes):
        raise SystemExit(f"a run that nobody killed ended with {ends}; see the logs of processes")


def newest(workdir: Path) -> str:
    """Where the run stands."""
    begun = [name for name in STEPS if (workdir / name).exists()]
    logged = [r for r in read_log(workdir) if r["kind"] == "train"] if begun else []
    return f"step {logged[-1]['step']:,} of {sum(STEPS.values()):,}" if logged else "at its start"


def compare(config: Config, alone: Path, stormed: Path) -> None:
    """Raises an AssertionError where the two runs differ in a bit."""
    for stage in STEPS:
        expected, ours = (last_state(config, workdir / stage) for workdir in (alone, stormed))
        assert expected[0] == ours[0], (expected[0], ours[0])
        for one, other in zip(jax.tree.leaves(expected[1]), jax.tree.leaves(ours[1]), strict=True):
            assert np.asarray(one).tobytes() == np.asarray(other).tobytes(), stage
    logs = [logged(workdir) for workdir in (alone, stormed)]
    assert logs[0] == logs[1] and len([r for r in logs[0] if r["kind"] == "train"]) == sum(
        STEPS.values()
    )


def last_state(config: Config, folder: Path) -> Any:
    """Position and state of a stage's last checkpoint."""
    position = load_position(folder)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    factory = StateFactory(position.model, config.optimizer, position.objective, mesh)
    with StageCheckpoints(folder, read_only=True) as checkpoints:
        return position, checkpoints.restore(factory.abstract(), position.step)


def logged(workdir: Path) -> list[dict[str, Any]]:
    """What was logged of training and held-out text, less the times."""
    return [
        {key: value for key, value in record.items() if key not in TIMES}
        for record in read_log(workdir) if record["kind"] in ("train", "heldout")
    ]  # fmt: skip


def elastic(config: Config, config_file: Path, folder: Path) -> dict[str, Any]:
    """2, 1 and 4 processes in turn on four devices, each stopped on the way.

    All losses are compared with those of a run of one process, which had other rows been read would
    differ, and those after a change with a copy's that goes on with as many processes as before.
    """
    alone, changed, same = folder / "alone", folder / "changed", folder / "same"
    for workdir in (alone, changed, same):
        shutil.rmtree(workdir, ignore_errors=True)
    wait(attempt(config_file, alone, [{}], folder))
    worst, before = {}, 0
    for count, call in ((2, 20), (1, 60), (4, 30)):
        if before:
            shutil.rmtree(same, ignore_errors=True)
            shutil.copytree(changed, same)
            run_until(config_file, same, before, 14, folder)
            step = load_position(changed).step
        run_until(config_file, changed, count, call, folder)
        if before:
            losses = [losses_of(workdir, step + 1, step + 11) for workdir in (same, changed)]
            worst[step] = max(abs(a / b - 1) for a, b in zip(*losses, strict=True))
        before = count
    wait(attempt(config_file, changed, [{}] * before, folder))
    logs = [
        [record for record in logged(workdir) if record["kind"] == "train"]
        for workdir in (alone, changed)
    ]
    facts = ("step", "tokens", "source_tokens", "batch_tokens", "num_tokens", "learning_rate")
    seen = [[[record[key] for key in facts] for record in log] for log in logs]
    assert seen[0] == seen[1] and len(seen[0]) == sum(ELASTIC_STEPS.values())
    # Other rows have another loss: from one step to the next it changes by 2 %.
    apart = max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(*logs, strict=True))
    assert apart <= 1e-3 and max(worst.values()) <= 1e-5, (apart, worst)
    return {
        "processes": [2, 1, 4], "losses_differ_from_one_process_by": apart,
        "losses_after_step_differ_by": worst,
    }  # fmt: skip


def run_until(config_file: Path, workdir: Path, count: int, call: int, folder: Path) -> None:
    """Trains with `count` processes, and asks one to stop at the `call`-th step of a stage."""
    faults: list[dict[str, Any]] = [{}] * (count - 1)
    faults.append({"at": "step", "do": "term", "call": call})
    wait(attempt(config_file, workdir, faults, folder), (75,))


def losses_of(workdir: Path, start: int, stop: int) -> list[float]:
    """The losses of these steps."""
    return [r["loss"] for r in logged(workdir)
            if r["kind"] == "train" and start <= r["step"] < stop]  # fmt: skip


if __name__ == "__main__":
    app.run(main)
