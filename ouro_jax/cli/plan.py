"""Tells whether a run fits a pod, what it costs and what bounds it; neither has to be there.

  ouro plan --config=configs/ouro_1p4b.py --topology=v5p:4x4x4 --stage=stable_1b

Compiles the train step of the stage, or of every stage, for the topology.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import flags
from rich.console import Console
from rich.table import Table

from ouro_jax.cli.common import FLAGS, config_from_flags, define_config, required, run_verb
from ouro_jax.config import require_choice
from ouro_jax.planning.topologies import parse_topology

define_config()
flags.DEFINE_string("topology", "", "Chips: v5e:16x16, v5p:4x4x4, v6e-256, h100:8, h200:4x8.")
flags.DEFINE_integer("num_slices", 1, "Slices of that topology, joined by the data-center network.")
flags.DEFINE_string("stage", "", "One stage; every stage if not given.")
flags.DEFINE_string("dump_hlo", "", "File for the text of the compiled program.")
flags.DEFINE_string("cache", "~/.cache/ouro_jax/plan", "Folder that keeps what was compiled.")


def main() -> Mapping[str, Any]:
    """The verb."""
    config = config_from_flags()
    topology = parse_topology(required("topology", "v5p:4x4x4"), FLAGS.num_slices)
    if FLAGS.stage:
        require_choice(FLAGS.stage, config.stages, "--stage")
    names = [FLAGS.stage] if FLAGS.stage else [name for name, _ in config.stream()]
    # Loading jax takes seconds; a wrong flag should not wait for it.
    from ouro_jax.planning.compile import compile_all, program_text
    from ouro_jax.planning.plan import describe, stage_layouts, stage_request

    cache = Path(FLAGS.cache).expanduser()
    requests = {}
    for name in names:
        layout = stage_layouts(config, name, topology)[0]
        requests[name] = stage_request(config, name, topology, layout)
    results = dict(compile_all(list(requests.values()), cache))
    stages = [
        describe(config, name, request, results[request], cache)
        for name, request in requests.items()
    ]
    table = Table("stage", "fits", "HBM", "GB moved", "compile s", title=topology.name)
    for row in stages:
        table.add_row(
            row["stage"],
            str(row["fits"]),
            str(row["hbm_gib"]),
            str(row["collective_gb"]),
            str(row["compile_seconds"]),
        )
    Console().print(table)
    if FLAGS.dump_hlo:
        Path(FLAGS.dump_hlo).write_text(program_text(requests[names[0]], cache))
    return stages[0] if FLAGS.stage else {"topology": topology.name, "stages": stages}


def run() -> None:
    """Parses flags and runs the verb."""
    run_verb(main, __name__)


if __name__ == "__main__":
    run()
