"""Reads one host's part of a run's rows, and the process that does so among others.

    python tests/read_hosts.py '{"hosts": 2, "host": 1, "address": "127.0.0.1:4000", …}'

The host's place is what `jax.distributed` says. Nothing is trained.
"""

import contextlib
import hashlib
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax

from ouro_jax.config import Config, from_config_dict
from ouro_jax.training.curriculum import StagePlan
from ouro_jax.training.stage_rows import open_stage_mixture


class Step(NamedTuple):
    """What one host had of an optimizer step: the rows of its batch, each as a hash of it all."""

    stage: str
    start: int
    end: int
    rows: list[str]


def read_steps(config: Config, stage: str, row: int, host: int, num_hosts: int) -> Iterator[Step]:
    """The steps of a run from global row `row` of `stage` on, through all later stages."""
    stream = config.stream()
    names = [name for name, _ in stream]
    for name, described in stream[names.index(stage) :]:
        plan = StagePlan(name, described)
        mixture = open_stage_mixture(config, Path(config.data.root), plan)
        position = row if name == stage else 0
        batches = mixture.batches(position, plan.batch_rows, host=host, num_hosts=num_hosts)
        with contextlib.closing(batches):
            for start, batch in batches:
                rows = [
                    hashlib.sha256(b"".join(array[i].tobytes() for array in batch)).hexdigest()[:16]
                    for i in range(len(batch.tokens_BL))
                ]
                yield Step(name, start, start + plan.batch_rows(start), rows)


def main() -> None:
    """Joins the other processes, reads so many steps, writes them to a file and stops."""
    task = json.loads(sys.argv[1])
    jax.distributed.initialize(task["address"], task["hosts"], task["host"])
    config = from_config_dict(json.loads(Path(task["config"]).read_text()))
    place = jax.process_index(), jax.process_count()
    steps = read_steps(config, task["stage"], task["row"], *place)
    taken = list(itertools.islice(steps, task["steps"]))
    steps.close()
    Path(task["output"]).write_text(json.dumps(taken))


if __name__ == "__main__":
    main()
