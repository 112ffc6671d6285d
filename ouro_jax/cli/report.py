"""Writes one self-contained page of plots, tables and samples from what a run wrote.

  ouro report --workdir=runs/tiny

Writes WORKDIR/report.html from metrics.jsonl, config.json and, if there is one, samples.json; a run
that is still going may be reported on. Prints the held-out table too.
"""

from collections.abc import Mapping
from typing import Any

from absl import flags
from rich.console import Console

from ouro_jax.cli.common import required, run_verb

flags.DEFINE_string("workdir", "", "Folder of the run.")


def main() -> Mapping[str, Any]:
    """The verb."""
    workdir = required("workdir", "runs/tiny")
    # Loading matplotlib takes a second; a missing flag should not wait for it.
    from ouro_jax.reporting.report import write_report
    from ouro_jax.reporting.tables import heldout_table
    from ouro_jax.training.run_log import read_log

    path = write_report(workdir)
    Console().print(heldout_table(read_log(workdir)))
    print(f"{path}: open it in a browser.")
    return {"workdir": workdir, "report": str(path)}


def run() -> None:
    """Parses flags and runs the verb."""
    run_verb(main, __name__)


if __name__ == "__main__":
    run()
