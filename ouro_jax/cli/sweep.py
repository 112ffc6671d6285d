"""Runs or submits a sweep: one config, many runs, each overriding some of its keys.

  ouro sweep configs/sweeps/tiny_rates.py --workdir=runs/tiny_rates --workers=2
  ouro sweep configs/sweeps/tiny_rates.py --workdir=runs/tiny_rates --workers=0
  ouro sweep configs/sweeps/ouro_1p4b_rates.py --workdir=/shared/rates \\
      --submit='slurm --nodes=4 --gpus=8' --dry_run
  ouro sweep configs/sweeps/ouro_1p4b_rates.py --workdir=/shared/rates \\
      --submit='xpk --xpk=CLUSTER --type=v5p-128 --image=IMAGE'

Every run is an `ouro train` in WORKDIR/NAME, whose name says what it overrides; output.log there
gets what it prints. Repeating the command continues the runs that are not finished. The results
are printed, and written to WORKDIR/results.csv, .json and .png; `--workers=0` does that alone.
`--submit` hands the unfinished runs to launch/slurm.sh as one array job, or to launch/gke.sh as an
XPK workload each, with the flags that follow the word.
"""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from rich.console import Console

from ouro_jax.cli.common import FLAGS, call_file, required, run_verb
from ouro_jax.cli.sweep_runs import check_same_configs, run_here, train_command
from ouro_jax.errors import ConfigError, RunError, require, require_choice
from ouro_jax.experiments.sweep import Sweep, plan_runs

flags.DEFINE_string("workdir", "", "Folder of the sweep: a folder for each run, and the results.")
flags.DEFINE_integer("workers", 1, "Runs at a time on this machine; 0: only show the results.")
flags.DEFINE_string("submit", "", "slurm or xpk, then flags of launch/slurm.sh or launch/gke.sh.")
flags.DEFINE_integer("run", -1, "Be this one run, counted from 0: what is submitted does it.")
flags.DEFINE_bool("dry_run", False, "Print the commands, and leave.")


def main(file: str = "") -> Mapping[str, Any] | None:
    """The verb: `file` is one of configs/sweeps/."""
    example = "configs/sweeps/tiny_rates.py"
    if not file:
        raise ConfigError(f"name the sweep: ouro sweep {example} --workdir=runs/tiny_rates")
    sweep = call_file(file, "get_sweep", "sweep", example)
    require(isinstance(sweep, Sweep), f"get_sweep() of {file}", sweep, "a Sweep(base=…, runs=…)")
    base = call_file(sweep.base, "get_config", "base", "configs/tiny.py")
    runs = plan_runs(sweep, base.to_dict())
    workdir = Path(required("workdir", "runs/tiny_rates"))
    require(FLAGS.workers >= 0, "workers", FLAGS.workers, "0 or more")
    require(FLAGS.run < len(runs), "run", FLAGS.run, f"0 to {len(runs) - 1}")
    commands = {
        run.name: [f"--config={sweep.base}", *run.flags(), f"--workdir={workdir / run.name}"]
        for run in runs
    }
    check_same_configs(runs, workdir)
    if FLAGS.run >= 0:
        os.execv(sys.executable, train_command(commands[runs[FLAGS.run].name]))
    # Loading matplotlib and jax takes seconds; what is wrong above should not wait for them.
    from ouro_jax.reporting.sweep import read_result

    def results() -> list[Any]:
        return [read_result(run.name, run.labels, workdir / run.name) for run in runs]

    unfinished = [result.name for result in results() if result.status != "finished"]
    if FLAGS.dry_run:
        for name in unfinished:
            print(shlex.join(["ouro", "train", *commands[name]]), flush=True)
    if FLAGS.submit:
        _submit(
            file, workdir, [number for number, run in enumerate(runs) if run.name in unfinished]
        )
    if FLAGS.dry_run or FLAGS.submit:
        return {"workdir": str(workdir), "unfinished": unfinished}
    todo = {name: train_command(commands[name]) for name in unfinished if FLAGS.workers}
    return _show(results, run_here(runs, todo, workdir, FLAGS.workers), workdir)


def _submit(file: str, workdir: Path, numbers: Sequence[int]) -> None:
    """Hands runs to a launcher; what came of them is read by repeating with --workers=0."""
    place, *options = shlex.split(FLAGS.submit)
    require_choice(place, ("slurm", "xpk"), "submit")
    if not Path("launch").is_dir():
        raise ConfigError("--submit: there is no launch/ here; run it from the project's folder.")
    if FLAGS.dry_run:
        options.append("--dry_run")
    command = ["--", "sweep", file, f"--workdir={workdir}"]
    if place == "slurm" and numbers:
        tasks = ",".join(map(str, numbers))
        _launch(
            "slurm", f"--name={workdir.name}", f"--array={tasks}", *options, *command, "--run=%a"
        )
    elif place == "xpk":
        for number in numbers:
            name = f"--name={workdir.name}-{number}"
            _launch("gke", name, *options, *command, f"--run={number}")


def _launch(script: str, *arguments: str) -> None:
    code = subprocess.run([f"launch/{script}.sh", *arguments]).returncode
    if code == 2:
        raise ConfigError(f"--submit={FLAGS.submit}: launch/{script}.sh refused it, as said above.")
    if code:
        raise RunError(f"launch/{script}.sh ended with code {code}, as said above.")


def _show(results: Any, failed: Mapping[str, str], workdir: Path) -> Mapping[str, Any]:
    """Prints and writes the results; RunError if a run failed, after the line of JSON."""
    from ouro_jax.reporting.sweep import best_result, results_table, write_results

    results = results()
    workdir.mkdir(parents=True, exist_ok=True)
    write_results(results, workdir)
    Console().print(results_table(results))
    best = best_result(results)
    if best is not None:
        print(f"best: {best.name}, {best.bits_per_byte:.4f} bits per byte")
    print(f"{workdir}/results.csv, results.json" + (", results.png" if best else ""))
    summary = {
        "workdir": str(workdir), "best": best and best.name, "failed": dict(failed),
        "runs": [result.columns() for result in results],
    }  # fmt: skip
    if not failed:
        return summary
    if FLAGS.json:
        print(json.dumps(summary))
    listed = "".join(f"\n  {name}: {error}" for name, error in failed.items())
    raise RunError(
        f"{len(failed)} of {len(results)} runs failed; what they printed is in their output.log."
        + listed
    )


def run() -> None:
    """Parses flags and runs the verb."""
    run_verb(main, __name__, max_words=1)


if __name__ == "__main__":
    run()
