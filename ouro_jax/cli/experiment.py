"""Reproduces a controlled experiment of the paper: trains its models, evaluates them, draws them.

  ouro experiment mano --protocol=smoke --workdir=runs/mano_smoke
  ouro experiment mano --protocol=small --workdir=runs/mano --workers=2
  ouro experiment mano --protocol=paper --workdir=runs/mano_paper --dry_run

NAME is a card, configs/experiments/NAME.py: its docstring says what it needs, how long it takes
and what to expect. Every model is an `ouro train` in WORKDIR/RUN; repeating the command goes on
where it stood. Writes WORKDIR/results.jsonl, results.png and report.html. `--workers=0` trains
nothing and shows what there is.

  ouro experiment depth --checkpoint=runs/tiny --workdir=runs/tiny_depth
  ouro experiment exit --checkpoint=runs/tiny/sft --checkpoint=runs/tiny/gate --workdir=runs/exit
  ouro experiment kv --checkpoint=runs/tiny --workdir=runs/kv
  ouro experiment faithfulness --checkpoint=runs/tiny --workdir=runs/faithfulness
  ouro experiment safety --checkpoint=runs/tiny --data=HEx-PHI --judge=gpt-4o --workdir=runs/safety
  ouro experiment scaling_law --checkpoint=runs/scaling_law --workdir=runs/law

These study what is trained: depth and exit on held-out rows (of the run, or at --data), KV policies
on held-out prompts, probes and agreement of depths on question pairs (our templates, or Quora's TSV
by --data), answers to HEx-PHI by depth (the user's copy, by --data), the scaling law over the runs
of a sweep. Records and figures lie in WORKDIR.
"""

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import flags
from rich.console import Console

from ouro_jax.cli.common import FLAGS, call_file, required, run_verb
from ouro_jax.cli.studies import STUDIES, Asked, study
from ouro_jax.cli.sweep_runs import check_same_configs, run_here, train_command
from ouro_jax.errors import ConfigError, RunError, nearest, require, require_choice
from ouro_jax.experiments.experiment import PROTOCOLS, Experiment
from ouro_jax.experiments.sweep import PlannedRun, Sweep, plan_runs

CARDS = Path("configs/experiments")

flags.DEFINE_string("protocol", "small", "smoke, small or paper.")
flags.DEFINE_string("workdir", "", "Folder of the experiment: a folder for each run, the results.")
flags.DEFINE_integer("workers", 2, "Runs at a time on this machine; 0: only show the results.")
flags.DEFINE_multi_string("checkpoint", [], "What a study is of; exit takes several, in order.")
flags.DEFINE_string("data", "", "Prepared data, Quora's TSV or HEx-PHI: see above.")
flags.DEFINE_string("judge", "", "Of safety: the judging model; its key is $OPENAI_API_KEY.")
flags.DEFINE_string("judge_url", "", "Of safety: its OpenAI-compatible endpoint, ending in /v1.")
flags.DEFINE_string("mode", "base", "Of safety: how the model answers, base or thinking.")
flags.DEFINE_bool("dry_run", False, "Print the commands of the runs, and leave.")


def main(name: str = "") -> Mapping[str, Any] | None:
    """The verb: `name` is that of a card or of a study."""
    if name in STUDIES:
        workdir = Path(required("workdir", f"runs/{name}"))
        return study(name, Asked(
            FLAGS.checkpoint, FLAGS.data, workdir, FLAGS.judge, FLAGS.judge_url, FLAGS.mode
        ))  # fmt: skip
    card = f"{_card(name)}:{FLAGS.protocol}"
    require_choice(FLAGS.protocol, PROTOCOLS, "--protocol")
    require(FLAGS.workers >= 0, "--workers", FLAGS.workers, "0 or more")
    experiment, runs = plan_experiment(card)
    workdir = Path(required("workdir", f"runs/{name}"))
    commands = {
        run.name: [f"--config={card}", *run.flags(), f"--workdir={workdir / run.name}"]
        for run in runs
    }
    check_same_configs(runs, workdir)
    if FLAGS.dry_run:
        for command in commands.values():
            print(shlex.join(["ouro", "train", *command]))
        return {"workdir": str(workdir), "runs": list(commands)}
    # Loading jax takes seconds; what is wrong above should not wait for it.
    from ouro_jax.experiments.results import unfinished

    todo = {run.name: train_command(commands[run.name]) for run in unfinished(runs, workdir)
            if FLAGS.workers}  # fmt: skip
    failed = run_here(runs, todo, workdir, FLAGS.workers)
    summary = _show(experiment, runs, workdir)
    if failed:
        listed = "".join(f"\n  {name}: {error}" for name, error in failed.items())
        raise RunError(
            f"{len(failed)} of {len(runs)} runs failed; what they printed is in their output.log."
            + listed
        )
    return summary


def plan_experiment(card: str) -> tuple[Experiment, list[PlannedRun]]:
    """The experiment of a card, FILE.py:PROTOCOL, and its runs."""
    example = str(CARDS / "mano.py")
    experiment = call_file(card, "get_experiment", "experiment", example)
    base = call_file(card, "get_config", "experiment", example)
    return experiment, plan_runs(Sweep(card, experiment.runs), base.to_dict())


def _card(name: str) -> Path:
    if not CARDS.is_dir():
        raise ConfigError(f"there is no {CARDS}/ here; run it from the project's folder.")
    names = [*sorted(file.stem for file in CARDS.glob("*.py")), *STUDIES]
    if name not in names:
        raise ConfigError(
            f"experiment {name!r}: expected one of {', '.join(names)}.{nearest(name, names)}"
        )
    return CARDS / f"{name}.py"


def _show(experiment: Experiment, runs: list[PlannedRun], workdir: Path) -> Mapping[str, Any]:
    """Evaluates what is trained, prints the table and draws the figures."""
    from ouro_jax.experiments.results import evaluate_runs
    from ouro_jax.reporting.experiment import (
        DESCRIBED,
        results_table,
        summarise,
        write_report,
    )

    workdir.mkdir(parents=True, exist_ok=True)
    described = {"name": experiment.name, "protocol": FLAGS.protocol, "axis": experiment.axis,
                 "main_set": experiment.main_set, "published": list(experiment.published),
                 "differences": list(experiment.differences)}  # fmt: skip
    (workdir / DESCRIBED).write_text(json.dumps(described, indent=1) + "\n")
    console = Console(stderr=True)
    records = evaluate_runs(runs, workdir, experiment.loops, console.print)
    summary = summarise(records, experiment.axis, experiment.main_set)
    Console().print(results_table(summary))
    print(", ".join(map(str, write_report(workdir))) or "no run is finished yet")
    return {"workdir": str(workdir), "models": summary, "runs": len(runs)}


def run() -> None:
    """Parses flags and runs the verb."""
    run_verb(main, __name__, max_words=1)


if __name__ == "__main__":
    run()
