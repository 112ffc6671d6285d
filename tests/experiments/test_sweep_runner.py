"""Commands run a few at a time: all of them, whatever becomes of one, and none outlives a stop."""

import subprocess
import sys
import time

import pytest

from ouro_jax.experiments import sweep_runner
from ouro_jax.experiments.sweep_runner import run_commands


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(sweep_runner, "TICK_SECONDS", 0.02)


def python(text):
    return [sys.executable, "-c", text]


def run(commands, folder, workers=2, on_tick=lambda: None):
    """What failed, and the changes as they came."""
    changes = []
    failed = run_commands(commands, folder, workers, lambda *what: changes.append(what), on_tick)
    return failed, changes


def test_a_failure_does_not_stop_the_others(tmp_path):
    commands = {
        "bad": python("print('one'); raise SystemExit('error: two')"),
        "mute": python("raise SystemExit(3)"),
        "good": python("print('done')"),
    }
    failed, changes = run(commands, tmp_path)
    assert failed == {"bad": "code 1: error: two", "mute": "code 3: it said nothing"}
    assert {name for name, what in changes if what == "started"} == set(commands)
    assert ("good", "finished") in changes and ("bad", "failed: code 1: error: two") in changes
    assert (tmp_path / "good" / "output.log").read_text() == "done\n"


def test_so_many_run_at_a_time(tmp_path):
    commands = {str(number): python("import time; time.sleep(0.3)") for number in range(5)}
    _, changes = run(commands, tmp_path, workers=3)
    running, most = 0, 0
    for _, what in changes:
        running += 1 if what == "started" else -1
        most = max(most, running)
    assert (running, most) == (0, 3)


def test_devices_are_dealt_out(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    say = python("import os, time; time.sleep(0.5); print(os.environ['CUDA_VISIBLE_DEVICES'])")
    run({"a": say, "b": say}, tmp_path)
    shares = {(tmp_path / name / "output.log").read_text().strip() for name in "ab"}
    assert shares == {"4,6", "5,7"}


def test_an_interruption_ends_what_was_started(tmp_path):
    mark = f"sleeper-of-{tmp_path}"

    def interrupt():
        raise KeyboardInterrupt

    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run({"a": [*python("import time; time.sleep(60)"), mark]}, tmp_path, on_tick=interrupt)
    assert time.monotonic() - start < 20
    assert not subprocess.run(["pgrep", "-f", mark], capture_output=True).stdout
