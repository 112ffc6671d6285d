"""What is read from the runs of a sweep, against numbers done by hand."""

import csv
import json

import pytest
from rich.console import Console

from ouro_jax.reporting.sweep import (
    SweepResult,
    best_result,
    draw_results,
    read_result,
    results_table,
    write_results,
)


def write_log(folder, *, finished=True, bits=3.0):
    """Four steps and two sources; the model is trained at two loops and read out after three."""
    where = {"stage": "stable_1a", "step": 2, "tokens": 100}
    train = {"kind": "train", "batch_tokens": 50, **where}
    heldout = {"kind": "heldout", "trained_loops": 2, **where}
    records = [
        {"kind": "event", "event": "stage_start", "model": {}, **where},
        train | {"tokens_per_second": None},
        *(train | {"tokens_per_second": speed} for speed in (100.0, 900.0, 110.0)),
        heldout | {"source": "a", "bits_per_byte_per_loop": [4.0, bits, 9.0],
                   "loss_per_loop": [2.0, 1.0, 9.0], "mean_depth": 1.5},
        heldout | {"source": "b", "bits_per_byte_per_loop": [5.0, bits + 1.0, 9.0],
                   "loss_per_loop": [4.0, 2.0, 9.0], "mean_depth": 2.0},
    ]  # fmt: skip
    if finished:
        records.append({"kind": "event", "event": "finished", **where})
    folder.mkdir(parents=True)
    text = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text(text)


@pytest.fixture
def results(tmp_path):
    """A finished run, a better one, one that is under way, one not begun and one unmeasured."""
    write_log(tmp_path / "a")
    write_log(tmp_path / "b", bits=2.0)
    write_log(tmp_path / "c", bits=1.0, finished=False)
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "metrics.jsonl").write_text("")
    return [
        read_result(name, {"rate": rate, "schedule": schedule}, tmp_path / name)
        for name, rate, schedule in zip("abcde", (0.1, 1.0, 0.1, 1.0, 2.0), "xxyyy", strict=True)
    ]


def test_a_result_holds_means_over_sources_at_the_trained_depth(results):
    first = results[0]
    assert (first.status, first.bits_per_byte, first.loss_per_loop) == ("finished", 3.5, (3.0, 1.5))
    assert (first.exit_depth, first.tokens_per_second) == (1.75, 110.0)
    assert [result.status for result in results[2:]] == ["unfinished", "not started", "unfinished"]
    assert results[3] == SweepResult("d", {"rate": 1.0, "schedule": "y"}, "not started")


def test_the_best_is_among_the_finished(results):
    best = best_result(results)
    assert best is not None and best.name == "b"
    assert best_result(results[2:]) is None


def test_the_files(results, tmp_path):
    write_results(results, tmp_path)
    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [
        "run", "rate", "schedule", "status", "bits_per_byte", "loss_1", "loss_2", "exit_depth",
        "tokens_per_second",
    ]  # fmt: skip
    assert (rows[1]["run"], rows[1]["rate"], rows[1]["bits_per_byte"]) == ("b", "1.0", "2.5")
    assert rows[3]["loss_1"] == ""
    written = json.loads((tmp_path / "results.json").read_text())
    assert written[0] == results[0].columns() and written[3]["bits_per_byte"] is None
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")


def test_any_mixture_of_overrides_can_be_drawn(tmp_path):
    mixtures = [[{}], [{"a": 1}, {"b": (1, 2)}, {}], [{"a": True}, {"a": "x y"}, {"a": 0}]]
    for number, labels in enumerate(mixtures):
        file = tmp_path / f"{number}.png"
        draw_results([SweepResult("", each, "finished", 3.0, (), 1.5) for each in labels], file)
        assert file.read_bytes().startswith(b"\x89PNG")


def test_nothing_measured_is_not_drawn(results, tmp_path):
    write_results(results[3:], tmp_path)
    assert not (tmp_path / "results.png").exists()


def test_the_table(results):
    console = Console(width=100, record=True, file=open("/dev/null", "w"))
    console.print(results_table(results))
    lines = console.export_text(styles=True).splitlines()
    row = next(line for line in lines if "2.5000" in line)
    assert "\x1b[1m" in row and "3.000 1.500" in row and "1.75" in row
    assert "\x1b[1m" not in next(line for line in lines if "3.5000" in line)
    assert any("not started" in line and "–" in line for line in lines)
