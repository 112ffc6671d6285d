"""Which layout a row of a plan gets, how a search ranks, and what is proposed instead."""

import runpy

import pytest

from ouro_jax.config import MeshConfig, from_config_dict
from ouro_jax.planning import search as module
from ouro_jax.planning.fit_table import fit_jobs, write_fit_table
from ouro_jax.planning.search import Job, flags_of, plan_jobs, search, suggestions
from ouro_jax.planning.topologies import parse_topology
from ouro_jax.training.layout import Layout

CONFIG = from_config_dict(runpy.run_path("configs/tiny.py")["get_config"]())
JOBS = [Job(CONFIG, stage, parse_topology("v5e:2x2")) for stage in ("stable_1b", "anneal")]
LAYOUTS = [
    Layout(MeshConfig(1, data, 4 // data, 1, 1), gather, remat, 1)
    for data, gather, remat in (
        (2, "once", "layer"), (1, "once", "layer"), (1, "each_loop", "none"), (4, "once", "layer"),
    )
]  # fmt: skip
ESTIMATES = dict(zip(LAYOUTS, (10e9, 9.5e9, 9e9, 6e9), strict=True))  # bytes
SECONDS = {0: (2.0, 0.1), 1: (2.0, 0.5), 2: (1.5, 1.4), 3: (3.0, 1.0)}


@pytest.fixture
def compiled(monkeypatch):
    """A compiler that takes no time: keeps what it was asked, and refuses the layouts in `refused`,
    which maps their number to the bytes they need (None: it aborts)."""
    asked, refused = [], {}

    def compile_all(requests, cache):
        for request in dict.fromkeys(requests):
            asked.append(request)
            fits = LAYOUTS.index(request.layout) not in refused
            yield request, {"fits": fits, "peak_bytes": refused.get(LAYOUTS.index(request.layout))}

    def describe(config, stage, request, result, cache):
        number = LAYOUTS.index(request.layout)
        compute, ici = SECONDS[number]
        return result | {
            "request": request, "stage": stage, "number": number, "hbm_gib": 1.5,
            "hbm_capacity_gib": 15.75, "seconds": {"compute": compute, "ici": ici},
            "collective_gb": 9.0, "bound_by": "compute", "mfu_bound": 0.7, "days": 12.0,
            "compile_seconds": 60.0, "rematerializations": 0, "replicated_matrices": 0,
            "microbatches": 8, "layout": {
                "mesh": {"data": request.layout.mesh.data, "fsdp": request.layout.mesh.fsdp},
                "gather": request.layout.gather, "remat": request.layout.remat,
                "microbatch_rows": 1,
            },
        }  # fmt: skip

    monkeypatch.setattr(module, "stage_layouts", lambda config, stage, topology: LAYOUTS)
    monkeypatch.setattr(module, "compile_all", compile_all)
    monkeypatch.setattr(module, "describe", describe)
    monkeypatch.setattr(module, "estimated_bytes", lambda model, plan, layout: ESTIMATES[layout])
    return asked, refused


def quiet(done, total):
    assert 0 <= done <= total


def numbers(rows):
    return [row["number"] for row in rows]


def test_a_row_is_the_first_layout_that_compiles(compiled, tmp_path):
    asked, refused = compiled
    rows = plan_jobs(JOBS, tmp_path, 3, quiet)
    assert [(row["stage"], row["number"], row["refused"]) for row in rows] == [
        ("stable_1b", 0, 0), ("anneal", 0, 0),
    ]  # fmt: skip
    assert len(asked) == 2
    # Half as much again as there is: what is estimated at 9 of 10 GB will not fit either.
    refused[0] = 1.5 * JOBS[0].topology.granted_bytes
    assert numbers(plan_jobs(JOBS, tmp_path, 3, quiet)) == [3, 3]
    # The same kind of program would abort again.
    refused[0] = None
    rows = plan_jobs(JOBS, tmp_path, 3, quiet)
    assert [(row["number"], row["refused"]) for row in rows] == [(2, 1), (2, 1)]


@pytest.mark.parametrize("tries", [1, 2, 5])
def test_where_all_are_refused_the_first_refusal_stands(compiled, tmp_path, tries):
    asked, refused = compiled
    refused |= {0: None, 2: None}
    rows = plan_jobs(JOBS[:1], tmp_path, tries, quiet)
    assert numbers(rows) == [0] and not rows[0]["fits"]
    assert len(asked) == min(tries, 2)


def test_a_search_takes_one_of_each_kind_and_ranks_by_the_bound(compiled, tmp_path, monkeypatch):
    _, refused = compiled
    assert numbers(search(JOBS[0], tmp_path, 3, quiet)) == [2, 0]
    assert numbers(search(JOBS[0], tmp_path, 1, quiet)) == [0]
    refused[2] = None
    assert numbers(search(JOBS[0], tmp_path, 3, quiet)) == [0, 2]
    # Of equal bounds the one with less to hide behind it.
    refused.clear()
    monkeypatch.setitem(SECONDS, 2, (2.0, 0.2))
    assert numbers(search(JOBS[0], tmp_path, 3, quiet)) == [0, 2]


def test_proposals_are_near_what_was_refused_and_written_as_flags(compiled, monkeypatch):
    assert suggestions(JOBS[0], LAYOUTS[2], 2) == [LAYOUTS[1], LAYOUTS[0]]
    monkeypatch.setitem(ESTIMATES, LAYOUTS[1], 20e9)
    assert suggestions(JOBS[0], LAYOUTS[2], 2) == [LAYOUTS[0], LAYOUTS[3]]
    assert flags_of(LAYOUTS[0]) == (
        "--config.mesh.slice=1 --config.mesh.data=2 --config.mesh.fsdp=2 --config.mesh.tensor=1 "
        "--config.mesh.context=1 --config.layout.gather=once --config.layout.remat=layer "
        "--config.layout.microbatch_rows=1"
    )


def test_the_fit_table_has_every_stage_of_both_models_on_four_pods(compiled, tmp_path):
    _, refused = compiled
    refused[0] = None
    path = tmp_path / "fit.md"
    write_fit_table(path, tmp_path, quiet)
    text = path.read_text()
    assert len(fit_jobs()) == 4 * (7 + 6) == text.count("| 60 | 1 | 0 | 0 |")
    assert "## ouro_2p6b on 2 × v5p:4x4x4, 128 chips of 15.75 GiB" in text
    assert (
        "| long_context | fsdp 4, each_loop, none, 8 × 1 rows | 1.50 | 9.0 | compute | 70.0 |"
        in text
    )
    assert "`ouro plan --fit_table=" in text
