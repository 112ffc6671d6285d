"""One self-contained page about a run, made from what it wrote into its workdir."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from ouro_jax.config import Config, from_config_dict
from ouro_jax.errors import ConfigError
from ouro_jax.reporting import happenings, page, plots
from ouro_jax.reporting.history import RunHistory, sort_records
from ouro_jax.reporting.timeline import timeline
from ouro_jax.training.events import read_events
from ouro_jax.training.run_log import FILE_NAME, read_log
from ouro_jax.training.timing import read_times

REPORT_NAME, SAMPLES_NAME = "report.html", "samples.json"


class Plot(NamedTuple):
    """A figure of the report: its title, what to look for, and what the run must have logged."""

    title: str
    draw: Callable[[RunHistory, plots.Canvas], Figure]
    look_for: str
    needs: str = "train"


PLOTS = (
    Plot(
        "Loss at each depth", plots.loss_per_loop,
        "Every line is the training loss if all tokens left after that loop (logarithmic scale). "
        "Look for the lines to fall, and to part: the wider the gap between loop 1 and the last, "
        "the more the later loops add. A stage on other text, or with other loops, may jump.",
    ),
    Plot(
        "Held-out loss against depth", plots.heldout_by_depth,
        "Bits per byte on text never trained on, when the model is made to run 1, 2, 3 … loops; "
        "one line a stage, later stages stronger, the dot at the depth that was trained. Look for "
        "lines that fall up to the dot: then depth pays. What they do right of it says how far "
        "the model can be looped beyond its training.",
        needs="heldout",
    ),
    Plot(
        "Where tokens leave", plots.exit_distribution,
        "The share of tokens for which the gate chooses each loop. Look for all colours to stay "
        "in use: one that takes the whole height means that the gate has collapsed to one depth.",
    ),
    Plot(
        "Mean exit depth", plots.mean_depth,
        "The loops that a token runs on average, against those that it could. Look for a jump in "
        "the gate stage, if there is one: it trains the gate by itself, on whether a further loop "
        "lowers the loss.",
    ),
    Plot(
        "Learning rate and batch size", plots.learning_rate_and_batch,
        "What the schedule did. Look for warm-up at the very start and decay where a stage "
        "anneals, and compare their moments with jumps of the loss above.",
    ),
    Plot(
        "Speed", plots.speed,
        "Training speed, without pauses for evaluation and checkpoints, and MFU: what share of "
        "the devices' peak arithmetic the model's own computation makes, recomputation not "
        "counted. Look for a level line within a stage; a dip is a slow disk, network or "
        "neighbour.",
    ),
    Plot(
        "How long a step takes", plots.step_seconds,
        "Half of the steps take no longer than p50, one in a hundred longer than p99; p90 and "
        "above are those of the worst window nearby (logarithmic scale). Look for lines close to "
        "each other: a gap means that all devices now and then wait, for data, for one slow host, "
        "or for the host's other work.",
    ),
    Plot(
        "The run over wall time", timeline,
        "All attempts at the run, since the first began. Look for one steady climb. A fall is a "
        "restart or a rollback, the red end before it the steps that were trained again, a shade "
        "the time in which nothing ran. Dashed lines begin stages; ticks at the foot are "
        "checkpoints, the tall ones kept for good. Each row of marks is one kind of thing that "
        "happened, with its count; the strip says what the time went to.",
        needs="seconds",
    ),
    Plot(
        "Where the time went", plots.where_time_went,
        "Wall time of each stage, all attempts together. Goodput is the share of steps that "
        "count; repeated are steps trained again after a restart, stopped the time between the "
        "last sign of life and the restart, data the wait for rows while the devices were idle, "
        "checkpoint what of saving the steps waited for, other the start of the process. Look "
        "for what is widest beside the steps.",
        needs="seconds",
    ),
)  # fmt: skip


def write_report(workdir: str | Path, samples: Sequence[page.Sample] | None = None) -> Path:
    """Writes `workdir/report.html` and returns its path.

    Reads `metrics.jsonl`, and `times.jsonl`, `events.jsonl`, `config.json` and `samples.json` where
    they exist; `samples` takes the place of the last. Raises ConfigError if the log is missing,
    corrupt or empty.
    """
    workdir = Path(workdir)
    run = sort_records(read_log(workdir), read_times(workdir), read_events(workdir))
    if not run.stages:
        raise ConfigError(
            f"{workdir / FILE_NAME}: no stage has begun, so there is nothing to report yet."
        )
    config = _read_config(workdir / "config.json")
    name = config.name if config else workdir.resolve().name
    planned = [stage for stage, _ in config.stream()] if config else []
    if samples is None:
        samples = _read_samples(workdir / SAMPLES_NAME)
    body = [
        page.header(name, run, planned),
        page.heldout_section(run),
        *(_figure(plot, run) for plot in PLOTS),
        happenings.happenings_section(run),
        page.samples_section(samples),
        page.timeline_section(run),
        _footer(config is None),
    ]
    path = workdir / REPORT_NAME
    path.write_text(page.document(f"{name} · training report", body), encoding="utf-8")
    return path


def _figure(plot: Plot, run: RunHistory) -> str:
    if not any(getattr(stage, plot.needs) for stage in run.stages):
        kinds = {
            "train": "training steps were logged", "heldout": "held-out text was measured",
            "seconds": "times were logged",
        }  # fmt: skip
        return page.section(plot.title, "", page.missing(f"Left out: no {kinds[plot.needs]} yet."))
    drawings = [plots.svg(plot.draw, run, canvas) for canvas in (plots.WIDE, plots.NARROW)]
    return page.figure(plot.title, drawings, plot.look_for)


def _footer(no_config: bool) -> str:
    config = " There was no config.json, so planned stages are not known." if no_config else ""
    return (
        "<footer>\n<p>Curves are averages over neighbouring logged steps. Stages shorter than a "
        "tenth of the run are drawn wider than their share of tokens; the numbers under the "
        f"plots tell the tokens at the stages' ends.{config}</p>\n</footer>\n"
    )


def _read_config(path: Path) -> Config | None:
    return from_config_dict(_read_json(path)) if path.is_file() else None


def _read_samples(path: Path) -> list[page.Sample]:
    return _read_json(path) if path.is_file() else []


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON ({error}). Restore the file, or delete it.") from error
