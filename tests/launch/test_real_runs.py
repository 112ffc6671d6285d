"""Launchers with the real `ouro train`: two processes over loopback, SLURM simulated."""

import dataclasses
import os
import signal
import subprocess
import sys
import time

import pytest
from etils import epath
from micro_run import BATCH, ROOT, micro_config, write_config

from ouro_jax.config import DataConfig
from ouro_jax.training.checkpoint_files import SUMS, steps_of
from ouro_jax.training.run_log import read_log
from ouro_jax.training.trainer import prepare_data

STEPS, EVERY = 80, 20


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A config file of one stage, saved every twenty steps."""
    folder = tmp_path_factory.mktemp("config")
    config = micro_config(folder / "data")
    stage = dataclasses.replace(config.stages["stable_1a"], tokens=STEPS * BATCH, batch_ramp=())
    config = dataclasses.replace(
        config,
        stages={"stable_1a": stage},
        data=DataConfig(root=str(prepare_data(config))),
        checkpoint=dataclasses.replace(config.checkpoint, every_tokens=EVERY * BATCH),
        evaluation=dataclasses.replace(config.evaluation, ngram_baselines=False),
    )
    return write_config(folder / "micro.py", config)


@pytest.fixture
def real(fakes):
    """The real `ouro`, on two virtual devices for each process."""
    fakes.add(ouro=f'exec {sys.executable} -m ouro_jax.cli.main "$@"')
    devices = "--xla_force_host_platform_device_count=2"
    fakes.env |= {name: value for name, value in os.environ.items() if name.startswith("JAX_")}
    fakes.env |= {"PYTHONPATH": str(ROOT), "XLA_FLAGS": devices}
    return fakes


def steps_and_events(folder):
    """Steps of the train records, and the events, of the run in `folder`."""
    records = read_log(folder)
    steps = [record["step"] for record in records if record["kind"] == "train"]
    return steps, [record["event"] for record in records if record["kind"] == "event"]


def test_a_killed_process_is_started_again_and_the_run_goes_on(real, config):
    run = real.folder / "run"
    launcher = subprocess.Popen(
        [str(ROOT / "launch" / "local.sh"), "--processes=2", "--pause=1", "--cache=cache",
         f"--config={config}", f"--workdir={run}"],
        env=real.env, cwd=real.folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not (run / "stable_1a" / str(EVERY) / SUMS).exists():
        assert launcher.poll() is None, launcher.stderr.read()
        time.sleep(0.02)
    found = ["pgrep", "-f", f"{run} .*--process_id=1"]
    for process in subprocess.run(found, capture_output=True, text=True).stdout.split():
        os.kill(int(process), signal.SIGKILL)
    _, errors = launcher.communicate(timeout=300)
    assert launcher.returncode == 0, errors
    assert "attempt 1 of 10 ended with code 137" in errors and "attempt 2" not in errors
    steps, events = steps_and_events(run)
    assert steps == list(range(1, STEPS + 1))
    assert events == ["stage_start", "resume", "stage_end", "finished"]
    assert len(list((real.folder / "logs" / "run").glob("*.log"))) == 2
    assert any((real.folder / "cache").iterdir()), "no compiled program was kept"


def test_a_launcher_that_is_told_to_stop_has_its_run_save_and_go_on(real, config):
    """Once two processes, once a single one on the same workdir, which then finishes."""
    run = real.folder / "run"
    flags = f"--config={config}", f"--workdir={run}"
    stopped = 0
    for processes in (2, 1):
        launcher = subprocess.Popen(
            [str(ROOT / "launch" / "local.sh"), f"--processes={processes}", *flags],
            env=real.env, cwd=real.folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        while (
            not (run / "metrics.jsonl").exists()
            or max(steps_and_events(run)[0], default=0) < stopped + 3
        ):
            assert launcher.poll() is None, launcher.stderr.read()
            time.sleep(0.02)
        launcher.send_signal(signal.SIGTERM)
        _, errors = launcher.communicate(timeout=100)
        assert launcher.returncode == 75, errors
        assert not subprocess.run(["pgrep", "-f", str(run)], capture_output=True).stdout
        steps, _ = steps_and_events(run)
        assert stopped < steps[-1] < STEPS
        stopped = steps[-1]
        assert steps_of(epath.Path(run / "stable_1a"))[-1] == stopped
    result = real.launch("local", "--processes=1", *flags)
    assert result.returncode == 0, result.stderr
    assert steps_and_events(run)[0] == list(range(1, STEPS + 1))


def test_slurm_runs_the_real_thing(real, config):
    flags = "--nodes=2", "--gpus=0", f"--config={config}", f"--workdir={real.folder}/run"
    result = real.launch("slurm", *flags)
    assert result.returncode == 0, result.stderr
    steps, events = steps_and_events(real.folder / "run")
    assert (steps[-1], events[-1]) == (STEPS, "finished")
    log = (real.folder / "logs/run/node0_0.log").read_text()
    assert "stable_1a: finished after" in log and "held-out bits per byte" in log

    wrong = real.launch("slurm", *flags, "--config.model.vocab_size=200")
    assert wrong.returncode == 2 and "attempt" not in wrong.stderr
    assert "model.vocab_size = 200" in (real.folder / "logs/run/node0_0.log").read_text()
