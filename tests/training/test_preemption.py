"""SIGTERM in every phase, and phases that never end: the run saves, or says where it is stuck."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from micro_run import BATCH, ROOT, free_port, micro_config, virtual_devices

from ouro_jax.config import DataConfig, DeadlineConfig, EvaluationConfig, MeshConfig, to_dict
from ouro_jax.parallel.mesh import make_mesh
from ouro_jax.training import trainer
from ouro_jax.training.checkpoint_files import list_checkpoints, problems_of
from ouro_jax.training.checkpoints import StageCheckpoints, absolute, load_position
from ouro_jax.training.events import read_events
from ouro_jax.training.run_log import read_log
from ouro_jax.training.state import StateFactory
from ouro_jax.training.watchdog import Watchdog

# 18 steps of stable_1a (four of half a batch), 24 of two layers, 8 of the gate.
STEPS = {"stable_1a": 18, "stable_1b": 42, "gate": 50}
SECONDS = 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("preemption")


@pytest.fixture(scope="module")
def config(folder):
    config = micro_config(folder / "data")
    prepared = trainer.prepare_data(config)
    shorter = dataclasses.replace(config.stages["stable_1b"], tokens=24 * BATCH)
    return dataclasses.replace(
        config, stages={**config.stages, "stable_1b": shorter}, data=DataConfig(str(prepared)),
        evaluation=EvaluationConfig(10**9, rows_per_source=4, num_loops=2, ngram_baselines=True),
    )  # fmt: skip


def write(config, path: Path) -> Path:
    path.write_text(json.dumps(to_dict(config)))
    return path


@pytest.fixture(scope="module")
def config_file(config, folder):
    return write(config, folder / "config.json")


@pytest.fixture(scope="module")
def start():
    """Starts a run with a fault in a process of its own."""
    environment = virtual_devices(1) | {"JAX_PLATFORMS": "cpu"}

    def start(config_file, workdir, at="", **task):
        task |= {"config": str(config_file), "workdir": str(workdir), "at": at}
        return subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "fault_run.py"), json.dumps(task)],
            env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    return start


@pytest.fixture(scope="module")
def finished(config_file, folder, start):
    """The workdir of a run that nothing disturbs."""
    code, said = end(start(config_file, folder / "finished"))
    assert code == 0, said
    return folder / "finished"


def end(process, seconds=180) -> tuple[int, str]:
    """Exit code and what was said on the way."""
    try:
        output, errors = process.communicate(timeout=seconds)
    finally:
        process.kill()
    return process.returncode, output + errors


def state_of(config, workdir, stage):
    position = load_position(workdir / stage)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    factory = StateFactory(position.model, config.optimizer, position.objective, mesh)
    with StageCheckpoints(workdir / stage, read_only=True) as checkpoints:
        return position, checkpoints.restore(factory.abstract(), position.step)


def assert_same_run(config, ours, theirs):
    for stage in config.stages:
        (position, state), (expected, other) = (
            state_of(config, workdir, stage) for workdir in (ours, theirs)
        )
        assert position == expected
        for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(other), strict=True):
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    logs = [
        [(r["kind"], r["step"], r.get("loss"), r.get("loss_per_loop"), r.get("source"))
         for r in read_log(workdir) if r["kind"] != "event"] for workdir in (ours, theirs)
    ]  # fmt: skip
    assert logs[0] == logs[1] and len(logs[0]) >= 50


# Where the signal comes, and the step of the newest checkpoint after it. It is heard at the step
# after, agreed on with that one's metrics, and by then another one has been sent off.
PHASES = (
    ("start", 0, None), ("step", 0, None), ("step", 4, (5, 8)), ("evaluation", 0, 18),
    ("transition", 0, 18), ("step", 7, (26, 29)), ("checkpoint", 0, (30, 38)),
    ("data", 2, None), ("evaluation", 0, 42), ("baselines", 0, 50),
)  # fmt: skip


def test_a_signal_in_every_phase_leaves_the_newest_step_and_no_trace(
    config, config_file, finished, start, tmp_path
):
    for number, (at, call, expected) in enumerate(PHASES):
        before = steps_there(tmp_path)
        process = start(config_file, tmp_path, at, call=call)
        code, said = end(process)
        assert code == 75, (at, call, code, said)
        after = steps_there(tmp_path)
        if expected is None:
            assert after[-1:] == before[-1:] or after[-1] > before[-1], (at, before, after)
        else:
            low, high = expected if isinstance(expected, tuple) else (expected, expected)
            assert low <= after[-1] <= high, (number, at, call, before, after, said)
        for checkpoint in list_checkpoints(absolute(tmp_path)):
            assert checkpoint.is_finished and not problems_of(checkpoint.path)
    code, said = end(start(config_file, tmp_path))
    assert code == 0, said
    assert_same_run(config, tmp_path, finished)
    stops = [event for event in read_events(tmp_path) if event["kind"] == "stop"]
    assert {event["code"] for event in stops} == {0, 75}


def steps_there(workdir) -> list[int]:
    return [c.step for c in list_checkpoints(absolute(workdir)) if c.is_finished]


def test_a_second_signal_ends_it_at_once_and_leaves_the_last_checkpoint_whole(
    config, config_file, finished, start, tmp_path
):
    process = start(config_file, tmp_path, "finishing", call=1, do="stuck")
    wait_for(lambda: len(steps_there(tmp_path)) == 1 and "checkpoint" in kinds(tmp_path), process)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)  # as a process group and its launcher deliver it
    time.sleep(3)
    assert process.poll() is None  # it waits for the save that is stuck
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    code, said = end(process)
    assert code == 143 and time.monotonic() - began < 5
    assert "asked to stop a second time" in said
    (whole, _) = list_checkpoints(absolute(tmp_path))
    assert not problems_of(whole.path)
    code, said = end(start(config_file, tmp_path))
    assert code == 0, said
    assert_same_run(config, tmp_path, finished)
    assert "set_aside" in kinds(tmp_path)  # the one that was not finished


def kinds(workdir) -> set[str]:
    return {event["kind"] for event in read_events(workdir)}


def wait_for(condition, process, seconds=120):
    limit = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, end(process)
        assert time.monotonic() < limit
        time.sleep(0.05)


@pytest.mark.parametrize(("phase", "at", "names"), [
    ("start", "start", "_check"), ("compile", "step", "_optimizer_step"),
    ("data", "data", "_awaited"), ("evaluation", "evaluation", "_evaluate"),
    ("checkpoint", "checkpoint", "save"),
])  # fmt: skip
def test_a_phase_that_never_ends_is_ended_with_its_place(config, start, tmp_path, phase, at, names):
    limited = dataclasses.replace(
        config, deadlines=dataclasses.replace(DeadlineConfig(), **{phase: 3.0})
    )
    if phase == "compile":  # a real compilation takes longer than that on a busy machine
        limited = dataclasses.replace(limited, deadlines=DeadlineConfig(compile=20.0))
    began = time.monotonic()
    process = start(write(limited, tmp_path / "config.json"), tmp_path / "run", at, do="stuck")
    code, said = end(process)
    assert code == 124, said
    assert f"phase '{phase}' has taken" in said and f"deadlines.{phase} = " in said
    assert time.monotonic() - began < 90
    stacks = (tmp_path / "run" / "stacks" / "process_0.txt").read_text()
    for text in (said, stacks):
        assert "in stuck" in text and f"in {names}" in text
    if phase != "start":
        *_, stop = read_events(tmp_path / "run")
        assert (stop["kind"], stop["code"]) == ("stop", 124) and phase in stop["reason"]


def two(start, config_file, workdir, faults):
    """Two processes of one run; `faults` are the tasks of each."""
    address = f"127.0.0.1:{free_port()}"
    return [
        start(config_file, workdir, place=[address, 2, number], **fault)
        for number, fault in enumerate(faults)
    ]


def test_a_signal_to_one_of_two_processes_saves_and_ends_both(config_file, start, tmp_path):
    for fault in ({"at": "step", "call": 6}, {"at": "step", "call": 0}):
        before = steps_there(tmp_path)
        processes = two(start, config_file, tmp_path, [{}, fault])
        ends = [end(process) for process in processes]
        assert [code for code, _ in ends] == [75, 75], ends
        after = steps_there(tmp_path)
        if fault["call"]:
            assert 7 <= after[-1] <= 10 and "saved at step" in ends[0][1]
        else:
            assert after == before
    assert [e["code"] for e in read_events(tmp_path) if e["kind"] == "stop"][:1] == [75]


def test_a_process_stuck_before_a_barrier_ends_both_with_their_places(config, start, tmp_path):
    limited = dataclasses.replace(config, deadlines=DeadlineConfig(start=25.0))
    config_file = write(limited, tmp_path / "config.json")
    faults = [{}, {"at": "start", "do": "stuck"}]
    ends = [end(process) for process in two(start, config_file, tmp_path / "run", faults)]
    assert {code for code, _ in ends} == {124}, ends
    # One of them expired first, and made the other one say where it was.
    assert "in barrier" in ends[0][1] and "in stuck" in ends[1][1]
    assert any("deadlines.start = 25" in said for _, said in ends)


def test_the_descriptor_and_the_handler_are_put_back(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with Watchdog(DeadlineConfig(), tmp_path / "stacks.txt") as watchdog:
        watchdog.has_unsaved = True
        os.kill(os.getpid(), signal.SIGTERM)
        limit = time.monotonic() + 10
        while not watchdog.is_asked_to_stop and time.monotonic() < limit:
            time.sleep(0.01)
        assert watchdog.is_asked_to_stop
    assert signal.getsignal(signal.SIGTERM) == before
    assert signal.set_wakeup_fd(-1) == -1
