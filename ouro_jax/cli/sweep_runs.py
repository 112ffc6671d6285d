"""What `ouro sweep` and `ouro experiment` share: the runs of a sweep in one folder."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from ouro_jax.config import to_dict
from ouro_jax.errors import ConfigError
from ouro_jax.experiments.sweep import PlannedRun


def train_command(arguments: Sequence[str]) -> list[str]:
    """The command of a process that trains one run."""
    return [sys.executable, "-m", "ouro_jax.cli.train", *arguments]


def check_same_configs(runs: Sequence[PlannedRun], workdir: Path) -> None:
    """A run's name says only what it overrides: the rest must be what it was begun with.

    ConfigError names the folder of one whose rest differs.
    """
    for run in runs:
        folder, config = workdir / run.name, json.dumps(to_dict(run.config))
        file = folder / "config.json"
        if file.is_file() and json.loads(file.read_text()) != json.loads(config):
            raise ConfigError(
                f"{folder} was begun with another config than its file and base have now; restore "
                "them, or choose another --workdir."
            )


def run_here(
    runs: Sequence[PlannedRun], commands: Mapping[str, Sequence[str]], workdir: Path, workers: int
) -> dict[str, str]:
    """Runs the commands, showing how far they are; returns what went wrong, by name."""
    from ouro_jax.cli.sweep_progress import SweepProgress
    from ouro_jax.experiments.sweep_runner import run_commands

    if not commands:
        return {}
    tokens = {run.name: sum(stage.tokens for _, stage in run.config.stream()) for run in runs}
    with SweepProgress(tokens, commands, workdir) as progress:
        return run_commands(commands, workdir, workers, progress.changed, progress.tick)
