"""A disk that is full for a while costs the checkpoints of that while, and nothing else."""

import dataclasses
import subprocess
import sys
import types
from unittest import mock

import pytest
from etils import epath

from ouro_jax.config import LoggingConfig
from ouro_jax.training.checkpoint_files import problems_of, steps_of
from ouro_jax.training.checkpoints import Position, SaveError
from ouro_jax.training.events import read_events
from ouro_jax.training.run_log import read_log
from ouro_jax.training.saves import Saves
from tests.micro_run import BATCH, ROOT, micro_config, ouro, virtual_devices, write_config
from tests.training.test_run_log import read_events as read_tensorboard

STEPS = 48  # saved every 8


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    """One stage of one layer; the programs of a run are there for the next."""
    folder = tmp_path_factory.mktemp("full")
    config = micro_config(folder / "data", logging=LoggingConfig(every_steps=1, tensorboard=True))
    stage = dataclasses.replace(
        config.stages["stable_1a"], tokens=STEPS * BATCH, batch_ramp=(), warmup_tokens=0
    )
    config = dataclasses.replace(config, stages={"stable_1a": stage})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(folder / "programs"))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        yield write_config(folder / "micro.py", config)


def train(config_file, workdir, first, last, stderr=subprocess.PIPE):
    """A run that has no room from `first` to `last`; stdout goes to a file on the same disk."""
    script = ROOT / "tests" / "train_on_full_disk.py"
    arguments = str(first), str(last), f"--config={config_file}", f"--workdir={workdir}"
    with workdir.with_suffix(".log").open("w") as file:
        return subprocess.run(
            [sys.executable, script, *arguments], env=virtual_devices(1), text=True, timeout=300,
            stdout=file, stderr=stderr,
        )  # fmt: skip


def saved_steps(workdir):
    """The steps in the stage's folder, each one whole and nothing else beside them."""
    folders = list((workdir / "stable_1a").iterdir())
    assert [problem for path in folders for problem in problems_of(epath.Path(path))] == []
    return sorted(int(path.name) for path in folders)


def alarms(workdir):
    return [event["text"] for event in read_events(workdir) if event["kind"] == "alarm"]


def test_training_goes_on_and_later_saves_succeed(config_file, tmp_path):
    workdir = tmp_path / "run"
    result = train(config_file, workdir, 24, 40, stderr=subprocess.STDOUT)
    assert result.returncode == 0, workdir.with_suffix(".log").read_text()
    assert saved_steps(workdir) == [8, 16, 40, 48]
    for step, alarm in zip((24, 32), alarms(workdir), strict=True):
        assert alarm.startswith(f"{workdir}/stable_1a/{step}: cannot be saved: ")
        assert "Training goes on" in alarm
    told = [event["step"] for event in read_events(workdir) if event["kind"] == "checkpoint"]
    assert told == [8, 16, 40, 48]
    # No line and no point is lost.
    steps = [record["step"] for record in read_log(workdir) if record["kind"] == "train"]
    assert steps == list(range(1, STEPS + 1))
    points = [
        event.step // BATCH
        for event in read_tensorboard(workdir / "tensorboard")
        if any(value.tag == "train/loss" for value in event.summary.value)
    ]
    assert points == steps


def test_at_the_end_of_a_stage_it_ends_the_run_which_can_go_on(config_file, tmp_path):
    workdir = tmp_path / "run"
    result = train(config_file, workdir, 40, STEPS + 1)
    assert result.returncode == 1, result.stderr
    (error,) = (line for line in result.stderr.splitlines() if line.startswith("error: "))
    assert error.startswith(f"error: {workdir}/stable_1a/48: cannot be saved: "), error
    assert f"ALARM: {workdir}/stable_1a/40: cannot be saved: " in result.stderr
    assert steps_of(epath.Path(workdir / "stable_1a")) == [8, 16, 24, 32]
    arguments = f"--config={config_file}", f"--workdir={workdir}"
    again = ouro("train", *arguments)
    assert again.returncode == 0, again.stderr
    assert saved_steps(workdir) == [8, 16, 24, 32, 40, 48]
    resumed = [event["step"] for event in read_events(workdir) if event["kind"] == "resume"]
    assert resumed == [32]


def test_a_save_under_way_that_fails_does_not_take_the_next_one_with_it(tmp_path, monkeypatch):
    monkeypatch.setattr(Saves, "_check", lambda *_: None)
    outcomes, saved, told = [None, SaveError("8: cannot be saved."), None], [], []

    def settle():
        if error := outcomes.pop(0):
            raise error

    checkpoints = types.SimpleNamespace(
        settle=settle, wait=settle, save=lambda _, position, *__, **___: saved.append(position.step)
    )
    run = types.SimpleNamespace(
        config=micro_config(tmp_path), described={}, progress=mock.Mock(), watchdog=mock.Mock(),
        events=types.SimpleNamespace(write=lambda kind, **_: told.append(kind)),
    )  # fmt: skip
    saves = Saves(run, None, checkpoints)
    for step in (8, 16):
        position = Position("stable_1a", step, 0, 0, run.config.model, "expected", 0)
        saves.save(None, position, True, wait=False)
    saves.finish()
    assert saved == [8, 16] and told == ["alarm", "checkpoint"]
