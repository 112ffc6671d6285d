"""The scaling law of looped models from the runs of a sweep (paper, Appendix D).

Total loss, over runs of several sizes N, tokens D and trained loops T_m, and step-wise loss L_s
after loop T, apart for each T_m; both by the formula of `scaling_fit.py`. Paper: R² 0.9596 for the
total loss, 0.8898, 0.8146 and 0.795 step-wise at T_m = 2, 4, 8; it does not print coefficients.

The losses are those of training: the total loss is the objective, entropy term included, which no
held-out record has. N counts all parameters, embedding and head included. P points, K = (N, D, T).
"""

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ouro_jax.config import from_config_dict, num_parameters
from ouro_jax.errors import ConfigError, require
from ouro_jax.experiments.scaling_fit import (
    CONFIDENCE,
    FORMULA,
    fit_law,
    intervals,
    r_squared,
    too_few,
    weak_variables,
)
from ouro_jax.training.lines import replace_file
from ouro_jax.training.run_log import FILE_NAME, read_log

# A run's records are averaged over so many equal spans of its tokens; the first ones, in which
# the learning rate warms up, are left out.
SPANS, SPANS_LEFT_OUT = 20, 2
DATA_SHARES = (0.25, 0.5, 0.75)


@dataclass(frozen=True)
class LossPoint:
    """Mean losses of a run in nats per token, around `tokens` tokens seen.

    `loss` is the objective Σ p L - β H, `expected_loss` its first term; `loss_per_loop` and
    `exit_distribution` have an entry for each of the `loops` loops.
    """

    run: str
    parameters: int
    tokens: float
    loops: int
    loss: float
    expected_loss: float
    loss_per_loop: tuple[float, ...]
    exit_distribution: tuple[float, ...]


def run_scaling_law(
    workdirs: Sequence[str | Path], output: str | Path, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Fits the laws to the runs in `workdirs`, writes JSONL to `output` and returns a summary.

    Args:
      workdirs: workdirs of runs, or folders of sweeps with a run in each folder.
      output: gets a `scaling_law` record for each fit (formula, coefficients with their 95 %
        intervals, r2, holdouts), its points as `scaling_point` records, and `scaling_weights`.
      say: is told how far it is.

    Raises ConfigError for a folder without runs, a run that is no plain one, and too few points.
    """
    points = gather_points(workdirs)
    runs = len({point.run for point in points})
    say(f"{len(points)} points of {runs} runs")
    records = list(_law_records("total", None, *_total(points), say))
    for loops in sorted({point.loops for point in points} - {1}):
        of_loops = [point for point in points if point.loops == loops]
        x_PK, loss_P, runs_P = _stepwise(of_loops)
        if complaint := too_few(x_PK):
            say(f"step-wise, T_m = {loops}: not fitted: {complaint}")
            continue
        records += _law_records("stepwise", loops, x_PK, loss_P, runs_P, say)
    records.append(_weights_record(points))
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    replace_file(output, "".join(json.dumps(record) + "\n" for record in records).encode())
    laws = [record for record in records if record["kind"] == "scaling_law"]
    return {
        "output": str(output), "runs": runs, "points": len(points),
        "laws": [{key: law[key] for key in ("law", "trained_loops", "r2", "coefficients",
                                            "holdout_means")} for law in laws],
        "weights_r2": records[-1]["r2"],
    }  # fmt: skip


def gather_points(workdirs: Sequence[str | Path]) -> list[LossPoint]:
    """The points of all runs in `workdirs`; ConfigError for a folder that holds none."""
    points = []
    for workdir in map(Path, workdirs):
        folders = [workdir, *sorted(workdir.iterdir())] if workdir.is_dir() else []
        folders = [folder for folder in folders if (folder / FILE_NAME).is_file()]
        if not folders:
            raise ConfigError(
                f"{workdir}: no run in it; expected a workdir of `ouro train`, or of `ouro sweep` "
                "with runs that have begun."
            )
        for folder in folders:
            points += _points_of_run(folder)
    return points


def _points_of_run(folder: Path) -> Iterator[LossPoint]:
    config = from_config_dict(json.loads((folder / "config.json").read_text()))
    names = [name for name, _ in config.stream()]
    require(len(names) == 1, f"{folder}: stages", names, "a run of one stage, so of one N and T")
    stage, model = config.stages[names[0]], config.stage_model(names[0])
    require(stage.objective == "expected", f"{folder}: objective", stage.objective, "'expected'")
    train = [record for record in read_log(folder) if record["kind"] == "train"]
    for span in range(SPANS_LEFT_OUT, SPANS):
        low, high = (stage.tokens * edge / SPANS for edge in (span, span + 1))
        inside = [record for record in train if low < record["tokens"] <= high
                  and record["loss"] is not None]  # fmt: skip
        if not inside:
            continue

        def mean(key: str, records=inside) -> Any:
            return np.mean([record[key] for record in records], axis=0).tolist()

        yield LossPoint(
            str(folder), num_parameters(model), mean("tokens"), model.num_loops, mean("loss"),
            mean("expected_loss"), tuple(mean("loss_per_loop")), tuple(mean("exit_distribution")),
        )  # fmt: skip


def _total(points: Sequence[LossPoint]) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Points (N, D, T_m) [P, 3], total losses [P] and runs."""
    x_PK = np.array([(p.parameters, p.tokens, p.loops) for p in points], float).reshape(-1, 3)
    return x_PK, np.array([p.loss for p in points]), [p.run for p in points]


def _stepwise(points: Sequence[LossPoint]) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Points (N, D, T) [P, 3] of every loop T, losses after it [P] and runs."""
    each = [(p, t, loss) for p in points for t, loss in enumerate(p.loss_per_loop, start=1)]
    x_PK = np.array([(p.parameters, p.tokens, t) for p, t, _ in each], float).reshape(-1, 3)
    return x_PK, np.array([loss for _, _, loss in each]), [p.run for p, _, _ in each]


def _law_records(
    law: str, trained_loops: int | None, x_PK, loss_P, runs_P, say
) -> Iterator[dict[str, Any]]:
    """The record of a fit, and one for each of its points."""
    which = "total" if trained_loops is None else f"step-wise, T_m = {trained_loops}"
    say(f"{which}: fitting {len(x_PK)} points")
    fit = fit_law(x_PK, loss_P)
    predicted_P, ranges = fit(x_PK), intervals(fit, x_PK, loss_P, runs_P)
    tests = list(_holdouts(x_PK, loss_P))
    means = _means(tests)
    r2 = r_squared(loss_P, predicted_P)
    held_out = ", ".join(f"{by} {mean['r2_heldout']:.4f}" for by, mean in means.items())
    say(f"{which}: R² {r2:.4f}; on what was held out: {held_out or 'nothing to hold out'}")
    weak = weak_variables(x_PK)
    if weak:
        say(f"{which}: too few values of {', '.join(weak)} to settle its coefficients")
    place = {"law": law, "trained_loops": trained_loops}
    yield {
        "kind": "scaling_law", **place, "formula": FORMULA, "points": len(x_PK), "r2": r2,
        "confidence": CONFIDENCE, "weak_variables": weak,
        "coefficients": {
            name: {"value": value, "low": ranges[name][0], "high": ranges[name][1]}
            for name, value in fit.coefficients().items()
        },
        "holdout_means": means, "holdouts": tests,
    }  # fmt: skip
    for (size, tokens, loops), loss, predicted, run in zip(
        x_PK.tolist(), loss_P.tolist(), predicted_P.tolist(), runs_P, strict=True
    ):
        yield {
            "kind": "scaling_point", **place, "run": run, "parameters": int(size),
            "tokens": tokens, "loops": int(loops), "loss": loss, "predicted": predicted,
        }  # fmt: skip


def _holdouts(x_PK: np.ndarray, loss_P: np.ndarray) -> Iterator[dict[str, Any]]:
    """Fits to a part of the points, tried on the rest: the paper's tests, as far as there is
    enough to hold out: 3 of 5 sizes, the first 25, 50 and 75 % of the tokens, all but one T."""
    for by, kept, fitted_P in _splits(x_PK):
        if too_few(x_PK[fitted_P]):
            continue
        predicted_P = fit_law(x_PK[fitted_P], loss_P[fitted_P])(x_PK)
        yield {
            "by": by, "kept": kept, "points": int(fitted_P.sum()),
            "r2_all": r_squared(loss_P, predicted_P),
            "r2_heldout": r_squared(loss_P[~fitted_P], predicted_P[~fitted_P]),
        }  # fmt: skip


def _splits(x_PK: np.ndarray) -> Iterator[tuple[str, list[float], np.ndarray]]:
    """What is varied, which of it is kept, and the points [P] that are fitted."""
    sizes, _, loops = (np.unique(values).tolist() for values in x_PK.T)
    fewer = 2 if len(sizes) >= 5 else 1
    for kept in itertools.combinations(sizes, max(len(sizes) - fewer, 0)):
        yield "sizes", list(kept), np.isin(x_PK[:, 0], kept)
    for share in DATA_SHARES:
        yield "data", [share], x_PK[:, 1] <= share * x_PK[:, 1].max()
    for kept in itertools.combinations(loops, len(loops) - 1):
        yield "loops", list(kept), np.isin(x_PK[:, 2], kept)


def _means(tests: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean R² of the tests of each kind."""
    kinds = dict.fromkeys(test["by"] for test in tests)
    return {
        by: {
            key: float(np.mean([test[key] for test in tests if test["by"] == by]))
            for key in ("r2_all", "r2_heldout")
        }
        for by in kinds
    }


def _weights_record(points: Sequence[LossPoint]) -> dict[str, Any]:
    """How well Σ_s q_s L_s, with the mean exit weights q, gives the total loss (paper: R² 0.961).

    The difference is the entropy term, and that the gate weighs token by token; `r2_expected`
    compares with the objective's first term, where only the latter is left.
    """
    mixed = [np.dot(p.exit_distribution, p.loss_per_loop) for p in points]
    return {
        "kind": "scaling_weights", "points": len(points),
        "r2": r_squared(np.array([p.loss for p in points]), np.array(mixed)),
        "r2_expected": r_squared(np.array([p.expected_loss for p in points]), np.array(mixed)),
    }  # fmt: skip
