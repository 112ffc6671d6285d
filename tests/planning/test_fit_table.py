"""A row of docs/fit.md compiled here: what the table says is what this code does."""

from pathlib import Path

import jax
import pytest

from ouro_jax.planning.fit_table import TRIES, fit_jobs, table_cells
from ouro_jax.planning.search import Job, plan_jobs

TABLE = Path(__file__).parents[2] / "docs" / "fit.md"
# By place in the row: the peak, GB moved, the bound on MFU, days.
FIGURES = (2, 3, 5, 6)
COMPILE_SECONDS = 7


def job_of(config: str, topology: str, stage: str) -> Job:
    (job,) = (
        job for job in fit_jobs()
        if (job.config.name, job.topology.name, job.stage) == (config, topology, stage)
    )  # fmt: skip
    return job


def row_of_table(config: str, topology: str, stage: str) -> list[str]:
    section = TABLE.read_text().split(f"## {config} on {topology}, ")[1].split("\n## ")[0]
    (line,) = (line for line in section.splitlines() if line.startswith(f"| {stage} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


ROW = ("ouro_1p4b", "v5p:4x4x4", "stable_1b")


@pytest.fixture(scope="module")
def row(tmp_path_factory):
    """A row of the table compiled anew."""
    cache = tmp_path_factory.mktemp("programs")
    (found,) = plan_jobs([job_of(*ROW)], cache, TRIES, lambda done, total: None)
    return found


def test_a_row_compiles_as_the_table_says(row):
    assert row["fits"] and row["hbm_gib"] <= row["hbm_capacity_gib"]
    assert row["rematerializations"] == 0 == row["replicated_matrices"]
    if f"with jax {jax.__version__}," not in TABLE.read_text():
        pytest.skip("the figures of docs/fit.md are those of another compiler")
    ours, theirs = table_cells(row), row_of_table(*ROW)
    for place, (found, written) in enumerate(zip(ours, theirs, strict=True)):
        if place in FIGURES:
            assert float(found) == pytest.approx(float(written), rel=0.02), (place, ours, theirs)
        elif place != COMPILE_SECONDS:
            assert found == written, f"run `ouro plan --fit_table=docs/fit.md`: {ours}, {theirs}"


def test_one_optimizer_step_moves_the_weights_once(row):
    """8M tokens of the 1.4B in 16 microbatches of 4 loops, data 4 × fsdp 16: bfloat16 weights are
    gathered and float32 gradients scattered once over fsdp, then summed over data."""
    mesh = {"slice": 1, "data": 4, "fsdp": 16, "tensor": 1, "context": 1}
    assert row["layout"]["gather"] == "once" and row["layout"]["mesh"] == mesh
    assert row["fits"] and row["microbatches"] == 16 and row["tokens_per_step"] == 2**23
    # 24 layers of 51.38 M weights, embedding and head of 100.66 M each.
    weights = 24 * 51_380_224 + 2 * 100_663_296
    expected = weights * (2 + 4 + 4 / 16) / 1e9
    assert expected < row["collective_gb"] < 1.001 * expected < 9.0
