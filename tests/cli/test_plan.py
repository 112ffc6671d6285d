"""`ouro plan` from the outside: compiled for TPUs that are not there."""

import json
import shutil
import subprocess
import sys

import pytest

TINY = ("--config=configs/tiny.py", "--topology=v5e:2x2")
KEYS = {
    "fits", "hbm_gib", "hbm_capacity_gib", "flops_per_step", "collective_gb", "mfu_bound", "days",
    "chip_hours", "hbm_by_kind_gib", "seconds", "bound_by", "collectives", "layout",
}  # fmt: skip


def ouro_plan(*arguments: str, python: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    command = [sys.executable, *python, "-m", "ouro_jax.cli.plan", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def plan(*arguments: str) -> dict:
    result = ouro_plan(*arguments, "--json")
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1]) | {"text": result.stdout}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """One cache for all tests: the first to ask for a program compiles it."""
    return f"--cache={tmp_path_factory.mktemp('plan')}"


def test_a_stage_that_fits_says_where_memory_and_time_go(cache, tmp_path):
    files = f"--dump_hlo={tmp_path / 'step.txt'}", f"--picture={tmp_path / 'bars.png'}"
    mesh = "--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.layout.gather=each_loop"
    row = plan(*TINY, "--stage=stable_1b", *mesh, cache, *files)
    assert row.keys() > KEYS and row["fits"]
    assert 0 < row["hbm_gib"] < 0.1 and row["hbm_capacity_gib"] == 15.75
    # 1,024 tokens; 6 × (2 layers × 4 loops × (4 · 128² + 3 · 128 · 352 + 128 · 129) + 4 heads).
    per_token = 6 * (8 * (4 * 128**2 + 3 * 128 * 352 + 128 * 129) + 4 * 128 * 1024)
    assert row["flops_per_step"] == 1024 * per_token
    assert row["layout"]["mesh"] == {"slice": 1, "data": 2, "fsdp": 2, "tensor": 1, "context": 1}
    total = sum(part["total_bytes"] for part in row["collectives"])
    assert row["collective_gb"] == pytest.approx(total / 1e9) and total > 0
    assert row["mfu_bound"] == pytest.approx(
        row["flops_per_step"] / (4 * 197e12 * max(row["seconds"].values()))
    )
    assert row["days"] * 4 * 24 == pytest.approx(row["chip_hours"])
    assert row["replicated_matrices"] == 0 == row["rematerializations"]
    assert "fits, with" in row["text"] and "all-gather" in row["text"]
    assert "ENTRY" in (tmp_path / "step.txt").read_text()
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")
    # What was compiled is kept, and asked: another figure in it is the one that is told.
    copy = shutil.copytree(cache.removeprefix("--cache="), tmp_path / "copy")
    (kept,) = copy.glob("*/result.json")
    kept.write_text(json.dumps(json.loads(kept.read_text()) | {"peak_bytes": 3 * 2**30}))
    assert plan(*TINY, "--stage=stable_1b", *mesh, f"--cache={copy}")["hbm_gib"] == 3


def test_what_does_not_fit_is_an_answer_that_says_what_would(cache):
    shape = (
        "--config.mesh.fsdp=2",
        "--config.layout.microbatch_rows=1",
        "--config.layout.remat=none",
    )
    row = plan(
        "--config=configs/ouro_1p4b.py", "--topology=v5e-4", "--stage=stable_1b", *shape, cache
    )
    assert row["fits"] is False and row["hbm_gib"] > row["hbm_capacity_gib"] == 15.75
    assert row["mfu_bound"] is None and "RESOURCE_EXHAUSTED" in row["reason"]
    assert "v5e-4 is v5e:2x2: 4 chips." in row["text"]
    assert "does not fit" in row["text"]
    assert "By estimate this fits: --config.mesh.slice=1" in row["text"]
    assert "--config.layout.remat=layer" in row["text"]


def test_an_answer_is_planned_for_one_chip(cache):
    row = plan(*TINY, "--program=decode", "--rows=2", cache)
    assert row["fits"] and row["chips"] == 1 and row["bound_by"] == "hbm"
    # 2 rows × 256 slots × 4 loops × 2 layers × keys and values of 4 heads of 32, float32.
    assert row["hbm_by_kind_gib"]["cache"] * 2**30 == 2 * 256 * 4 * 2 * 2 * 4 * 32 * 4
    assert row["tokens_per_second"] == pytest.approx(2 / row["seconds"]["hbm"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--config=configs/tiny.py",), "--topology is missing"),
        ((*TINY[:1], "--topology=v5e:16x17"), "The nearest is v5e:16x16"),
        ((*TINY, "--stage=stable_1c"), "Did you mean 'stable_1b'?"),
        ((*TINY, "--program=serve"), "--program = 'serve': expected one of train"),
        ((*TINY, "--search"), "--search is for one stage: name it"),
        ((*TINY, "--rows=0"), "--rows = 0"),
        ((*TINY, "--stage=sft", "--program=decode", "--search"), "has no layouts"),
    ],
)
def test_wrong_flags_leave_with_2_at_once(arguments, words):
    result = ouro_plan(*arguments, python=("-X", "importtime"))
    assert result.returncode == 2 and words in result.stderr
    imported = {line.split("|")[-1].strip() for line in result.stderr.splitlines()}
    assert "ouro_jax.config" in imported and "jax" not in imported  # which takes seconds
