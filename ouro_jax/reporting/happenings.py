"""The part of the page about how the run ran: counts, time to the first step, what happened."""

from html import escape

import numpy as np

from ouro_jax.reporting.attempts import Record, Timeline
from ouro_jax.reporting.history import RunHistory, short_time
from ouro_jax.reporting.page import fact_list, missing, moment, section
from ouro_jax.reporting.timeline import LANES

MAX_ROWS = 50


def happenings_section(run: RunHistory) -> str:
    """Counts, the split of the time to the first step, and what happened, newest first."""
    title, timeline = "How the run ran", run.timeline
    if not timeline.events:
        return section(title, "", missing("Left out: this run wrote no events."))
    note = (
        "Failed attempts ended by a fault of their own or were stopped by the watchdog; of a kill "
        "the process could say nothing. A stall is what training waits for a checkpoint."
    )
    content = fact_list(_facts(run)) + _first_step(timeline) + _happenings_table(timeline)
    return section(title, note, content)


def _facts(run: RunHistory) -> list[tuple[str, str, str]]:
    counts, happenings = run.timeline.counts, run.timeline.happenings
    ends = f"{counts['kill']:,} killed, {counts['failure']:,} failed, {counts['stop']:,} stopped"
    spans = [span for event in happenings for span in event.get("skip_rows", ())]
    rows = sum(stop - first for first, stop in spans)
    facts = [
        ("Attempts", f"{len(run.timeline.attempts):,}", ends),
        ("Skips", f"{counts['skip']:,}", f"{rows:,} rows, those of rollbacks included"),
        ("Rollbacks", f"{counts['rollback']:,}", "to an earlier checkpoint"),
        ("Alarms", f"{counts['alarm']:,}", f"{counts['bad_row']:,} bad rows of data"),
    ]
    stalls = [e["stall_seconds"] for e in run.timeline.events if e["kind"] == "checkpoint"]
    wall = sum(sum(stage.seconds.values()) for stage in run.timed)
    if stalls and wall:
        share = f"{100 * sum(stalls) / wall:.2g} % of wall time, {len(stalls):,} checkpoints"
        facts.append(("Median save stall", short_time(float(np.median(stalls))), share))
    return facts


def _first_step(timeline: Timeline) -> str:
    splits = [event["seconds"] for event in timeline.events if event["kind"] == "first_step"]
    if not splits:
        return ""
    total = float(np.median([sum(split.values()) for split in splits]))
    causes = {cause for split in splits for cause in split}
    medians = {c: float(np.median([split.get(c, 0.0) for split in splits])) for c in causes}
    longest_first = sorted(medians.items(), key=lambda item: -item[1])
    parts = ", ".join(f"{cause} {short_time(seconds)}" for cause, seconds in longest_first)
    text = f"From the start of a process to the end of its first step: {short_time(total)} ({parts}"
    return f"<p>{escape(text)}; medians over attempts).</p>\n"


def _happenings_table(timeline: Timeline) -> str:
    # Bad rows may be thousands, and none of them calls for a person.
    told = [event for event in reversed(timeline.happenings) if event["kind"] != "bad_row"]
    if not told:
        return missing("Nothing happened that a person should know of.")
    rows = "".join(
        f'<tr><td>{moment(event["time"])}</td><td class="text">{LANES[event["kind"]][0]}</td>'
        f'<td class="text long">{escape(_details(event))}</td><td>{_step(event)}</td></tr>\n'
        for event in told[:MAX_ROWS]
    )
    rest = len(told) - MAX_ROWS
    more = missing(f"{rest:,} earlier ones are in events.jsonl.") if rest > 0 else ""
    return (
        "<h3>What happened, newest first; times are UTC</h3>\n"
        '<div class="scroll"><table>\n<thead><tr><th>time</th><th class="text">what</th>'
        '<th class="text">details</th><th>step</th></tr></thead>\n'
        f"<tbody>\n{rows}</tbody>\n</table></div>\n{more}"
    )


def _details(event: Record) -> str:
    rows = ", ".join(f"{first:,} to {stop:,}" for first, stop in event.get("skip_rows", ()))
    left_out = f"; rows {rows}" if rows else ""
    match event["kind"]:
        case "kill":
            return "last sign of life; the process could not say why"
        case "stop" | "failure":
            return f"{event['reason']} (exit code {event['code']})"
        case "rollback":
            return f"to step {event['to_step']:,}: {event['reason']}{left_out}"
        case "skip":
            loss, norm = _value(event["loss"]), _value(event["grad_norm"])
            return f"{event['reason']}: loss {loss}, gradient norm {norm}{left_out}"
        case "set_aside":
            return f"{event['path']}: {event['reason']}"
        case "config_change":
            changes = event["changes"].items()
            return ", ".join(f"{key}: {old} → {new}" for key, (old, new) in changes)
        case _:
            return event["text"]


def _value(number: float | None) -> str:
    # JSON has no NaN: it is written as null.
    return "not finite" if number is None else f"{number:.4g}"


def _step(event: Record) -> str:
    return f"{event['step']:,}" if "step" in event else "–"
