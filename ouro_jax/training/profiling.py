"""Traces of a few steps by `jax.profiler`, asked for in the config or of a running process."""

from pathlib import Path

import jax

from ouro_jax.config import ProfileConfig

REQUEST_NAME = "profile_now"


class Profiler:
    """Writes traces of whole steps to `WORKDIR/profile/<stage>-<step>/`.

    One begins at step `config.start_step` of the run, and before the next step whenever somebody
    makes the file `WORKDIR/profile_now`, which is then removed. Only process 0 traces (`enabled`):
    all devices run the same program, and a file that many hosts see at different moments would
    need agreeing on. Close it, or use `with`: a trace that is running is then written.
    """

    def __init__(self, config: ProfileConfig, workdir: Path, *, enabled: bool = True):
        self._config, self._workdir, self._enabled = config, workdir, enabled
        self._request = workdir / REQUEST_NAME
        self._end: int | None = None

    def is_due(self, step: int) -> bool:
        """Whether `turn` has something to do before `step`; the caller then ends all others."""
        if self._end is not None:
            return step >= self._end
        return self._enabled and (step == self._config.start_step or self._request.exists())

    def turn(self, stage: str, step: int) -> str:
        """Begins a trace before `step`, or ends the one that runs; returns what to tell."""
        if self._end is not None:
            return self.close()
        self._request.unlink(missing_ok=True)
        self._folder = self._workdir / "profile" / f"{stage}-{step}"
        self._end = step + self._config.num_steps
        jax.profiler.start_trace(self._folder)
        return f"{stage}: tracing {self._config.num_steps} steps from step {step:,} on."

    def close(self) -> str:
        """Ends the trace that runs, if any."""
        if self._end is None:
            return ""
        self._end = None
        jax.profiler.stop_trace()
        return f"Wrote a trace: `xprof {self._folder}`, or open its .trace.json.gz in Perfetto."
