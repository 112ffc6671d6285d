"""One page of all that lies in a folder: experiments, studies, sweeps and training runs."""

import json
from collections.abc import Callable, Iterator, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from rich import box
from rich.table import Table

from ouro_jax.errors import ConfigError
from ouro_jax.reporting import page
from ouro_jax.reporting.experiment import DESCRIBED, experiment_sections, experiment_state
from ouro_jax.reporting.report import REPORT_NAME
from ouro_jax.reporting.studies import STUDIES, read_study
from ouro_jax.reporting.sweep import read_result
from ouro_jax.training.run_log import FILE_NAME

LEVELS = 2  # how far down the folders are searched
SWEEP = "results.json"
EXPERIMENT, STUDY, SWEEP_KIND, RUN = KINDS = ("experiment", "study", "sweep", "training run")


class Finding(NamedTuple):
    """Something that was found: what, where (below the page's folder), and what came of it.

    `report` is its own page, if there is one; `sections` is what this page says of it.
    """

    kind: str
    name: str
    state: str
    headline: str
    report: str = ""
    sections: Sequence[str] = ()


def write_findings(workdir: str | Path) -> tuple[Path, list[Finding]]:
    """Writes `workdir/report.html`; returns its path, and what is in it.

    Whatever cannot be read is in the table with the reason. ConfigError if there is nothing.
    """
    workdir = Path(workdir)
    findings = find(workdir)
    title = f"Findings in {workdir.resolve().name}"
    body = [_header(title, findings), _overview(findings), *map(_article, findings)]
    path = workdir / REPORT_NAME
    path.write_text(page.document(title, body), encoding="utf-8")
    return path, findings


def find(workdir: Path) -> list[Finding]:
    """All that lies in `workdir` and the folders up to two levels down; ConfigError if nothing.

    The runs of an experiment or of a sweep further down are part of it, and not listed.
    """
    places = [place for folder in _folders(workdir, LEVELS) for place in _things(folder)]
    whole = {folder for kind, _, folder in places if kind in (EXPERIMENT, SWEEP_KIND)} - {workdir}
    findings = [
        _read(kind, which, folder, workdir)
        for kind, which, folder in places
        if not (kind == RUN and folder.parent in whole)
    ]
    if not findings:
        records = ", ".join(study.records for study in STUDIES.values())
        raise ConfigError(
            f"--workdir={workdir}: nothing to report there, nor {LEVELS} levels down. Looked for "
            f"{FILE_NAME} (of `ouro train`), {SWEEP} (`ouro sweep`), {DESCRIBED} (`ouro experiment "
            f"mano --protocol=smoke --workdir={workdir}/mano`) and {records} (`ouro experiment "
            f"depth --checkpoint=… --workdir={workdir}/depth`)."
        )
    return sorted(findings, key=lambda finding: KINDS.index(finding.kind))


def _folders(folder: Path, levels: int) -> Iterator[Path]:
    if not folder.is_dir():
        return
    yield folder
    for inner in sorted(folder.iterdir()) if levels else ():
        if not inner.name.startswith("."):
            yield from _folders(inner, levels - 1)


def _things(folder: Path) -> Iterator[tuple[str, str, Path]]:
    """(kind, which study, folder) of all that lies right in `folder`."""
    if (folder / DESCRIBED).is_file():
        yield EXPERIMENT, "", folder
    elif (folder / SWEEP).is_file() and (folder / SWEEP).with_suffix(".csv").is_file():
        yield SWEEP_KIND, "", folder
    if (folder / FILE_NAME).is_file():
        yield RUN, "", folder
    for name, study in STUDIES.items():
        if (folder / study.records).is_file():
            yield STUDY, name, folder


def _read(kind: str, which: str, folder: Path, workdir: Path) -> Finding:
    name = str(folder.relative_to(workdir)) if folder != workdir else workdir.resolve().name
    name += f": {which}" if which else ""
    own = folder / REPORT_NAME
    report = str(own.relative_to(workdir)) if folder != workdir and own.is_file() else ""
    try:
        state, headline, sections = (
            _study(which, folder) if kind == STUDY else READERS[kind](folder)
        )  # fmt: skip
    # KeyError: of another version. One thing that cannot be read is no reason to show nothing.
    except (ConfigError, ValueError, KeyError) as error:
        reason = f"no field {error}" if isinstance(error, KeyError) else str(error)
        state, headline, sections = "cannot be read", reason, []
    return Finding(kind, name, state, headline, report, sections)


def _study(which: str, folder: Path) -> tuple[str, str, list[str]]:
    outcome, sections = read_study(which, folder)
    title = page.section(f"Study of {which.replace('_', ' ')}", str(folder), "")
    return outcome.state, outcome.headline, [title, *sections]


def _experiment(folder: Path) -> tuple[str, str, list[str]]:
    return *experiment_state(folder), experiment_sections(folder)


def _sweep(folder: Path) -> tuple[str, str, list[str]]:
    rows = json.loads((folder / SWEEP).read_text(encoding="utf-8"))
    done = [row for row in rows if row["status"] == "finished"]
    measured = [row for row in done if row["bits_per_byte"] is not None]
    best = min(measured, key=lambda row: row["bits_per_byte"], default=None)
    headline = "nothing measured yet"
    if best is not None:
        headline = f"best: {best['run']}, {best['bits_per_byte']:.4f} bits per byte"
    return f"{len(done):,} of {len(rows):,} runs finished", headline, []


def _run(folder: Path) -> tuple[str, str, list[str]]:
    result = read_result("", {}, folder)
    if result.bits_per_byte is not None:
        headline = f"{result.bits_per_byte:.4f} bits per byte of held-out text"
    elif result.loss_per_loop:
        headline = f"{result.loss_per_loop[-1]:.3f} nats per held-out token"
    else:
        return result.status, "nothing measured yet", []
    return result.status, f"{headline}, mean exit depth {result.exit_depth:.2f}", []


READERS: dict[str, Callable[[Path], tuple[str, str, list[str]]]] = {
    EXPERIMENT: _experiment, SWEEP_KIND: _sweep, RUN: _run,
}  # fmt: skip


def findings_table(findings: Sequence[Finding]) -> Table:
    """The overview for a terminal."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("kind", "name", "state", "headline"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        table.add_row(finding.kind, finding.name, finding.state, finding.headline)
    return table


def _header(title: str, findings: Sequence[Finding]) -> str:
    counts = [(kind, [f for f in findings if f.kind == kind]) for kind in KINDS]
    facts = [(_several(kind).capitalize(), f"{len(found):,}", "") for kind, found in counts]
    return (
        '<header>\n<p class="kicker">Looped language models</p>\n'
        f'<h1>{escape(title)}</h1>\n<p class="lead">All that was found here, first as a table, '
        "then experiments and studies one by one, with the paper's numbers where there are any."
        f"</p>\n{page.fact_list(facts)}</header>\n"
    )


def _several(kind: str) -> str:
    """studies, training runs, …"""
    return "studies" if kind == STUDY else f"{kind}s"


def _overview(findings: Sequence[Finding]) -> str:
    rows = "".join(map(_row, findings))
    table = (
        '<div class="scroll"><table>\n<thead><tr><th>name</th><th class="text">kind</th>'
        '<th class="text">state</th><th class="text">what came of it</th><th>own page</th></tr>'
        f"</thead>\n<tbody>\n{rows}</tbody>\n</table></div>\n"
    )
    return page.section("Overview", "", table)


def _row(finding: Finding) -> str:
    name, report = escape(finding.name), "–"
    if finding.sections:
        name = f'<a href="#{_anchor(finding)}">{name}</a>'
    if finding.report:
        report = f'<a href="{quote(finding.report)}">report</a>'
    return (
        f'<tr><td>{name}</td><td class="text">{finding.kind}</td>'
        f'<td class="text">{escape(finding.state)}</td>'
        f'<td class="text long">{escape(finding.headline)}</td><td>{report}</td></tr>\n'
    )


def _article(finding: Finding) -> str:
    if not finding.sections:
        return ""
    return f'<article id="{_anchor(finding)}">\n{"".join(finding.sections)}</article>\n'


def _anchor(finding: Finding) -> str:
    return quote(f"{finding.kind}-{finding.name}", safe="")
