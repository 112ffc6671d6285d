"""The launchers with fake programs, when they or what they started are told to stop."""

import os
import signal
import subprocess
import time

import pytest
from micro_run import ROOT

RUN = ["--config=configs/tiny.py:smoke", "--workdir=runs/x"]


@pytest.fixture
def start(fakes):
    """Starts a launcher in the folder of the fakes, and returns once `ready` of them run."""

    def left():
        found = ["pgrep", "-f", f"{fakes.folder}/bin/"]
        return list(map(int, subprocess.run(found, capture_output=True, text=True).stdout.split()))

    def start(script, *arguments, ready=1, before=()):
        command = [*before, str(ROOT / "launch" / f"{script}.sh"), *arguments, *RUN]
        with (fakes.folder / "errors").open("w") as errors:
            launchers.append(
                subprocess.Popen(command, env=fakes.env, cwd=fakes.folder, stderr=errors)
            )
        until(lambda: len(fakes.calls("ready")) >= ready)
        return launchers[0]

    launchers, start.left = [], left
    yield start
    for process in [launcher.pid for launcher in launchers if launcher.poll() is None] + left():
        os.kill(process, signal.SIGKILL)


def until(condition):
    limit = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.02)


def test_a_run_that_was_asked_to_stop_goes_on_at_once_and_loses_no_attempt(fakes):
    fakes.codes(75, 75, 75)
    begin = time.monotonic()
    result = fakes.launch("local", "--attempts=2", "--pause=60", *RUN)
    assert (result.returncode, len(fakes.calls("ouro"))) == (0, 4), result.stderr
    assert "attempt" not in result.stderr and time.monotonic() - begin < 30


@pytest.mark.parametrize(
    ("codes", "attempts", "calls", "code"),
    [([124, 75, 137, 3], 3, 4, 3), ([75, 2], 3, 2, 2), ([75], 1, 1, 75)],
)
def test_what_counts_as_an_attempt(fakes, codes, attempts, calls, code):
    fakes.codes(*codes)
    result = fakes.launch("local", "--pause=0", f"--attempts={attempts}", *RUN)
    assert (result.returncode, len(fakes.calls("ouro"))) == (code, calls)


@pytest.mark.parametrize("options", [[], ["--logs=logs/x"], ["--processes=2"]])
def test_term_is_passed_on_and_waited_for(fakes, start, options):
    processes = 2 if "--processes=2" in options else 1
    fakes.codes("save75", "save75")
    launcher = start("local", "--pause=0", *options, ready=processes)
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(20) == 75, fakes.calls("errors")
    assert len(fakes.calls("told")) == len(fakes.calls("ouro")) == processes
    assert not start.left()
    logs = sorted((fakes.folder / "logs").rglob("*.log"))
    assert len(logs) == (processes if options else 0)
    assert all("has saved" in log.read_text() for log in logs)


def test_all_of_a_machine_may_be_told_at_once(fakes, start):
    """As at the shutdown of a TPU VM: the log must outlive the signal."""
    fakes.codes("save75")
    launcher = start("local", "--logs=logs", before=["setsid", "--wait"])
    session = str(os.getsid(start.left()[0]))
    assert subprocess.run(["pkill", "--signal=TERM", "--session", session]).returncode == 0
    assert launcher.wait(20) == 75, fakes.calls("errors")
    (log,) = (fakes.folder / "logs").iterdir()
    assert "has saved" in log.read_text()


def test_the_first_process_of_a_container_hears_term(fakes, start):
    container = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child"]
    if subprocess.run([*container, "true"], capture_output=True).returncode:
        pytest.skip("this user may make no namespace")
    fakes.codes("save75")
    outer = start("local", before=container)
    (first,) = subprocess.run(
        ["pgrep", "-P", str(outer.pid)], capture_output=True, text=True
    ).stdout.split()
    os.kill(int(first), signal.SIGTERM)
    assert outer.wait(20) == 75, fakes.calls("errors")
    assert len(fakes.calls("told")) == 1


def test_one_too_young_to_answer_has_lost_nothing(fakes, start):
    fakes.codes("hang")
    launcher = start("local", "--pause=0")
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(20) == 75, fakes.calls("errors")
    assert len(fakes.calls("ouro")) == 1


def test_a_launcher_told_in_its_pause_does_not_start_again(fakes, start):
    fakes.codes(1)
    launcher = start("local", "--pause=60", ready=0)
    until(lambda: "attempt 1 of 10 ended with code 1" in fakes.calls("errors"))
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(20) == 75
    assert len(fakes.calls("ouro")) == 1


def test_a_closed_terminal_ends_the_run(fakes, start):
    fakes.codes("hang")
    launcher = start("local", before=["env", "--default-signal=INT,HUP"])
    launcher.send_signal(signal.SIGHUP)
    assert launcher.wait(20) == 130
    assert not start.left()


@pytest.fixture
def job(fakes, start):
    """Starts a job's script on one node of two tasks, task 3 of array 7."""
    fakes.env |= {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_NNODES": "1",
                  "SLURM_NTASKS_PER_NODE": "2", "SLURM_JOB_NODELIST": "localhost",
                  "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}  # fmt: skip
    return lambda: start("slurm", "--pause=0", ready=2)


@pytest.mark.parametrize(
    ("sent", "words", "code", "requeued"),
    [
        (signal.SIGUSR1, "save75", 75, ["requeue 7_3"]),
        (signal.SIGUSR1, "save0", 0, []),
        (signal.SIGTERM, "save75", 75, []),
    ],
)
def test_a_slurm_job_saves_before_it_ends(fakes, start, job, sent, words, code, requeued):
    fakes.codes(words, words)
    script = job()
    script.send_signal(sent)
    assert script.wait(20) == code, fakes.calls("errors")
    assert fakes.calls("scancel") == ["--signal=TERM 7_3"]
    assert fakes.calls("scontrol") == requeued
    assert len(fakes.calls("ouro")) == 2 and not start.left()
    log = (fakes.folder / "logs" / "x" / "3" / "node0_1.log").read_text()
    assert "process 1 has saved" in log


def test_a_slurm_job_is_queued_again_even_if_it_cannot_save(fakes, job):
    fakes.add(sleep="echo >>$FAKE/slept")
    fakes.codes("deaf", "deaf")
    script = job()
    script.send_signal(signal.SIGUSR1)
    assert script.wait(20) == 75, fakes.calls("errors")
    assert fakes.calls("scontrol") == ["requeue 7_3"]
    assert len(fakes.calls("slept")) == 100
