"""What the models of an experiment came to: a summary, a table, figures and one page."""

import json
import statistics
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from ouro_jax.reporting import experiment_plots, page
from ouro_jax.reporting.plots import NARROW, WIDE, svg
from ouro_jax.training.lines import read_lines
from ouro_jax.training.run_log import FILE_NAME

Record = Mapping[str, Any]
REPORT, FIGURE = "report.html", "results.png"
DESCRIBED, RESULTS = "experiment.json", "results.jsonl"


def summarise(
    records: Sequence[Record], axis: str = "", main_set: str = ""
) -> list[dict[str, Any]]:
    """One entry per model, value of `axis` (a label of the runs) and set, `main_set` first.

    Values are those at the depth that the model was trained for. Of several learning rates the one
    with the best mean over seeds counts for `seeds`, `mean` and `spread` (largest minus smallest);
    `best` is the best of all runs, which is what the paper reports.
    """
    groups: dict[tuple, list[Record]] = {}
    for record in records:
        if record["kind"] == "answers" and record["loops"] == record["trained_loops"]:
            key = (record["set"], record["labels"].get(axis), record["layers"],
                   record["trained_loops"])  # fmt: skip
            groups.setdefault(key, []).append(record)
    order = sorted(groups, key=lambda key: key[0] != main_set)  # stable: the rest as it came
    looped = {(layers, loops) for _, _, layers, loops in groups if loops > 1}
    return [
        {
            "set": name, "axis": value, "model": f"{layers}x{loops}", "layers": layers,
            "loops": loops, "role": role(layers, loops, looped) + _drawn(groups[key][0]),
            **_values(groups[key]),
        }
        for key in order
        for name, value, layers, loops in [key]
    ]  # fmt: skip


def role(layers: int, loops: int, looped: set[tuple[int, int]]) -> str:
    """What a model stands for beside the `looped` ones, (layers, loops) each."""
    if loops > 1:
        return "looped"
    parts = []
    if any(layers == other for other, _ in looped):
        parts.append("iso-parameter")
    if any(layers == other * times for other, times in looped):
        parts.append("iso-FLOP")
    return ", ".join(parts)


def _drawn(record: Record) -> str:
    """Of a model trained at drawn depths: from how many loops on."""
    fewest = record["labels"].get("min_loops", 0)
    return f", {fewest} to {record['trained_loops']} drawn" if fewest else ""


def _values(members: Sequence[Record]) -> dict[str, Any]:
    rates: dict[float, list[Record]] = {}
    for record in members:
        rates.setdefault(record["learning_rate"], []).append(record)
    best_rate = max(rates, key=lambda rate: statistics.fmean(r["value"] for r in rates[rate]))
    chosen = sorted(rates[best_rate], key=lambda record: record["seed"])
    values = [record["value"] for record in chosen]
    return {
        "parameters": chosen[0]["parameters"], "tokens": chosen[0]["tokens"],
        "metric": chosen[0]["metric"], "reference": chosen[0]["reference"],
        "reference_value": chosen[0]["reference_value"], "learning_rate": best_rate,
        "num_rates": len(rates), "seeds": values, "mean": statistics.fmean(values),
        "spread": max(values) - min(values), "best": max(record["value"] for record in members),
    }  # fmt: skip


COLUMNS: tuple[str, ...] = (
    "set", "model", "role", "parameters", "learning rate", "seeds", "mean", "spread", "best",
    "reference",
)  # fmt: skip


def _cells(entry: Mapping[str, Any]) -> list[str]:
    name = entry["set"] if entry["axis"] is None else f"{entry['set']}, {entry['axis']:,}"
    return [
        name, entry["model"], entry["role"], f"{entry['parameters']:,}",
        f"{entry['learning_rate']:g}", " ".join(f"{value:.3f}" for value in entry["seeds"]),
        f"{entry['mean']:.3f}", f"{entry['spread']:.3f}", f"{entry['best']:.3f}",
        f"{entry['reference_value']:.3f}",
    ]  # fmt: skip


def results_table(summary: Sequence[Mapping[str, Any]]) -> Table:
    """The summary for a terminal."""
    table = Table(
        title=f"{summary[0]['metric'] if summary else 'results'} at the trained depth",
        title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False,
    )  # fmt: skip
    # The page has all columns; these fit into 80 characters.
    shown = [name for name in COLUMNS if name not in ("parameters", "learning rate", "spread")]
    for name in shown:
        left = name in ("set", "model", "role")
        table.add_column(name, justify="left" if left else "right", overflow="fold")
    for entry in summary:
        cells: dict[str, str] = dict(zip(COLUMNS, _cells(entry), strict=True))
        bold = "bold" if entry["loops"] > 1 else ""
        table.add_row(*(cells[name] for name in shown), style=bold)
    return table


def write_report(workdir: Path) -> list[Path]:
    """Writes `results.png` and `report.html` into `workdir`; returns their paths, none if empty.

    Reads `experiment.json`, which says what the experiment is, and `results.jsonl`.
    """
    described, results, summary = _read(workdir)
    if results is None:
        return []
    figure = experiment_plots.save_png(results, workdir / FIGURE)
    title = f"{described['name']}, {described['protocol']} protocol"
    body = [_header(title, summary, workdir), *_sections(described, results, summary)]
    path = workdir / REPORT
    path.write_text(page.document(f"{title} · experiment", body), encoding="utf-8")
    return [figure, path]


def experiment_sections(workdir: Path) -> list[str]:
    """What a page of several experiments says of the one in `workdir`."""
    described, results, summary = _read(workdir)
    title = f"{described['name']}, {described['protocol']} protocol"
    if results is None:
        return [page.section(title, "", page.missing("No run is finished yet."))]
    return [page.section(title, str(workdir), ""), *_sections(described, results, summary)]


def experiment_state(workdir: Path) -> tuple[str, str]:
    """How far the experiment in `workdir` is, and what came of it, in a few words each."""
    _, results, summary = _read(workdir)
    begun = len(list(workdir.glob(f"*/{FILE_NAME}")))
    if results is None:
        return f"no run evaluated, {begun:,} begun", "nothing yet"
    done = len({record["run"] for record in results.records})
    more = f", {begun - done:,} more begun" if begun > done else ""
    return f"{done:,} runs evaluated{more}", _headline(summary)


def _headline(summary: Sequence[Record]) -> str:
    """The means of the main set, at the axis' last value; the looped model first."""
    main = [entry for entry in summary if entry["set"] == summary[0]["set"]]
    at = max((e["axis"] for e in main if e["axis"] is not None), default=None)
    main = sorted((e for e in main if e["axis"] == at), key=lambda entry: entry["loops"] == 1)
    first = main[0]
    where = first["set"] if at is None else f"{first['set']}, {at:,}"
    models = ", ".join(
        f"{entry['model']} {entry['mean']:.3f}" + (f" ({entry['role']})" if entry["role"] else "")
        for entry in main
    )
    return (
        f"{first['metric']} of {where}: {models}; "
        f"{first['reference']} {first['reference_value']:.3f}"
    )


def _read(
    workdir: Path,
) -> tuple[Record, experiment_plots.Results | None, list[dict[str, Any]]]:
    described = json.loads((workdir / DESCRIBED).read_text())
    path = workdir / RESULTS
    records = read_lines(path) if path.is_file() else []
    summary = summarise(records, described["axis"], described["main_set"])
    if not summary:
        return described, None, []
    main = summary[0]["set"]
    results = experiment_plots.Results(
        [entry for entry in summary if entry["set"] == main],
        [record for record in records if record["set"] == main],
        described["axis"],
    )
    return described, results, summary


def _sections(
    described: Record, results: experiment_plots.Results, summary: Sequence[Record]
) -> list[str]:
    return [
        page.section(
            "Results", "On held-out problems, after as many loops as trained; the reference of "
            "exact match is chance, the best answer without reading.",
            page.table(COLUMNS, [_cells(entry) for entry in summary]),
        ),
        *(_figure(plot, results) for plot in experiment_plots.PLOTS if plot.shows(results)),
        _published(described["published"], described["differences"]),
    ]  # fmt: skip


def _figure(plot: experiment_plots.Plot, results: experiment_plots.Results) -> str:
    drawings = [svg(plot.draw, results, canvas) for canvas in (WIDE, NARROW)]
    return page.figure(plot.title, drawings, plot.look_for)


def _header(title: str, summary: Sequence[Mapping[str, Any]], workdir: Path) -> str:
    main = [entry for entry in summary if entry["set"] == summary[0]["set"]]
    facts = [
        ("Models", str(len({entry["model"] for entry in main})), workdir.name),
        ("Runs", str(sum(len(entry["seeds"]) for entry in main)), "of the best learning rates"),
        (main[0]["metric"], f"{main[0]['reference_value']:.3f}", main[0]["reference"]),
    ]
    return (
        '<header>\n<p class="kicker">A controlled experiment with looped language models</p>\n'
        f'<h1>{escape(title)}</h1>\n<p class="lead">A looped model k x T runs k layers T times. '
        "Beside it stand models without loops: one with as many parameters, one with as many "
        f"FLOPs.</p>\n{page.fact_list(facts)}</header>\n"
    )


def _published(published: Sequence[Mapping[str, Any]], differences: Sequence[str]) -> str:
    if not published:
        return ""
    columns = list(published[0])
    rows = [
        [f"{v:.4g}" if isinstance(v, float) else str(v) for v in (row[name] for name in columns)]
        for row in published
    ]
    items = "".join(f"<li>{escape(text)}</li>\n" for text in differences)
    differ = f"<p>Here it is otherwise:</p>\n<ul>\n{items}</ul>\n" if differences else ""
    return page.section(
        "The paper's numbers", "Read from the paper's table or figure; see the card for where.",
        page.table(columns, rows) + differ,
    )  # fmt: skip
