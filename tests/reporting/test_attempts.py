"""Events and times become attempts: how each ended, how far it came, what was lost."""

from synthetic_run import long_run

from ouro_jax.reporting.attempts import make_timeline


def start(time: float, step: int, **seconds: float) -> dict:
    return {"kind": "start", "time": time, "step": step, "seconds": seconds}


def window(time: float, step: int) -> dict:
    return {"kind": "window", "time": time, "step": step}


def test_an_attempt_without_a_farewell_was_killed_if_another_follows():
    events = [
        start(10, 0), start(100, 5), {"kind": "stop", "time": 150, "step": 9, "code": 75},
        start(200, 9), {"kind": "stop", "time": 250, "step": 12, "code": 124}, start(300, 12),
    ]  # fmt: skip
    timeline = make_timeline(events, [window(50, 7), window(140, 8), window(350, 15)])
    assert [(event["kind"], event["time"]) for event in timeline.happenings] == [
        ("kill", 50), ("stop", 150), ("failure", 250),
    ]  # fmt: skip
    assert timeline.happenings[0]["step"] == 7
    assert [attempt.ended for attempt in timeline.attempts] == [50, 150, 250, 350]
    assert timeline.attempts[1].climbs == [[(100, 5), (140, 8), (150, 9)]]


def test_what_a_process_did_before_it_trained_is_its_own():
    aside = {"kind": "set_aside", "time": 70, "step": 9, "path": "9", "reason": "torn"}
    timeline = make_timeline([start(10, 0), aside, start(100, 5, restore=40)], [window(50, 7)])
    first, second = timeline.attempts
    assert (first.ended, second.began, second.climbs) == (50, 60, [[(60, 5)]])


def test_a_rollback_begins_a_new_climb():
    back = {"kind": "rollback", "time": 50, "step": 9, "to_step": 4}
    (attempt,) = make_timeline([start(0, 0), back], [window(50, 9), window(90, 8)]).attempts
    assert attempt.climbs == [[(0, 0), (50, 9), (50, 9)], [(50, 4), (90, 8)]]


def test_attempts_from_before_there_were_events_ended_nobody_knows_how():
    times = [{"kind": "attempt", "time": now, "step": 0} for now in (0, 100)] + [window(120, 5)]
    timeline = make_timeline([], times)
    assert len(timeline.attempts) == 2 and not timeline.happenings
    timeline = make_timeline([start(200, 5), start(300, 5)], times)
    assert len(timeline.attempts) == 4 and timeline.counts == {"kill": 1}


def test_a_finished_attempt_was_not_killed():
    events = [start(0, 0), {"kind": "finished", "time": 50, "step": 9}, start(100, 9)]
    assert not make_timeline(events, []).happenings


def test_counts_are_those_of_the_run():
    run = long_run()
    timeline = make_timeline(run.files["events"], run.files["times"])
    counts = timeline.counts
    assert len(timeline.attempts) == run.counts["start"] == 40
    assert counts["stop"] + counts["failure"] == run.counts["stop"]
    kinds = ("kill", "skip", "rollback", "set_aside", "config_change", "alarm", "bad_row")
    assert all(counts[kind] == run.counts[kind] > 0 for kind in kinds)
