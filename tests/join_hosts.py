"""One of several processes that join and then do what a task says.

    python tests/join_hosts.py '{"hosts": 2, "host": 1, "address": "127.0.0.1:4000", "act": "sum"}'

"sum" adds over all devices without end. The limits of `hosts` are made short.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.errors import JaxRuntimeError
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ouro_jax.errors import ConfigError
from ouro_jax.parallel import hosts


def sum_for_ever(task: dict) -> None:
    """Collectives; at the tenth the process does to itself what the task says."""
    mesh = Mesh(np.array(jax.devices()), "x")
    sharding = NamedSharding(mesh, PartitionSpec("x"))
    ones = jax.make_array_from_callback((8,), sharding, lambda index: np.ones(8)[index])
    add = jax.jit(jnp.sum, out_shardings=NamedSharding(mesh, PartitionSpec()))
    for number in range(10**6):
        assert float(add(ones)) == 8
        time.sleep(0.05)
        if number == 10 and "signal" in task:
            os.kill(os.getpid(), signal.Signals[task["signal"]])


def main() -> None:
    """Joins, and acts."""
    task = json.loads(sys.argv[1])
    hosts.HEARTBEAT_SECONDS, hosts.SHARED_SECONDS = 8, 1.0
    place = task["address"], task["hosts"], task["host"]
    with hosts.joined(*place, join_seconds=task.get("join_seconds", 60)):
        match task["act"]:
            case "sum":
                sum_for_ever(task)
            case "config_error":
                raise ConfigError("model.x is wrong")
            case "error":
                raise ZeroDivisionError("of process 1")
            case "collective":
                raise JaxRuntimeError("INTERNAL: Gloo: connection closed by peer")
            case "barrier":
                hosts.barrier("here", timeout=2)
            case "sleep":
                time.sleep(60)
            case "share":
                hosts.require_shared(Path(task["folder"]))


if __name__ == "__main__":
    main()
