"""The page says how often what happened, why, and what came before the first step."""

import pytest
from synthetic_run import BROKEN, long_run, short_run

from ouro_jax.reporting.happenings import MAX_ROWS, happenings_section
from ouro_jax.reporting.history import sort_records
from ouro_jax.reporting.report import write_report


@pytest.fixture(scope="module")
def section() -> str:
    files = long_run().files
    return happenings_section(sort_records(files["metrics"], files["times"], files["events"]))


def test_counts_and_medians(section):
    counts = long_run().counts
    for name, number in (
        ("Attempts", 40), ("Skips", counts["skip"]), ("Rollbacks", counts["rollback"]),
        ("Alarms", counts["alarm"]), ("Median save stall", "2.5 s"),
    ):  # fmt: skip
        assert f"<dt>{name}</dt><dd>{number}<small>" in section
    assert f"{counts['kill']} killed" in section and f"{counts['bad_row']} bad rows" in section
    assert "3.88 min (compile 95 s, restore 75 s, step 30 s, data 20 s, verify 9 s" in section


def test_the_newest_are_told_and_the_rest_counted(section):
    counts = long_run().counts
    kinds = ("kill", "stop", "skip", "rollback", "set_aside", "config_change", "alarm")
    rest = sum(counts[kind] for kind in kinds) - MAX_ROWS
    assert section.count("<tr><td>2026") == MAX_ROWS
    assert f"{rest} earlier ones are in events.jsonl." in section
    newest, oldest = section.index("2026-03-04"), section.index("2026-02-1")
    assert newest < oldest


@pytest.mark.parametrize(
    "text",
    [
        "asked to stop by SIGTERM (exit code 75)", "(exit code 124)", "could not say why",
        "spike: loss 6.21, gradient norm 48.2; rows ", "loss not finite", BROKEN,
        "guard.spike_factor: 6.0 → 8.0, logging.every_steps: 50 → 100", "the loss has not fallen",
        "8 of the last 10 steps were refused; rows ",
    ],
)  # fmt: skip
def test_each_kind_is_told_with_its_reason(section, text):
    assert text in section


def test_what_a_run_wrote_is_escaped():
    events = [{"kind": "alarm", "time": 0, "text": "<b>"}]
    assert "&lt;b&gt;" in happenings_section(sort_records([], [], events))


def test_a_calm_run_and_one_without_events_have_a_report(tmp_path):
    workdir = short_run().write(tmp_path)
    text = write_report(workdir).read_text()
    assert "Nothing happened that a person should know of." in text
    (workdir / "events.jsonl").unlink()
    text = write_report(workdir).read_text()
    assert "Left out: this run wrote no events." in text and "The run over wall time" in text
