"""Runs or continues the curriculum of a config in a workdir.

  ouro train --config=configs/tiny.py --workdir=runs/tiny
  ouro train --config=configs/ouro_1p4b.py --dry_run
  ouro train --config=configs/tiny.py --workdir=runs/long --config.stages.anneal.tokens=500_000

Repeating the command continues a run that was stopped. `--dry_run` prints the curriculum as
tables, with what each source contributes and how many epochs that is, and needs no workdir, data
or tokenizer: what a source holds is read from its manifest, else from `data.source_tokens`.
"""

from collections.abc import Mapping
from typing import Any

from absl import flags
from rich.console import Console
from rich.table import Column, Table

from ouro_jax.cli.common import FLAGS, config_from_flags, define_config, required, run_verb
from ouro_jax.config import Config
from ouro_jax.training.dry_run import describe

define_config()
flags.DEFINE_string("workdir", "", "Folder of the run: checkpoints, log, report.")
flags.DEFINE_bool("dry_run", False, "Print the curriculum and leave.")


def main() -> Mapping[str, Any]:
    """The verb."""
    config = config_from_flags()
    if FLAGS.dry_run:
        stages = describe(config)
        # Wide enough for 3,000,000,000,000 tokens; a narrower terminal wraps, nothing is cut.
        Console(width=160, soft_wrap=True).print(*curriculum_tables(config, stages), sep="\n")
        return {"name": config.name, "stages": stages}
    workdir = required("workdir", "runs/tiny")
    # Loading jax and the data libraries takes seconds; a wrong flag should not wait for them.
    from ouro_jax.reporting.tables import heldout_table
    from ouro_jax.training.run_log import read_log
    from ouro_jax.training.trainer import train

    result = train(config, workdir)
    Console().print(heldout_table(read_log(workdir)))
    return result


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
