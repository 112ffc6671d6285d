"""Runs or continues the curriculum of a config in a workdir.

  ouro train --config=configs/tiny.py --workdir=runs/tiny
  ouro train --config=configs/ouro_1p4b.py --dry_run
  ouro train --config=configs/tiny.py --workdir=runs/long --config.stages.anneal.tokens=500_000
  ouro train … --coordinator=10.0.0.1:8476 --num_processes=2 --process_id=0

Repeating the command continues a run that was stopped, from its newest whole checkpoint. SIGTERM
asks it to save at its next step and to end, with code 75. Going on with another config is refused,
unless the keys that changed are free to change (where files lie, how often things are written, how
the work is laid out) or named: `--allow_config_change=stages.anneal.tokens,seed`.

`--dry_run` prints the curriculum as tables, with what each source contributes and how many epochs
that is, and needs no workdir, data or tokenizer: what a source holds is read from its manifest,
else from `data.source_tokens`.

Several processes, one to a host or GPU, run the same command with the same shared workdir. Under
SLURM (`srun`) and on TPU pods they find each other, elsewhere by the three flags of the last
example.
"""

import re
import sys
from collections.abc import Mapping
from typing import Any

from absl import flags
from rich.console import Console
from rich.table import Column, Table

from ouro_jax.cli.common import FLAGS, config_from_flags, define_config, required, run_verb
from ouro_jax.config import Config
from ouro_jax.errors import ConfigError
from ouro_jax.training.dry_run import describe

define_config()
flags.DEFINE_string("workdir", "", "Folder of the run: checkpoints, log, report.")
flags.DEFINE_bool("dry_run", False, "Print the curriculum and leave.")
flags.DEFINE_list("allow_config_change", [], "Keys whose change from the saved config is meant.")
flags.DEFINE_string("coordinator", "", "HOST:PORT where process 0 of several is found.")
flags.DEFINE_integer("num_processes", 0, "How many processes train together.")
flags.DEFINE_integer("process_id", 0, "Which of them this is, from 0.")
flags.DEFINE_enum("distributed", "auto", ["auto", "off"], "off: alone, whatever SLURM or TPU say.")


def main() -> Mapping[str, Any] | None:
    """The verb."""
    config = config_from_flags()
    if FLAGS.dry_run:
        stages = describe(config)
        # Wide enough for 3,000,000,000,000 tokens; a narrower terminal wraps, nothing is cut.
        Console(width=160, soft_wrap=True).print(*curriculum_tables(config, stages), sep="\n")
        return {"name": config.name, "stages": stages}
    workdir = required("workdir", "runs/tiny")
    place = place_from_flags()
    # Loading jax and the data libraries takes seconds; a wrong flag should not wait for them.
    import jax

    from ouro_jax.parallel.hosts import joined
    from ouro_jax.reporting.tables import heldout_table
    from ouro_jax.training.lines import Forgiving
    from ouro_jax.training.run_log import read_log
    from ouro_jax.training.timing import start_clock
    from ouro_jax.training.trainer import train

    start_clock().mark("imports")
    # They may go to a file beside the checkpoints: a full disk there must not end the run.
    sys.stdout, sys.stderr = Forgiving(sys.stdout), Forgiving(sys.stderr)
    with joined(*place, detect=FLAGS.distributed == "auto"):
        start_clock().mark("join")
        result = train(config, workdir, FLAGS.allow_config_change)
        if jax.process_index() > 0:
            return None
        Console().print(heldout_table(read_log(workdir)))
        return result


def place_from_flags() -> tuple[str, int, int]:
    """`--coordinator`, `--num_processes` and `--process_id`: all of them or none."""
    names = ("coordinator", "num_processes", "process_id")
    values = FLAGS.coordinator, FLAGS.num_processes, FLAGS.process_id
    coordinator, processes, process = values
    missing = [name for name in names if not FLAGS[name].present]
    if len(missing) == len(names):
        return values
    if missing:
        raise ConfigError(
            f"--{missing[0]} is missing: several processes take all of --coordinator=HOST:PORT "
            "--num_processes=N --process_id=I; one process takes none of them."
        )
    if not re.fullmatch(r".+:\d+", coordinator):
        raise ConfigError(
            f"--coordinator={coordinator}: expected HOST:PORT, process 0's host and a free port "
            "there, e.g. --coordinator=10.0.0.1:8476"
        )
    if not 0 <= process < processes:
        raise ConfigError(
            f"--process_id={process} with --num_processes={processes}: expected 0 … "
            "num_processes - 1."
        )
    return values


def curriculum_tables(config: Config, stages: list[dict[str, Any]]) -> list[Table]:
    """The stages of a run: how much, how, and on what."""
    tokens = sum(stage["tokens"] for stage in stages)
    flops = sum(stage["flops"] for stage in stages)
    title = f"{config.name}: {tokens:,} tokens, {flops:.3g} FLOPs"
    return [
        _table(stages, title, {
            "tokens": lambda s: f"{s['tokens']:,}",
            "steps": lambda s: f"{s['steps']:,}",
            "batch, tokens": lambda s: _change(s["batch_tokens"][0], s["batch_tokens"][-1], ","),
            "sequence": lambda s: f"{s['sequence_length']:,}",
            "layers × loops": lambda s: f"{s['layers']} × {s['loops']}",
            "parameters": lambda s: f"{s['parameters']:,}",
            "FLOPs": lambda s: f"{s['flops']:.3g}",
            "checkpoints": lambda s: f"{s['checkpoints']:,}",
        }),
        _table(stages, "how", {
            "objective": lambda s: s["objective"],
            "β": lambda s: f"{s['entropy_weight']:g}",
            "warm-up, tokens": lambda s: f"{s['warmup_tokens']:,}",
            "schedule": lambda s: s["schedule"],
            "learning rate": lambda s: _change(s["learning_rate"], s["final_learning_rate"], "g"),
            "RoPE base": lambda s: f"{s['rope_theta']:,.0f}",
            "transition": lambda s: s["transition"],
        }),
        _sources(stages),
    ]  # fmt: skip


def _table(stages: list[dict[str, Any]], title: str, columns: dict[str, Any]) -> Table:
    table = Table("stage", *columns, title=title, title_justify="left")
    for stage in stages:
        table.add_row(stage["stage"], *(text(stage) for text in columns.values()))
    return table


def _sources(stages: list[dict[str, Any]]) -> Table:
    table = Table(
        "stage", "source", *(Column(name, justify="right") for name in (
            "share, %", "rows", "tokens", "tokens available", "epochs so far",
        )), title="sources", title_justify="left",
    )  # fmt: skip
    for stage in stages:
        table.add_section()
        for number, part in enumerate(stage["sources"]):
            available, epochs, limit = part["tokens_available"], part["epochs"], stage["max_epochs"]
            refused = f" > {limit:g}" if epochs and 0 < limit < epochs else ""
            table.add_row(
                "" if number else stage["stage"], part["source"], f"{100 * part['share']:.1f}",
                f"{part['rows']:,}", f"{part['tokens']:,}",
                "?" if available is None else f"{available:,}",
                "?" if epochs is None else f"{epochs:.3f}{refused}",
            )  # fmt: skip
    return table


def _change(first: float, last: float, form: str) -> str:
    start, end = f"{first:{form}}", f"{last:{form}}"
    return start if start == end else f"{start} → {end}"


def run() -> None:
    """Parses flags and runs the verb."""
    run_verb(main, __name__)


if __name__ == "__main__":
    run()
