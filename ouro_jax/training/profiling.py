"""Traces of a few steps by `jax.profiler`, asked for in the config or of a running process."""

from collections.abc import Callable
from pathlib import Path

import jax

from ouro_jax.config import ProfileConfig

REQUEST_NAME = "profile_now"


class Profiler:
    """Writes traces of whole steps to `WORKDIR/profile/<stage>-<step>/`.

    One begins at step `config.start_step` of the run, and before the next step whenever somebody
    makes the file `WORKDIR/profile_now`, which is then removed. Only process 0 traces (`enabled`):
    all devices run the same program, and a file that many hosts see at different moments would
    need agreeing on. Closing it writes the trace that runs. `tell` gets what a person should read.
    """

    def __init__(
        self, config: ProfileConfig, workdir: Path, tell: Callable[[str], None] = print,
        *, enabled: bool = True,
    ):  # fmt: skip
        self._config, self._enabled, self._tell = config, enabled, tell
        self._folder, self._request = workdir / "profile", workdir / REQUEST_NAME
        self._end: int | None = None

    def is_due(self, step: int) -> bool:
        """Whether `turn` has something to do before `step`; the caller then ends all others."""
        if self._end is not None:
            return step >= self._end
        return self._enabled and (step == self._config.start_step or self._request.exists())

    def turn(self, stage: str, step: int) -> None:
        """Begins a trace before `step`, or ends the one that runs."""
        if self._end is not None:
            return self.close()
        self._request.unlink(missing_ok=True)
        self._end = step + self._config.num_steps
        options = jax.profiler.ProfileOptions()
        # Every Python call as well would slow the host down and crowd out the steps in the trace.
        options.python_tracer_level = 0
        folder = self._folder / f"{stage}-{step}"
        jax.profiler.start_trace(folder, profiler_options=options)
        self._tell(f"{stage}: tracing {self._config.num_steps} steps from step {step:,} on.")

    def close(self) -> None:
        """Ends the trace that runs, if any."""
        if self._end is not None:
            self._end = None
            jax.profiler.stop_trace()
            self._tell(f"Traced. Open {self._folder} with xprof, its .trace.json.gz in Perfetto.")
