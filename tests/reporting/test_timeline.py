"""The figure over wall time shows each kind of event, for runs of minutes and of months."""

import pytest
from synthetic_run import SyntheticRun, long_run, short_run

from ouro_jax.reporting.history import sort_records
from ouro_jax.reporting.plots import ACCENT, NARROW, PART_COLOURS, WIDE, svg
from ouro_jax.reporting.timeline import LANES, timeline


def history(run: SyntheticRun):
    return sort_records(run.files["metrics"], run.files["times"], run.files["events"])


@pytest.mark.parametrize("canvas", [WIDE, NARROW], ids=["wide", "narrow"])
def test_every_kind_of_event_has_its_lane_and_count(canvas):
    run = history(long_run())
    drawing = svg(timeline, run, canvas)
    for kind, (name, _, _) in LANES.items():
        assert f">{name} · {run.timeline.counts[kind]}</text>" in drawing
    for text in ("stable_1a", "mid", "repeated", "stopped", "days since 2026-01-01 00:00 UTC"):
        assert f">{text}</text>" in drawing
    assert len(drawing) < 250_000


def test_a_calm_run_of_minutes_has_no_lanes():
    figure = timeline(history(short_run()), WIDE)
    top, strip = figure.axes
    assert strip.get_xlabel() == "min since 2026-01-01 00:00 UTC"
    assert not {PART_COLOURS["repeated"]} & {line.get_color() for line in top.lines}


def test_lost_steps_and_the_strip_agree_with_the_times():
    run = SyntheticRun((1_000,), 1.0, window=10, save=100)
    run.begin()
    run.train(150)
    run.now += 60
    run.begin()
    run.train(100)
    top, _, strip = timeline(history(run), WIDE).axes

    def spans(colour):
        lines = [line.get_ydata() for line in top.lines if line.get_color() == colour]
        return sorted((steps[0], steps[-1]) for steps in lines)

    assert spans(PART_COLOURS["repeated"]) == [(100, 150)]
    assert spans(ACCENT) == [(0, 150), (100, 200)]
    names = strip.get_legend_handles_labels()[1]
    assert "repeated" in names and "evaluation" not in names


def test_a_run_that_just_began_can_be_drawn():
    run = SyntheticRun((1_000,), 1.0, window=10, save=100)
    run.begin()
    for kind in ("times", "events"):
        run.files[kind] = [line for line in run.files[kind] if line["kind"] in ("attempt", "start")]
    assert "<svg" in svg(timeline, history(run), NARROW)
