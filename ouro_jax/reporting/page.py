"""The parts of the report's page. Everything that comes from a run is escaped here."""

import base64
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from html import escape
from typing import TypedDict

from ouro_jax.config import ModelConfig, num_parameters
from ouro_jax.reporting.heldout import HeldoutRow, heldout_rows, latest_rows, verdict
from ouro_jax.reporting.history import Record, RunHistory, short_count, short_time
from ouro_jax.reporting.plots import MAX_LOOP_COLOURS
from ouro_jax.reporting.style import CSS
from ouro_jax.training.timing import goodput


class Sample(TypedDict):
    """A generated text: `depths[i]` is the loop, from 1, at which token i left the model."""

    prompt: str
    tokens: list[str]
    depths: list[int]
    num_loops: int
    stage: str


def document(title: str, body: Iterable[str]) -> str:
    """A whole page. Its policy forbids the browser to run anything, and to load anything that does
    not lie in the page itself."""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{escape(title)}</title>
<style>{CSS}</style>
</head>
<body>
<main>
{"".join(body)}
</main>
</body>
</html>
"""


def missing(text: str) -> str:
    """A line in the place of something that the run did not record."""
    return f'<p class="missing">{escape(text)}</p>\n'


def section(title: str, text: str, content: str) -> str:
    """A heading, a sentence of introduction, and what follows."""
    note = f'<p class="note">{escape(text)}</p>\n' if text else ""
    return f"<section>\n<h2>{escape(title)}</h2>\n{note}{content}</section>\n"


def figure(title: str, drawings: Sequence[str], caption: str) -> str:
    """A plot in its wide and narrow drawings, under its title and above what to look for."""
    return (
        f'<section>\n<h2>{escape(title)}</h2>\n<figure role="img" aria-label="{escape(title)}">\n'
        f"{''.join(drawings)}\n<figcaption>{escape(caption)}</figcaption>\n</figure>\n</section>\n"
    )


def picture(title: str, png: bytes, caption: str) -> str:
    """A drawing that is there as a PNG file, under its title and above what to look for.

    `png` has two pixels for each of CSS, as `figures.figure_file` draws.
    """
    width = int.from_bytes(png[16:20]) // 2  # a PNG begins with 16 bytes, its width, its height
    source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    return (
        f'<section>\n<h2>{escape(title)}</h2>\n<figure>\n<img src="{source}" '
        f'width="{width}" alt="{escape(title)}">\n<figcaption>{escape(caption)}</figcaption>\n'
        "</figure>\n</section>\n"
    )


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of plain texts, `columns` its heads; it scrolls where it is too wide."""
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    lines = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>\n" for cells in rows
    )
    return (
        f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{lines}</tbody>\n</table></div>\n"
    )


def header(name: str, run: RunHistory, planned: Sequence[str]) -> str:
    """What was trained, how large, and how far it got."""
    last, total = run.stages[-1].name, max(len(planned), len(run.stages))
    ended = {event["stage"] for event in run.events if event["event"] == "stage_end"}
    # A stage that another follows has ended, even if a kill came before it said so.
    done = len(run.stages) - (not run.finished and last not in ended)
    where = "" if run.finished else f"in {last}, "
    facts = [
        (
            "Status",
            "finished" if run.finished else "not finished",
            f"{where}{done} of {total} stages done",
        ),
        ("Tokens seen", short_count(run.tokens), f"{run.tokens:,}"),
        *_model_facts(run),
        *_time_facts(run),
    ]
    return (
        '<header>\n<p class="kicker">Training report of a looped language model</p>\n'
        f'<h1>{escape(name)}</h1>\n<p class="lead">A looped model runs the same layers several '
        "times over each token, and a small gate says after each loop whether the token may "
        "leave. This page shows what training did to the loss at each depth, and how deep the "
        f"tokens go.</p>\n{fact_list(facts)}</header>\n"
    )


def fact_list(facts: Iterable[tuple[str, str, str]]) -> str:
    """Boxes, each with what it is about, a short value and more about it."""
    cells = "".join(
        f"<div><dt>{escape(what)}</dt><dd>{escape(value)}<small>{escape(more)}</small></dd></div>\n"
        for what, value, more in facts
    )
    return f'<dl class="facts">\n{cells}</dl>\n'


def _model_facts(run: RunHistory) -> list[tuple[str, str, str]]:
    tree = run.stages[-1].model
    if not tree:
        return []
    model = ModelConfig(**tree)
    parameters = num_parameters(model)
    return [
        ("Parameters", short_count(parameters), f"{parameters:,}"),
        (
            "Shape",
            f"{model.num_layers} layers × {model.num_loops} loops",
            f"width {model.hidden_size:,}, vocabulary {model.vocab_size:,}",
        ),
    ]


def _time_facts(run: RunHistory) -> list[tuple[str, str, str]]:
    share = goodput({stage.name: stage.seconds for stage in run.timed})
    if share is None:
        return []
    wall = sum(sum(stage.seconds.values()) for stage in run.timed)
    return [("Goodput", f"{share:.1f} %", f"of {short_time(wall)} in steps that count")]


def heldout_section(run: RunHistory) -> str:
    """The verdict, the last held-out table, and one for every earlier stage."""
    title = "Held-out text, in bits per byte"
    rows = latest_rows(run)
    if not rows:
        return section(title, "", missing("No held-out text was measured yet."))
    says = "".join(f"<li>{escape(sentence)}</li>\n" for sentence in verdict(rows))
    stage = run.measured[-1]
    note = (
        "How many bits the model spends on each byte of text that it never trained on: fewer is "
        f"better. Measured last in {stage.name}. The shaded column is the depth that was trained; "
        "columns in italics run the model deeper than that. The mean counts every source the "
        "same. Unigram and bigram models only count "
        "single tokens and pairs of tokens, in the text that the model trained on."
    )
    earlier = "".join(
        f"<h3>{escape(before.name)}, at {max(r['tokens'] for r in before.heldout.values()):,} "
        f"tokens</h3>\n{heldout_table(heldout_rows(before.heldout, {}))}"
        for before in run.measured[:-1]
    )
    more = f"<details>\n<summary>At the end of earlier stages</summary>\n{earlier}</details>\n"
    content = f'<ul class="verdict">\n{says}</ul>\n{heldout_table(rows)}{more if earlier else ""}'
    return section(title, note, content)


def heldout_table(rows: Sequence[HeldoutRow]) -> str:
    """Bits per byte per source and loop, and of the baselines where there are any."""
    loops = max(len(row.bits_per_byte) for row in rows)
    trained = rows[-1].trained_loops
    kinds = ["beyond" if n > trained else "trained" if n == trained else "" for n in _to(loops)]
    heads = [(f"loop {n}", kind) for n, kind in zip(_to(loops), kinds, strict=True)]
    has_baselines = any(row.unigram is not None for row in rows)
    if has_baselines:
        heads += [("unigram", "baseline"), ("bigram", "")]
        kinds += ["baseline", ""]
    lines = []
    for row in rows:
        values = [*row.bits_per_byte, *[None] * (loops - len(row.bits_per_byte))]
        values += [row.unigram, row.bigram] if has_baselines else []
        cells = "".join(
            f'<td class="{kind}">{_number(value)}</td>'
            for value, kind in zip(values, kinds, strict=True)
        )
        mark = ' class="mean"' if row.is_mean else ""
        lines.append(f"<tr{mark}><td>{escape(row.source)}</td>{cells}</tr>\n")
    head = "".join(f'<th class="{kind}">{name}</th>' for name, kind in heads)
    return (
        f'<div class="scroll"><table>\n<thead><tr><th>source</th>{head}</tr></thead>\n'
        f"<tbody>\n{''.join(lines)}</tbody>\n</table></div>\n"
    )


def timeline_section(run: RunHistory) -> str:
    """The events of the run, in order."""
    title = "What happened when"
    if not run.events:
        return section(title, "", missing("No events were recorded."))
    rows = "".join(
        f'<tr><td>{moment(event["time"])}</td><td class="text">{escape(_what(event))}</td>'
        f"<td>{event['step']:,}</td><td>{event['tokens']:,}</td></tr>\n"
        for event in run.events
    )
    resumes = sum(event["event"] == "resume" for event in run.events)
    note = "Times are UTC. " + (
        f"The run was stopped and continued {_times(resumes)}." if resumes else
        "The run was not interrupted."
    )  # fmt: skip
    table = (
        '<div class="scroll"><table>\n<thead><tr><th>time</th><th class="text">event</th>'
        f"<th>step</th><th>tokens seen</th></tr></thead>\n<tbody>\n{rows}</tbody>\n</table></div>\n"
    )
    return section(title, note, table)


def _what(event: Record) -> str:
    stage, model = event["stage"], event.get("model")
    name: str = event["event"]
    text = {
        "start": "run begins",
        "stage_start": f"{stage} begins",
        "resume": f"{stage} continues from a checkpoint",
        "stage_end": f"{stage} ends",
        "finished": "run finished",
    }.get(name, name)
    if name == "stage_start" and model:
        layers, loops, base = model["num_layers"], model["num_loops"], model["rope_theta"]
        text += f": {layers} layers × {loops} loops, RoPE base {base:,.0f}"
    if name == "source_restart":
        text = f"{event['source']} has run out and starts again: epoch {event['epoch']}"
    return text


def samples_section(samples: Sequence[Sample]) -> str:
    """Generated texts, each token in the colour of the loop at which it left."""
    title = "What the model writes, and where each token leaves"
    if not samples:
        return section(title, "", missing("No samples were written for this run."))
    loops = max(sample["num_loops"] for sample in samples)
    counts = Counter(depth for sample in samples for depth in sample["depths"])
    total = max(counts.total(), 1)
    key = "".join(
        f'<li><i class="{_loop_class(n)}"></i>loop {n}, {counts[n] / total:.0%} of tokens</li>'
        for n in _to(loops)
    )
    note = (
        "Each token has the colour of the loop after which it left the model; hold the pointer "
        "over one to read the number. The prompt is grey. Look for whether easy tokens (spaces, "
        "the rest of a word) leave early and hard ones late."
    )
    content = f'<ul class="key">{key}</ul>\n' + "".join(map(_sample, samples))
    return section(title, note, content)


def _sample(sample: Sample) -> str:
    tokens = "".join(
        f'<span class="token {_loop_class(depth)}" title="left after loop {depth} of '
        f'{sample["num_loops"]}">{escape(token)}</span>'
        for token, depth in zip(sample["tokens"], sample["depths"], strict=True)
    )
    depths = sample["depths"]
    mean = f", mean depth {sum(depths) / len(depths):.2f}" if depths else ""
    return (
        f"<h3>After {escape(sample['stage'])}{mean}</h3>\n"
        f'<div class="sample"><span class="prompt">{escape(sample["prompt"])}</span>{tokens}'
        "</div>\n"
    )


def _loop_class(loop: int) -> str:
    return f"loop-{min(loop, MAX_LOOP_COLOURS)}"


def _to(number: int) -> range:
    return range(1, number + 1)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def moment(seconds: float) -> str:
    """A time since 1970 as date and time, UTC."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")


def _times(number: int) -> str:
    return {1: "once", 2: "twice"}.get(number, f"{number:,} times")
