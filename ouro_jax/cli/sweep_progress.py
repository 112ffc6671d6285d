"""What `ouro sweep` shows: a line for every start and end of a run, and on a terminal a bar."""

import json
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from ouro_jax.training.progress import clock
from ouro_jax.training.run_log import FILE_NAME

# Holds the last records of a log; the longest take a few kilobytes.
TAIL_BYTES = 1 << 16


class SweepProgress(Progress):
    """A bar over the tokens of all runs; `tokens` of each, `unfinished` those still to run."""

    def __init__(self, tokens: Mapping[str, int], unfinished: Iterable[str], workdir: Path):
        super().__init__(
            TextColumn("{task.description}"), BarColumn(24), console=Console(stderr=True)
        )
        self._tokens, self._workdir = tokens, workdir
        self._running, self._ended = set(), set(tokens) - set(unfinished)
        self._bar = self.add_task("", total=sum(tokens.values()))
        self._start, self._before = time.monotonic(), self._done()

    def changed(self, name: str, what: str) -> None:
        """A run started or ended."""
        (self._running.add if what == "started" else self._ended.add)(name)
        self.console.print(f"{name}: {what}   ({self._where()})", soft_wrap=True)

    def tick(self) -> None:
        """Time has passed."""
        self.update(self._bar, completed=self._done(), description=self._where())

    def _where(self) -> str:
        done, total = self._done(), sum(self._tokens.values())
        running = len(self._running - self._ended)
        text = f"{len(self._ended)} of {len(self._tokens)} ended, {running} running"
        if self._before < done < total:
            left = (time.monotonic() - self._start) * (total - done) / (done - self._before)
            text += f", about {clock(left)} left"
        return text

    def _done(self) -> int:
        """Tokens of the runs that ended, well or not, and of those that have begun."""
        return sum(
            total if name in self._ended else min(self._seen(name), total)
            for name, total in self._tokens.items()
        )

    def _seen(self, name: str) -> int:
        file = self._workdir / name / FILE_NAME
        if not file.is_file():
            return 0
        with file.open("rb") as log:
            log.seek(max(0, file.stat().st_size - TAIL_BYTES))
            whole = log.read().split(b"\n")[:-1]
        return json.loads(whole[-1]).get("tokens", 0) if whole else 0
