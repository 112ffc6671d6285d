"""A training run in a process of its own, with a fault planted at some place.

python tests/fault_run.py '{"config": …, "workdir": …, "at": "evaluation", "do": "term", "call": 0}'

`at` names a function of PLACES; at its `call`-th call the process gets SIGTERM (`do` = "term", or
"kill": SIGKILL) `delay` seconds later, or is stuck there ("stuck").
"""

import functools
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

from absl import logging

from ouro_jax.config import from_config_dict
from ouro_jax.data.mixture import Mixture
from ouro_jax.errors import ConfigError, RunError
from ouro_jax.parallel.hosts import joined
from ouro_jax.training import stage_run, stage_trainer, trainer
from ouro_jax.training.checkpoints import StageCheckpoints
from ouro_jax.training.timing import start_clock

PLACES = {
    "start": (trainer, "prepare_data"),
    "transition": (stage_trainer, "state_from"),
    "data": (Mixture, "read"),
    "evaluation": (stage_run, "evaluate"),
    "checkpoint": (StageCheckpoints, "save"),
    "finishing": (StageCheckpoints, "_finish"),
    "baselines": (trainer, "ngram_baselines"),
}


def stuck() -> None:
    """Sleeps for ever, under a name that a stack shows."""
    time.sleep(1e6)


DEEDS = {
    "term": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stuck": stuck,
}


def planted(function, do: str, call: int, delay: float):
    """`function` with the fault before its `call`-th call, or `delay` seconds after."""
    calls = iter(range(sys.maxsize))

    @functools.wraps(function)
    def with_fault(*arguments, **options):
        if next(calls) == call:
            threading.Timer(delay, DEEDS[do]).start() if delay else DEEDS[do]()
        return function(*arguments, **options)

    return with_fault


def main() -> None:
    """Trains; exit codes are those of the command line."""
    logging.set_verbosity(logging.ERROR)
    start_clock().mark("imports")
    task = json.loads(sys.argv[1])
    fault = task.get("do", "term"), task.get("call", 0), task.get("delay", 0.0)
    if task["at"] == "step":  # call 0 compiles
        compiled = stage_run.compiled_train_step
        stage_run.compiled_train_step = lambda spec: planted(compiled(spec), *fault)
    elif task["at"]:
        owner, name = PLACES[task["at"]]
        setattr(owner, name, planted(getattr(owner, name), *fault))
    config = from_config_dict(json.loads(Path(task["config"]).read_text()))
    place = task.get("place", ["", 0, 0])
    try:
        with joined(*place):
            start_clock().mark("join")
            print(json.dumps(trainer.train(config, task["workdir"])))
    except (ConfigError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
