"""Tries layouts of a stage: which of them compile, which is bounded least, what would fit."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ouro_jax.config import MESH_AXES, Config, LayoutConfig, MeshConfig
from ouro_jax.planning.compile import compile_all
from ouro_jax.planning.plan import Row, answer_request, describe, stage_layouts, stage_request
from ouro_jax.planning.topologies import Topology
from ouro_jax.training.curriculum import StagePlan
from ouro_jax.training.layout import Layout
from ouro_jax.training.layout_choice import estimated_bytes

OnResult = Callable[[int, int], None]
"""Called with how many programs are compiled and how many there are."""


@dataclasses.dataclass(frozen=True)
class Job:
    """A stage of a config on a topology."""

    config: Config
    stage: str
    topology: Topology


def plan_jobs(jobs: Sequence[Job], cache: Path, tries: int, on_result: OnResult) -> list[Row]:
    """A row for each job: the first of its layouts that compiles, the most promising tried first.

    Where `tries` are refused the row is that of the first. `refused` counts those before.
    """
    rows: dict[int, Row] = {}
    left = [stage_layouts(job.config, job.stage, job.topology) for job in jobs]
    for attempt in range(tries):
        requests = {
            number: stage_request(job.config, job.stage, job.topology, left[number][0])
            for number, job in enumerate(jobs)
            if left[number] and not (attempt and rows[number]["fits"])
        }
        results = compile_counted(list(requests.values()), cache, on_result)
        for number, request in requests.items():
            job, result = jobs[number], results[request]
            if result["fits"] or not attempt:
                row = describe(job.config, job.stage, request, result, cache)
                rows[number] = row | {"refused": attempt}
            if not result["fits"]:
                left[number] = _after(job, left[number], result)
    return [rows[number] for number in range(len(jobs))]


def _after(job: Job, layouts: Sequence[Layout], result: Row) -> list[Layout]:
    """What is worth a try when the first of `layouts` was refused."""
    first, *others = layouts
    if result["peak_bytes"] is None:  # not for memory: the same program on another mesh as well
        return [layout for layout in others if _kind(layout) != _kind(first)]
    # The compiler needed more than was estimated: it will of the others too.
    limit = _estimate(job, first) * job.topology.granted_bytes / result["peak_bytes"]
    return [layout for layout in others if _estimate(job, layout) <= limit]


def _estimate(job: Job, layout: Layout) -> float:
    plan = StagePlan(job.stage, job.config.stages[job.stage])
    return estimated_bytes(job.config.stage_model(job.stage), plan, layout)


def _kind(layout: Layout) -> tuple[Any, ...]:
    """What makes layouts different programs; the others differ in sizes."""
    return layout.gather, layout.remat, layout.mesh.tensor > 1, layout.mesh.context > 1


def plan_answer(job: Job, program: str, rows: int, cache: Path, on_result: OnResult) -> Row:
    """The row of `prefill` or `decode`."""
    request = answer_request(job.config, job.stage, job.topology, program, rows)
    results = compile_counted([request], cache, on_result)
    return describe(job.config, job.stage, request, results[request], cache)


def compile_counted(requests: Sequence[Any], cache: Path, on_result: OnResult) -> dict[Any, Row]:
    """The results of distinct `requests`, telling `on_result` of each."""
    total, results = len(set(requests)), {}
    on_result(0, total)
    for request, result in compile_all(requests, cache):
        results[request] = result
        on_result(len(results), total)
    return results


def search(job: Job, cache: Path, limit: int, on_result: OnResult) -> list[Row]:
    """Compiles the most promising layout of each kind, `limit` at most; the least bounded first.

    Equal bounds are ranked by what else has to be hidden behind them; refused ones are last.
    """
    best: dict[tuple[Any, ...], Layout] = {}
    for layout in stage_layouts(job.config, job.stage, job.topology):
        best.setdefault(_kind(layout), layout)
    requests = [
        stage_request(job.config, job.stage, job.topology, layout)
        for layout in list(best.values())[:limit]
    ]
    results = compile_counted(requests, cache, on_result)
    rows = [
        describe(job.config, job.stage, request, results[request], cache) for request in requests
    ]

    def rank(row: Row) -> tuple[float, float]:
        times = row["seconds"].values() if row["fits"] else (float("inf"),)
        return max(times), sum(times)

    return sorted(rows, key=rank)


def suggestions(job: Job, refused: Layout, count: int = 3) -> list[Layout]:
    """Layouts that fit by estimate, whatever the config sets; those nearest to `refused` first."""
    free = dataclasses.replace(job.config, mesh=MeshConfig(), layout=LayoutConfig())
    found = [
        layout
        for layout in stage_layouts(free, job.stage, job.topology)
        if layout != refused and _estimate(job, layout) <= job.topology.granted_bytes
    ]
    return sorted(found, key=lambda layout: len(_keys(layout).items() - _keys(refused).items()))[
        :count
    ]


def flags_of(layout: Layout) -> str:
    """The overrides that make `layout` the one that a run takes."""
    return " ".join(f"--config.{key}={value}" for key, value in _keys(layout).items())


def _keys(layout: Layout) -> dict[str, Any]:
    axes = {f"mesh.{axis}": getattr(layout.mesh, axis) for axis in MESH_AXES}
    names = ("gather", "remat", "microbatch_rows")
    return axes | {f"layout.{name}": getattr(layout, name) for name in names}
