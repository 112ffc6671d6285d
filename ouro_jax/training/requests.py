"""What one process asks of all: each gives its word to the step, which gives everyone the highest.

So all processes save, and stop, after the same step, without a message or a wait of their own.
"""

import time

import jax
import numpy as np
from jax.experimental.multihost_utils import reached_preemption_sync_point
from jax.sharding import Mesh

from ouro_jax.training.step import requests_sharding
from ouro_jax.training.watchdog import Watchdog

NOTHING, SAVE, STOP = 0, 1, 2


class Requests:
    """The requests of this process, and what the processes of the run have agreed on.

    The clock of temporary checkpoints is that of process 0; `every_minutes` 0 means none.
    """

    def __init__(self, watchdog: Watchdog, mesh: Mesh, every_minutes: float):
        self._watchdog, self._every = watchdog, 60 * every_minutes
        sharding = requests_sharding(mesh)
        self._arrays = [
            jax.make_array_from_callback(
                (mesh.size,), sharding, lambda index, word=word: np.full(mesh.size, word)[index]
            )
            for word in np.array((NOTHING, SAVE, STOP), np.int32)
        ]
        self.agreed = NOTHING
        self.saved()

    def ask(self, step: int) -> jax.Array:
        """This process's request, an input of the step after `step`."""
        # A platform that tells jax of an end to come, tells all processes the same step.
        if self._watchdog.is_asked_to_stop or reached_preemption_sync_point(step):
            return self._arrays[STOP]
        due = self._every and time.monotonic() - self._saved_at >= self._every
        return self._arrays[SAVE if due and jax.process_index() == 0 else NOTHING]

    def heard(self, request: int) -> None:
        """What a step has brought of all processes."""
        self.agreed = max(self.agreed, request)

    def saved(self) -> None:
        """What was asked for is done; the clock begins anew."""
        self.agreed, self._saved_at = NOTHING, time.monotonic()
