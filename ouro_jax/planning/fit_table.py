"""The fit table: every stage of both models on four pods, as Markdown."""

import runpy
from collections.abc import Sequence
from pathlib import Path

from ouro_jax.config import Config, from_config_dict
from ouro_jax.planning.compile import versions
from ouro_jax.planning.plan import Row
from ouro_jax.planning.search import Job, OnResult, plan_jobs
from ouro_jax.planning.show import RESOURCES, layout_text
from ouro_jax.planning.topologies import Topology, parse_topology

CONFIGS = ("configs/ouro_1p4b.py", "configs/ouro_2p6b.py")
PODS = (("v5e-256", 1), ("v5p-128", 1), ("v6e-256", 1), ("v5p-128", 2))
TRIES = 4  # layouts of a row at most, where the compiler refuses the first
HEADER = (
    "stage", "layout", "HBM, GiB", "moved, GB", "bound by", "MFU bound, %", "days",
    "compiled, s", "refused before", "rematerialized", "replicated",
)  # fmt: skip


def fit_jobs() -> list[Job]:
    """The rows of the table: pods, and on each the stages of both models."""
    configs = [from_config_dict(runpy.run_path(path)["get_config"]()) for path in CONFIGS]
    return [
        Job(config, stage, parse_topology(*pod))
        for pod in PODS
        for config in configs
        for stage, _ in config.stream()
    ]


def write_fit_table(path: Path, cache: Path, on_result: OnResult) -> list[Row]:
    """Compiles what is not in `cache`, writes the table, and returns its rows."""
    jobs = fit_jobs()
    rows = plan_jobs(jobs, cache, TRIES, on_result)
    path.write_text(_markdown(jobs, rows, f"ouro plan --fit_table={path}"))
    return rows


def _markdown(jobs: Sequence[Job], rows: Sequence[Row], command: str) -> str:
    compilers = ", ".join(f"{name} {versions()[name]}" for name in ("jax", "libtpu"))
    lines = [
        "# What fits where",
        "",
        f"Written by `{command}` with {compilers}; it goes on where it",
        "was stopped. Every row is the train step at the stage's full batch, compiled for chips",
        "that were not there: the peak and the refusals are the compiler's, transfers are counted",
        "in its program, bounds are those of [planning.md](planning.md). Days are those of the",
        "stage's tokens at the bound. A program took so many seconds to compile beside another",
        "one, on two cores. The last columns count layouts refused before this one, the compiler's",
        "warnings of involuntary full rematerialization, and moments that every chip holds whole.",
    ]
    before: tuple[Topology, Config] | None = None
    for job, row in zip(jobs, rows, strict=True):
        if (job.topology, job.config) != before:
            before = job.topology, job.config
            chips = f"{job.topology.num_chips} chips of {row['hbm_capacity_gib']:.2f} GiB"
            lines += ["", f"## {job.config.name} on {job.topology.name}, {chips}", ""]
            lines += ["| " + " | ".join(HEADER) + " |", "|" + " --- |" * len(HEADER)]
        lines.append("| " + " | ".join(table_cells(row)) + " |")
    return "\n".join(lines) + "\n"


def table_cells(row: Row) -> list[str]:
    """A row of the table under HEADER."""
    if not row["fits"]:
        needed = f"{row['hbm_gib']:.2f}: does not fit" if row["hbm_gib"] else "refused"
        return [row["stage"], layout_text(row), needed, *["–"] * 8]
    return [
        row["stage"], layout_text(row), f"{row['hbm_gib']:.2f}", f"{row['collective_gb']:.1f}",
        RESOURCES[row["bound_by"]], f"{100 * row['mfu_bound']:.1f}", f"{row['days']:.3g}",
        f"{row['compile_seconds']:.0f}", str(row["refused"]), str(row["rematerializations"]),
        str(row["replicated_matrices"]),
    ]  # fmt: skip
