"""The fits of Appendix D on losses whose law is known, and what is read from runs."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
from micro_run import micro_config

from ouro_jax.config import num_parameters, to_dict
from ouro_jax.errors import ConfigError
from ouro_jax.experiments.scaling_fit import fit_law, intervals, r_squared, too_few
from ouro_jax.experiments.scaling_law import gather_points, run_scaling_law

PLANTED = {
    "E": 1.7, "A": 120.0, "alpha": 0.3, "t1": 2e6, "B": 300.0, "beta": 0.32, "t2": 5e7,
    "C": 0.35, "gamma": 1.2, "t3": 0.3,
}  # fmt: skip
NOISE = 0.003


def planted_loss(x_PK, law=PLANTED):
    size, tokens, loops = x_PK.T
    return (
        law["E"]
        + law["A"] / (size + law["t1"]) ** law["alpha"]
        + law["B"] / (tokens + law["t2"]) ** law["beta"]
        + law["C"] / (loops + law["t3"]) ** law["gamma"]
    )


@pytest.fixture(scope="module")
def planted():
    """The paper's sizes and loops, ten measurements of each run: points, losses, runs."""
    rng = np.random.default_rng(2)
    runs = list(itertools.product((53e6, 134e6, 374e6, 778e6, 1.364e9), (1, 2, 4, 8)))
    x_PK = np.array([(n, d, t) for n, t in runs for d in np.linspace(2e9, 20e9, 10)])
    noise_P = rng.normal(0, NOISE, len(x_PK))
    return x_PK, planted_loss(x_PK) + noise_P, [f"{run}" for run in runs for _ in range(10)]


def test_planted_coefficients_are_recovered_within_the_stated_error(planted):
    x_PK, loss_P, runs_P = planted
    law = fit_law(x_PK, loss_P)
    found, ranges = law.coefficients(), intervals(law, x_PK, loss_P, runs_P)
    outside = [name for name, (low, high) in ranges.items() if not low <= PLANTED[name] <= high]
    assert not outside
    # An interval that holds everything would say nothing.
    assert ranges["E"][1] - ranges["E"][0] < 0.3
    assert ranges["alpha"][1] - ranges["alpha"][0] < 0.15
    assert ranges["gamma"][1] - ranges["gamma"][0] < 1.0
    assert np.sqrt(np.mean((law(x_PK) - loss_P) ** 2)) < 1.1 * NOISE
    np.testing.assert_allclose(law(x_PK), planted_loss(x_PK, found), rtol=1e-9)


def test_an_unseen_size_is_predicted(planted):
    x_PK, loss_P, _ = planted
    largest_P = x_PK[:, 0] == x_PK[:, 0].max()
    law = fit_law(x_PK[~largest_P], loss_P[~largest_P])
    assert r_squared(loss_P[largest_P], law(x_PK[largest_P])) > 0.98
    assert np.abs(law(x_PK[largest_P]) - planted_loss(x_PK[largest_P])).max() < 0.02


def test_r_squared_by_hand():
    assert r_squared(np.array([1.0, 2.0, 3.0]), np.array([1.0, 2.0, 4.0])) == 0.5
    assert r_squared(np.array([1.0, 2.0, 3.0]), np.array([2.0, 2.0, 2.0])) == 0.0


def test_too_few_points_are_refused(planted):
    x_PK, loss_P, _ = planted
    with pytest.raises(ConfigError, match="10 points, expected more than its 10 coefficients"):
        fit_law(x_PK[:10], loss_P[:10])
    one_size_P = x_PK[:, 0] == 53e6
    with pytest.raises(ConfigError, match="parameters N = 5.3e.07, expected at least two values"):
        fit_law(x_PK[one_size_P], loss_P[one_size_P])
    assert too_few(x_PK) == ""


# A law for the micro model's sizes; per-loop losses follow one in T, totals another in T_m.
SMALL = {
    "E": 1.0, "A": 60.0, "alpha": 0.4, "t1": 100.0, "B": 50.0, "beta": 0.35, "t2": 1000.0,
    "C": 0.5, "gamma": 1.0, "t3": 0.5,
}  # fmt: skip


def write_run(folder, width, loops, **changes):
    """A run's folder: config and 100 records, the first ten of which are nonsense."""
    config = micro_config("data")
    stage = config.stages["stable_1a"]
    stage = dataclasses.replace(stage, tokens=100_000, num_loops=loops, warmup_tokens=0, **changes)
    model = dataclasses.replace(
        config.model, hidden_size=width, num_heads=1, num_kv_heads=1, num_layers=1
    )
    config = dataclasses.replace(config, model=model, stages={"stable_1a": stage})
    size = num_parameters(config.stage_model("stable_1a"))
    weights = np.full(loops, 1 / loops)
    rng, lines = np.random.default_rng(width + loops), []
    for step in range(1, 101):
        point = np.array([(size, 1000 * step, t) for t in (*range(1, loops + 1), loops)], float)
        losses = planted_loss(point, SMALL) + rng.normal(0, 1e-4)
        losses = losses if step > 10 else np.full(loops + 1, 99.0)
        lines.append({
            "kind": "train", "tokens": 1000 * step, "loss": losses[-1],
            "expected_loss": float(weights @ losses[:-1]), "loss_per_loop": losses[:-1].tolist(),
            "exit_distribution": weights.tolist(),
        })  # fmt: skip
    lines[50]["loss"] = None  # a step whose loss was not finite
    lines.append({"kind": "heldout", "tokens": 100_000})
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(to_dict(config)))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """The folder of a sweep of three sizes and three numbers of loops."""
    folder = tmp_path_factory.mktemp("sweep")
    for width, loops in itertools.product((16, 48, 128), (1, 2, 4)):
        write_run(folder / f"width={width},loops={loops}", width, loops)
    (folder / "results.json").write_text("[]")
    return folder


def test_points_are_means_over_spans_without_the_warm_up(sweep):
    points = gather_points([sweep])
    assert len(points) == 9 * 18
    first = points[0]  # of 128 wide, one loop: the spans begin after 10,000 tokens
    assert first.run.endswith("width=128,loops=1") and first.loops == 1
    assert first.tokens == 13_000.0
    x_PK = np.array([(first.parameters, tokens, 1) for tokens in range(11_000, 16_000, 1000)])
    assert first.loss == pytest.approx(planted_loss(x_PK, SMALL).mean(), abs=3e-4)
    assert gather_points([sweep / "width=128,loops=1"]) == points[:18]
    assert all(np.isfinite(point.loss) for point in points)


@pytest.fixture(scope="module")
def fitted(sweep, tmp_path_factory):
    """Summary, records and progress lines of the fits to that sweep."""
    said, output = [], tmp_path_factory.mktemp("laws") / "out" / "laws.jsonl"
    summary = run_scaling_law([sweep], output, said.append)
    return summary, [json.loads(line) for line in output.open()], said


def test_the_laws_of_a_sweep(fitted):
    summary, records, said = fitted
    laws = [record for record in records if record["kind"] == "scaling_law"]
    assert [(law["law"], law["trained_loops"]) for law in laws] == [
        ("total", None), ("stepwise", 2), ("stepwise", 4),
    ]  # fmt: skip
    for law in laws:
        assert law["r2"] > 0.999
        assert law["coefficients"]["E"]["low"] <= law["coefficients"]["E"]["high"]
    total = laws[0]
    assert total["weak_variables"] == ["parameters N", "loops T"]
    kinds = [(test["by"], len(test["kept"])) for test in total["holdouts"]]
    assert kinds == [("sizes", 2)] * 3 + [("data", 1)] * 3 + [("loops", 2)] * 3
    # All but one of two loops leaves one: nothing to fit T by.
    assert {test["by"] for test in laws[1]["holdouts"]} == {"sizes", "data"}
    points = [record for record in records if record["kind"] == "scaling_point"]
    assert len(points) == 18 * (9 + 3 * 2 + 3 * 4)
    assert summary["points"] == 9 * 18 and summary["runs"] == 9
    assert "162 points of 9 runs" in said[0] and "R² 1.0000" in said[2]


def test_a_holdout_is_a_fit_to_the_rest(sweep, fitted):
    points = gather_points([sweep])
    x_PK = np.array([(p.parameters, p.tokens, p.loops) for p in points], float)
    loss_P = np.array([point.loss for point in points])
    total = next(record for record in fitted[1] if record["kind"] == "scaling_law")
    held = next(test for test in total["holdouts"] if test["by"] == "sizes")
    kept_P = np.isin(x_PK[:, 0], held["kept"])
    law = fit_law(x_PK[kept_P], loss_P[kept_P])
    assert held["points"] == kept_P.sum() == len(points) * 2 // 3
    assert held["r2_all"] == pytest.approx(r_squared(loss_P, law(x_PK)))
    assert held["r2_heldout"] == pytest.approx(r_squared(loss_P[~kept_P], law(x_PK[~kept_P])))
    means = [test["r2_heldout"] for test in total["holdouts"] if test["by"] == "sizes"]
    assert total["holdout_means"]["sizes"]["r2_heldout"] == pytest.approx(np.mean(means))


def test_sizes_in_between_are_predicted(planted):
    # Three of five sizes, as in the paper's test; three are enough for N's term, two are not.
    x_PK, loss_P, _ = planted
    kept_P = np.isin(x_PK[:, 0], np.unique(x_PK[:, 0])[::2])
    law = fit_law(x_PK[kept_P], loss_P[kept_P])
    assert r_squared(loss_P[~kept_P], law(x_PK[~kept_P])) > 0.99


def test_exit_weights_times_losses_against_the_total(sweep, fitted):
    """The planted total is the last loop's loss, the planted first term the mixture itself."""
    record = fitted[1][-1]
    points = gather_points([sweep])
    total, mixed = (np.array([getattr(p, name) for p in points])
                    for name in ("loss", "expected_loss"))  # fmt: skip
    assert record["kind"] == "scaling_weights" and record["r2_expected"] == pytest.approx(1.0)
    by_hand = 1 - np.square(total - mixed).sum() / np.square(total - total.mean()).sum()
    assert record["r2"] == pytest.approx(by_hand)


def test_folders_that_hold_no_plain_run(sweep, tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ConfigError, match="no run in it; expected a workdir"):
            gather_points([folder])
    write_run(tmp_path / "last", 16, 2, objective="last_loop")
    with pytest.raises(ConfigError, match="objective = 'last_loop': expected 'expected'"):
        gather_points([tmp_path])
    with pytest.raises(ConfigError, match="all points have parameters N = .*, expected at least"):
        run_scaling_law([sweep / "width=16,loops=1", sweep / "width=16,loops=2"], tmp_path / "x")
