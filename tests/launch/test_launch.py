"""The launchers with fake programs: what they start, what they start again, what they refuse."""

import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from micro_run import ROOT

SCRIPTS = ("local", "slurm", "tpu_vm", "gke")
NEEDED = {
    "local": [],
    "slurm": ["--nodes=2", "--gpus=4"],
    "tpu_vm": ["--zone=us-east5-a", "--type=v5p-256"],
    "gke": ["--image=IMAGE", "--claim=shared"],
}
RUN = ["--config=configs/tiny.py:smoke", "--workdir=runs/x"]


def test_shellcheck_finds_nothing():
    files = sorted(map(str, (ROOT / "launch").glob("*.sh")))
    shellcheck = Path(sys.executable).with_name("shellcheck")
    result = subprocess.run([shellcheck, *files], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, ""), result.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_dry_run_prints_the_command_and_does_nothing(fakes, script):
    before = sorted(fakes.folder.rglob("*"))
    result = fakes.launch(script, *NEEDED[script], *RUN, "--dry_run")
    assert result.returncode == 0, result.stderr
    words = re.sub(r'[",]+', " ", result.stdout)
    assert "train --config=configs/tiny.py:smoke --workdir=runs/x" in words
    assert sorted(fakes.folder.rglob("*")) == before
    other = fakes.launch(script, *NEEDED[script], "--dry_run", "eval", "--json").stdout
    assert "eval --json" in re.sub(r'[",]+', " ", other) and "train" not in other


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--atempts=3", *RUN], "--atempts=3: no such option"),
        (["--attempts=many", *RUN], "--attempts=many: expected a whole number"),
        (["--pause", *RUN], "--pause: expected --pause=…"),
        (["--dry_run=yes", *RUN], "--dry_run: give it once, without a value"),
        ([], "nothing to run; expected e.g. train --config=configs/tiny.py --workdir=runs/tiny"),
    ],
)
def test_a_wrong_option_is_refused_with_the_usage(fakes, script, arguments, error):
    result = fakes.launch(script, *NEEDED[script], *arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.splitlines()[-1] == f"error: {error}"
    assert f"launch/{script}.sh" in result.stderr and "--dry_run" in result.stderr
    assert not fakes.calls("ouro")


def test_what_a_launcher_needs_is_asked_for(fakes):
    for script, error in (("tpu_vm", "--zone is missing"), ("gke", "--image is missing")):
        result = fakes.launch(script, *RUN)
        assert result.returncode == 2 and error in result.stderr
    result = fakes.launch("gke", *NEEDED["gke"], "--topology=3x3", *RUN)
    assert result.returncode == 2 and "--chips=4 does not divide the chips of 3x3" in result.stderr
    result = fakes.launch("gke", *NEEDED["gke"], "--name=1,2", *RUN)
    assert result.returncode == 2 and "--name=1,2: expected at most 40 of" in result.stderr
    for program in ("dirname", "awk", "basename", "bash"):
        (fakes.folder / program).symlink_to(shutil.which(program))
    fakes.env["PATH"] = str(fakes.folder)
    result = fakes.launch("slurm", *RUN)
    assert result.returncode == 2 and "sbatch: not found on the PATH" in result.stderr


def test_help(fakes):
    result = fakes.launch("slurm", "--help")
    assert result.returncode == 0
    assert "launch/slurm.sh --nodes=4" in result.stdout and "--attempts=10" in result.stdout


def test_a_crash_is_followed_by_another_attempt(fakes):
    fakes.codes(1, 134)
    result = fakes.launch("local", "--pause=0", "--cache=gs://cache", "eval", "--tasks=local")
    assert result.returncode == 0
    assert fakes.calls("ouro") == ["eval --tasks=local gs://cache"] * 3
    assert "attempt 2 of 10 ended with code 134" in result.stderr


@pytest.mark.parametrize(
    ("codes", "attempts", "code"), [([2], 1, 2), ([130], 1, 130), ([3, 1, 4], 3, 4)]
)
def test_what_ends_the_attempts(fakes, codes, attempts, code):
    fakes.codes(*codes)
    result = fakes.launch("local", "--pause=0", "--attempts=3", *RUN)
    assert (result.returncode, len(fakes.calls("ouro"))) == (code, attempts)


def test_processes_of_one_host_meet_and_fall_together(fakes):
    fakes.codes("hang", 1)
    start = time.monotonic()
    result = fakes.launch("local", "--processes=2", "--pause=0", *RUN)
    assert result.returncode == 0 and time.monotonic() - start < 30
    calls = [dict(re.findall(r"--(\w+)=(\S+)", call)) for call in fakes.calls("ouro")]
    assert [call["num_processes"] for call in calls] == ["2"] * 4
    for attempt in (calls[:2], calls[2:]):
        assert {call["process_id"] for call in attempt} == {"0", "1"}
        assert len({call["coordinator"] for call in attempt}) == 1
    logs = sorted((fakes.folder / "logs" / "x").iterdir())
    assert [log.name.rsplit("_", 1)[1] for log in logs] == ["0.log", "1.log"]
    assert all("says train" in log.read_text() for log in logs)
    fakes.codes(*[""] * 4, 2, "hang")
    assert fakes.launch("local", "--processes=2", "--pause=0", *RUN).returncode == 2


def test_interrupted_processes_leave_nothing_behind(fakes):
    fakes.codes("hang", "hang")
    command = [str(ROOT / "launch" / "local.sh"), "--processes=2", *RUN]
    # A shell that runs the tests in the background has made them ignore Ctrl-C.
    command = ["env", "--default-signal=INT", *command]
    launcher = subprocess.Popen(command, env=fakes.env, cwd=fakes.folder)
    while len(fakes.calls("ouro")) < 2:
        time.sleep(0.1)
    launcher.send_signal(signal.SIGINT)
    assert launcher.wait(20) == 130
    left = subprocess.run(["pgrep", "-f", f"{fakes.folder}/bin/ouro"], capture_output=True)
    assert not left.stdout


def test_slurm_runs_every_process_and_again_after_a_crash(fakes):
    fakes.codes(0, 0, 0, 1)
    flags = "--partition=gpu --time=4:00:00"
    result = fakes.launch("slurm", *NEEDED["slurm"], f"--sbatch={flags}", "--pause=0", *RUN)
    assert result.returncode == 0, result.stderr
    (submitted,) = fakes.calls("sbatch")
    for flag in (flags, "--nodes=2 --ntasks-per-node=4", "--gpus-per-node=4", "--requeue"):
        assert flag in submitted
    assert len(fakes.calls("ouro")) == 16
    logs = sorted(log.name for log in (fakes.folder / "logs" / "x").glob("node*"))
    assert logs == [f"node{task // 4}_{task}.log" for task in range(8)]
    assert "process 5 says train" in (fakes.folder / "logs/x/node1_5.log").read_text()


def test_slurm_does_not_try_a_wrong_config_again(fakes):
    fakes.codes(2, 2)
    result = fakes.launch("slurm", "--nodes=2", "--gpus=0", "--pause=0", *RUN)
    assert (result.returncode, len(fakes.calls("ouro"))) == (2, 2)


def test_slurm_queues_the_job_again_when_its_time_is_over(fakes):
    fakes.codes("hang")
    fakes.env |= {"SLURM_JOB_ID": "9", "SLURM_NTASKS": "1", "SLURM_NNODES": "1",
                  "SLURM_NTASKS_PER_NODE": "1", "SLURM_JOB_NODELIST": "localhost"}  # fmt: skip
    command = [str(ROOT / "launch" / "slurm.sh"), *RUN]
    job = subprocess.Popen(command, env=fakes.env, cwd=fakes.folder, start_new_session=True)
    while not fakes.calls("ouro"):
        time.sleep(0.1)
    job.send_signal(signal.SIGUSR1)
    job.wait(20)
    assert fakes.calls("scontrol") == ["requeue 9"]
    assert job.returncode == 143, "what fell of the signal is queued again too"


def test_slurm_arrays_tell_the_command_their_number(fakes):
    options = ["--gpus=0", "--array=0,3", "--name=many", "--cache=/cache"]
    result = fakes.launch("slurm", *options, "sweep", "a b.py", "--run=%a")
    assert result.returncode == 0, result.stderr
    assert fakes.calls("ouro") == ["sweep a b.py --run=0 /cache", "sweep a b.py --run=3 /cache"]
    assert "--array=0,3" in fakes.calls("sbatch")[0]
    assert "says sweep" in (fakes.folder / "logs/many/3/node0_0.log").read_text()


def states(fakes, *states):
    (fakes.folder / "states").write_text("".join(f"{state}\n" for state in states))


# What the workers' own tools would do: nothing has to be installed here.
TOOLS = {"uv": "", "python3": "", "tar": "mkdir -p ouro_jax && cp -r $ROOT/launch ouro_jax"}


def test_a_tpu_is_asked_for_watched_and_asked_for_again(fakes):
    fakes.add(**TOOLS)
    fakes.env["ROOT"] = str(ROOT)
    states(fakes, "", "PROVISIONING", "ACTIVE", "SUSPENDED", "SUSPENDED", "", "ACTIVE")
    options = ["--spot", "--pause=1", "--attempts=2"]
    result = fakes.launch("tpu_vm", *NEEDED["tpu_vm"], *options, *RUN)
    assert result.returncode == 0, result.stderr
    kinds = [re.search(r" (create|delete|scp|ssh) ", call) for call in fakes.calls("gcloud")]
    kinds = [kind[1] for kind in kinds if kind]
    assert kinds[:7] == ["create", "scp", "ssh", "ssh", "delete", "create", "scp"]
    created = next(call for call in fakes.calls("gcloud") if " create " in call)
    assert "--node-id=x --accelerator-type=v5p-256" in created and "--spot" in created
    assert fakes.calls("ouro")[0].startswith("train --config=configs/tiny.py:smoke")
    assert (fakes.folder / "logs" / "x" / "0.log").exists()


def test_a_tpu_that_was_taken_away_is_no_failed_attempt(fakes):
    fakes.add(**TOOLS)
    fakes.env["ROOT"] = str(ROOT)
    taken = ["ACTIVE", "SUSPENDED", ""]
    states(fakes, *taken, *taken, "ACTIVE")
    result = fakes.launch("tpu_vm", *NEEDED["tpu_vm"], "--pause=1", "--attempts=2", *RUN)
    assert result.returncode == 0, result.stderr
    assert "attempt" not in result.stderr
    assert sum(" create " in call for call in fakes.calls("gcloud")) == 2


def test_a_wrong_config_on_a_tpu_is_not_tried_again(fakes):
    fakes.add(**TOOLS)
    fakes.env["ROOT"] = str(ROOT)
    states(fakes, "ACTIVE")
    fakes.codes(2)
    result = fakes.launch("tpu_vm", *NEEDED["tpu_vm"], "--pause=1", *RUN)
    assert result.returncode == 2, result.stderr
    assert len(fakes.calls("ouro")) == 1
    assert not any(" create " in call for call in fakes.calls("gcloud"))


def test_xpk_gets_one_workload(fakes):
    options = ["--image=IMAGE", "--xpk=cluster", "--type=v5p-128", "--slices=2", "--name=Run_1"]
    assert fakes.launch("gke", *options, *RUN).returncode == 0
    (call,) = fakes.calls("xpk")
    for word in ("--workload=run-1", "--cluster=cluster", "--tpu-type=v5p-128", "--num-slices=2",
                 "--restart-on-exit-codes=1,75,124",
                 "--command=exec launch/local.sh --attempts=1 -- train --config="):  # fmt: skip
        assert word in call
