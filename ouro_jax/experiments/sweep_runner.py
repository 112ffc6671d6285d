"""Runs the commands of a sweep on this machine, a few at a time."""

import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

TICK_SECONDS = 0.5
OUTPUT = "output.log"


def run_commands(
    commands: Mapping[str, Sequence[str]],
    workdir: Path,
    workers: int,
    on_change: Callable[[str, str], None],
    on_tick: Callable[[], None],
) -> dict[str, str]:
    """Runs each command, `workers` at a time; returns what went wrong, by name.

    What a command prints goes to `workdir/NAME/output.log`. `on_change(name, what)` hears of every
    start and end. This process's CPUs, and GPUs that $CUDA_VISIBLE_DEVICES lists, are dealt out to
    the workers: two runs with a core each are faster than two that share both. Interrupted, it
    ends what it started.
    """
    waiting, running, failed = list(commands), {}, {}
    free = list(range(workers))
    try:
        while waiting or running:
            while waiting and free:
                name, worker = waiting.pop(0), free.pop(0)
                running[name] = worker, _start(commands[name], workdir / name, worker, workers)
                on_change(name, "started")
            time.sleep(TICK_SECONDS)
            for name, (worker, process) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[name]
                free.append(worker)
                if process.returncode:
                    failed[name] = _complaint(workdir / name / OUTPUT, process.returncode)
                on_change(name, f"failed: {failed[name]}" if name in failed else "finished")
            on_tick()
    finally:
        for _, process in running.values():
            process.terminate()
        for _, process in running.values():
            process.wait()
    return failed


def _start(
    command: Sequence[str], folder: Path, worker: int, workers: int
) -> subprocess.Popen[bytes]:
    folder.mkdir(parents=True, exist_ok=True)
    env = dict(os.environ)
    devices = [device for device in env.get("CUDA_VISIBLE_DEVICES", "").split(",") if device]
    if len(devices) >= workers:
        env["CUDA_VISIBLE_DEVICES"] = ",".join(devices[worker::workers])
    with (folder / OUTPUT).open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=env
        )
    cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if len(cpus) >= workers:
        os.sched_setaffinity(process.pid, cpus[worker::workers])
    return process


def _complaint(output: Path, code: int) -> str:
    """The last line that a command printed."""
    lines = output.read_text(errors="replace").strip().splitlines()
    return f"code {code}: {lines[-1].strip() if lines else 'it said nothing'}"
