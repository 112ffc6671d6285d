"""Evaluates the trained runs of an experiment into `WORKDIR/results.jsonl`, once each."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ouro_jax.config import ModelConfig, num_parameters
from ouro_jax.data.mixture import open_source
from ouro_jax.data.rows import RowSource
from ouro_jax.data.tasks.capo import Capo
from ouro_jax.data.tasks.rows import make_task
from ouro_jax.data.tasks.task import Task
from ouro_jax.experiments.answers import Score, has_many_answers, judge_answers, score_answers
from ouro_jax.experiments.capacity import bits_per_parameter, max_bits_per_parameter
from ouro_jax.experiments.sweep import PlannedRun
from ouro_jax.training.checkpoint_files import checkpoint_root, steps_of
from ouro_jax.training.checkpoints import load_params, load_position
from ouro_jax.training.curriculum import StagePlan
from ouro_jax.training.lines import Lines, read_lines
from ouro_jax.training.trainer import prepare_data

RESULTS = "results.jsonl"
Record = dict[str, Any]


def read_results(workdir: Path) -> list[Record]:
    """The records of `workdir/results.jsonl`, none if there is no such file."""
    path = workdir / RESULTS
    return read_lines(path) if path.is_file() else []


def evaluate_runs(
    runs: Sequence[PlannedRun], workdir: Path, loops: Sequence[int], tell: Callable[[str], None]
) -> list[Record]:
    """Evaluates each finished run that is not in results.jsonl yet; returns all its records.

    A record says what one run scored on one held-out set after one number of loops: `value` is in
    units of `metric`, beside the `reference` that it is to be seen against. A run is
    measured whole before any of its records is written.
    """
    records = read_results(workdir)
    known = {record["run"] for record in records}
    for run in runs:
        if run.name in known or not _is_finished(run, workdir / run.name):
            continue
        tell(f"{run.name}: evaluating")
        new = list(_evaluate(run, workdir / run.name, loops))
        records += new
        with contextlib.closing(Lines(workdir / RESULTS)) as lines:
            for record in new:
                lines.append(record)
    return records


def unfinished(runs: Sequence[PlannedRun], workdir: Path) -> list[PlannedRun]:
    """The runs that have neither results nor been trained to their end."""
    known = {record["run"] for record in read_results(workdir)}
    return [
        run for run in runs
        if run.name not in known and not _is_finished(run, workdir / run.name)
    ]  # fmt: skip


def _is_finished(run: PlannedRun, folder: Path) -> bool:
    """Whether the last stage of a run has been trained to its end."""
    name, stage = run.config.stream()[-1]
    root = checkpoint_root(folder)
    if not folder.is_dir() or not steps_of(root / name):
        return False
    return load_position(root / name).rows >= StagePlan(name, stage).total_rows


def _evaluate(run: PlannedRun, folder: Path, loops: Sequence[int]) -> Iterator[Record]:
    name, stage = run.config.stream()[-1]
    root, task = prepare_data(run.config), make_task(run.config.data.task)
    position, params = load_params(folder)
    described = {
        "kind": "answers", "run": run.name, "labels": run.labels, "layers": stage.num_layers,
        "trained_loops": stage.num_loops, "seed": run.config.seed,
        "learning_rate": stage.learning_rate, "parameters": num_parameters(position.model),
        "tokens": position.tokens_seen, "step": position.step,
    }  # fmt: skip
    scores: dict[str, list[Score]] = {}
    for heldout in task.heldout_sets:
        rows = open_source(root, heldout, "heldout", stage.sequence_length)
        assert isinstance(rows, RowSource), "held-out rows are files"
        scores[heldout] = _scores(position.model, params, task, heldout, rows, loops)
        for score in scores[heldout]:
            yield {
                **described, "set": heldout, **dataclasses.asdict(score), "metric": "exact match",
                "value": score.exact, "reference": "chance",
                "reference_value": task.chance(heldout),
            }  # fmt: skip
    if isinstance(task, Capo):
        parameters = described["parameters"]
        for names, values in zip(scores["names"], scores["values"], strict=True):
            assert names.nats is not None and values.nats is not None, "they are compared"
            yield {
                **described, "set": "biographies", "loops": names.loops,
                "metric": "bits per parameter",
                "value": bits_per_parameter(task, names.nats, values.nats, parameters),
                "reference": "all that there is to know",
                "reference_value": max_bits_per_parameter(task, parameters),
            }  # fmt: skip


def _scores(
    model: ModelConfig, params: Any, task: Task, heldout: str, rows: RowSource,
    loops: Sequence[int],
) -> list[Score]:  # fmt: skip
    if has_many_answers(task, heldout):
        return judge_answers(model, params, task, heldout, loops)
    return score_answers(model, params, rows, loops)
