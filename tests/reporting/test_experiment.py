"""The summary of an experiment by hand numbers, and its page from files alone."""

import json

import pytest

from ouro_jax.reporting.experiment import experiment_sections, role, summarise, write_report


def record(model, seed, value, rate=1e-3, depth=None, labels=None, **changes):
    layers, loops = model
    return {
        "kind": "answers", "run": f"{model}-{seed}-{rate}-{labels}", "labels": labels or {},
        "layers": layers, "trained_loops": loops, "seed": seed, "learning_rate": rate,
        "parameters": 1000 * layers, "tokens": 5000, "step": 10, "set": "mano",
        "loops": depth or loops, "exact": value, "metric": "exact match", "value": value,
        "reference": "chance", "reference_value": 0.25,
    } | changes  # fmt: skip


RECORDS = [
    record((1, 4), 1, 0.9), record((1, 4), 0, 0.7), record((1, 4), 0, 0.3, depth=2),
    record((1, 1), 0, 0.4), record((1, 1), 0, 0.5, rate=2e-3), record((1, 1), 1, 0.2),
    record((4, 1), 0, 0.6), record((4, 1), 0, 0.1, set="length_6"),
]  # fmt: skip


def test_summary_by_hand():
    entries = {(e["set"], e["model"]): e for e in summarise(RECORDS)}
    looped = entries["mano", "1x4"]
    assert looped["seeds"] == [0.7, 0.9] and looped["mean"] == pytest.approx(0.8)
    assert looped["spread"] == pytest.approx(0.2) and looped["best"] == 0.9
    # The rate with the better mean over seeds counts, not that of the most runs.
    base = entries["mano", "1x1"]
    assert base["learning_rate"] == 2e-3 and base["seeds"] == [0.5] and base["num_rates"] == 2
    assert [entries["mano", m]["role"] for m in ("1x4", "1x1", "4x1")] == [
        "looped", "iso-parameter", "iso-FLOP"
    ]  # fmt: skip
    assert entries["length_6", "4x1"]["mean"] == 0.1
    assert next(iter(summarise(RECORDS, main_set="length_6")))["set"] == "length_6"


def test_drawn_depths_are_named():
    drawn = record((1, 6), 0, 0.8, labels={"min_loops": 2})
    roles = {entry["model"]: entry["role"] for entry in summarise([*RECORDS, drawn])}
    assert roles["1x6"] == "looped, 2 to 6 drawn" and roles["1x4"] == "looped"
    assert roles["4x1"] == "iso-FLOP"


def test_a_model_may_stand_for_both():
    looped = {(6, 2), (3, 4)}
    assert role(12, 1, looped) == "iso-FLOP" and role(6, 1, looped) == "iso-parameter"
    assert role(6, 1, {(6, 2), (3, 2)}) == "iso-parameter, iso-FLOP"
    assert role(5, 1, looped) == ""


def described(axis=""):
    return {"name": "mano", "protocol": "small", "axis": axis, "main_set": "",
            "published": [{"layers": 2, "exact": 0.981}], "differences": ["<smaller>"]}  # fmt: skip


@pytest.mark.parametrize("axis", ["", "questions"])
def test_the_page_is_made_from_files(tmp_path, axis):
    records = RECORDS
    if axis:
        records = [
            record(model, 0, value, labels={axis: number})
            for model, number, value in (((1, 4), 10, 0.5), ((1, 4), 20, 0.8), ((1, 1), 10, 0.3),
                                         ((1, 1), 20, 0.35))
        ]  # fmt: skip
    (tmp_path / "experiment.json").write_text(json.dumps(described(axis)))
    assert write_report(tmp_path) == []
    assert "No run is finished yet" in "".join(experiment_sections(tmp_path))
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    figure, page = write_report(tmp_path)
    text = page.read_text()
    assert figure.stat().st_size > 10_000 and text.count("<svg") == 4
    assert ("Along the axis" in text) == bool(axis) and "By depth" in text
    assert "0.981" in text and "&lt;smaller&gt;" in text and "<smaller>" not in text
