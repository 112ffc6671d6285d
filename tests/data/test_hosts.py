"""Real processes over loopback read on where others stopped: the same rows at every step.

1 → 2 → 4 → 1 of them, each joined by `jax.distributed`, against one that is never interrupted.
"""

import itertools
import json
import os
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from micro_run import ROOT
from prepared import write_rows
from read_hosts import Step, read_steps

from ouro_jax.config import Config, DataConfig, ModelConfig, Stage, to_dict
from ouro_jax.data.rows import Row
from ouro_jax.data.tokenizer import tokenizer_hash
from ouro_jax.training.curriculum import StagePlan

# Rows of each source; math runs out in the second stage, where four processes read.
ROWS = {"code": 1000, "math": 100, "prose": 500}
# (processes, steps): they stop inside the ramp, after its first border, and in the last stage.
SEGMENTS = [(1, 9), (2, 17), (4, 32), (1, 1000)]
SKIPPED = ((100, 130), (130, 133))


def make_source(root: Path, source: str, length: int, rows: int) -> None:
    """Rows that differ, of one to four documents and some padding."""
    rng = np.random.default_rng([length, *source.encode()])

    def row(number: int) -> Row:
        tokens = rng.integers(0, 256, length)
        tokens[:3] = ord(source[0]), number // 256, number % 256
        return Row(tokens, rng.integers(1, length // 4, rng.integers(1, 5)).astype(np.uint32))

    write_rows(
        root / source / f"train-{length}", map(row, range(rows)), sequence_length=length,
        vocab_size=256, tokenizer_hash=tokenizer_hash(root / "tokenizer.json"), source=source,
        rows_per_shard=64,
    )  # fmt: skip


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Config:
    """Three stages: a ramp with skipped rows, the same sources again, and longer rows."""
    root = tmp_path_factory.mktemp("hosts")
    (root / "tokenizer.json").write_text("{}")
    for source, rows in ROWS.items():
        make_source(root, source, 16, rows)
    make_source(root, "code", 32, 60)
    first = Stage(
        tokens=240 * 16, sequence_length=16, batch_tokens=12 * 16, num_layers=1, num_loops=1,
        mixture={"code": 0.5, "math": 0.3, "prose": 0.2}, learning_rate=1.0,
        batch_ramp=((60 * 16, 4 * 16), (160 * 16, 8 * 16)), skip_rows=SKIPPED,
    )  # fmt: skip
    second = Stage(
        tokens=160 * 16, sequence_length=16, batch_tokens=8 * 16, num_layers=1, num_loops=1,
        mixture={"code": 0.6, "math": 0.4}, learning_rate=1.0,
    )  # fmt: skip
    third = Stage(
        tokens=100 * 32, sequence_length=32, batch_tokens=8 * 32, num_layers=1, num_loops=1,
        mixture={"code": 1.0}, learning_rate=1.0,
    )  # fmt: skip
    stages = {"stable_1a": first, "stable_1b": second, "anneal": third}
    model = ModelConfig(256, 8, 8, 1, 1, 1, 8)
    return Config("hosts", model, stages, data=DataConfig(root=str(root)))


@pytest.fixture(scope="module")
def uninterrupted(config) -> list[Step]:
    """What one process reads without a stop."""
    return list(read_steps(config, "stable_1a", 0, host=0, num_hosts=1))


def run_hosts(config: Config, folder: Path, hosts: int, **task) -> list[list[Step]]:
    """What each of `hosts` processes read."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(to_dict(config)))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    task |= {"hosts": hosts, "address": address, "config": str(folder / "config.json")}
    outputs = [folder / f"{host}.json" for host in range(hosts)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "read_hosts.py"),
             json.dumps(task | {"host": host, "output": str(output)})],
            env=environment, stderr=subprocess.PIPE, text=True,
        )
        for host, output in enumerate(outputs)
    ]  # fmt: skip
    try:
        errors = [process.communicate(timeout=60)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert not any(process.returncode for process in processes), errors
    return [[Step(*step) for step in json.loads(output.read_text())] for output in outputs]


def test_one_two_four_and_one_processes_read_what_one_reads(config, uninterrupted, tmp_path):
    read, stage, row = [], "stable_1a", 0
    for number, (hosts, steps) in enumerate(SEGMENTS):
        parts = run_hosts(config, tmp_path / str(number), hosts, steps=steps, stage=stage, row=row)
        assert len(parts) == hosts
        for step in zip(*parts, strict=True):
            assert len({part[:3] for part in step}) == 1  # all hosts are at the same rows
            first = step[0]
            size = (first.end - first.start) // hosts
            assert {len(part.rows) for part in step} == {size}
            rows = list(itertools.chain.from_iterable(part.rows for part in step))
            read.append(first._replace(rows=rows))
        stage, row = read[-1].stage, read[-1].end
    assert [step[:3] for step in read] == [step[:3] for step in uninterrupted]
    for ours, theirs in zip(read, uninterrupted, strict=True):
        assert Counter(ours.rows) == Counter(theirs.rows)


def test_the_processes_change_where_it_is_hard(config, uninterrupted):
    """Where the segments above begin and end, so that they show what they are to show."""
    ends = list(itertools.accumulate(steps for _, steps in SEGMENTS[:-1]))
    stops = [uninterrupted[end - 1] for end in ends]
    assert [(step.stage, step.end - step.start) for step in stops] == [
        ("stable_1a", 4), ("stable_1a", 8), ("anneal", 8),
    ]  # fmt: skip
    two = uninterrupted[ends[0] : ends[1]]
    assert two[0].start < 60 < two[-1].start  # they cross a border of the ramp
    assert two[0].start < SKIPPED[0][0] < two[-1].end  # and the skipped rows
    four = uninterrupted[ends[1] : ends[2]]
    assert {step.stage for step in four} == set(config.stages)
    drawn = StagePlan("stable_1a", config.stages["stable_1a"]).order.drawn(248)["math"]
    later = StagePlan("stable_1b", config.stages["stable_1b"]).order.drawn(160)["math"]
    assert drawn < ROWS["math"] < drawn + later  # math runs out while they read stable_1b


def test_the_stages_together_give_no_row_twice_before_all_were_given(config, uninterrupted):
    seen = Counter(row for step in uninterrupted if step.stage != "anneal" for row in step.rows)
    steps = [step for step in uninterrupted if step.stage != "anneal"]
    assert seen.total() == sum(step.end - step.start for step in steps) == 248 + 160
    twice = sum(count == 2 for count in seen.values())
    drawn = Counter()
    for name in ("stable_1a", "stable_1b"):
        plan = StagePlan(name, config.stages[name])
        drawn.update(plan.order.drawn(plan.total_rows))
    # Only math begins anew; a row that was skipped is not seen the first time.
    assert max(seen.values()) == 2 and 0 < twice <= drawn["math"] - ROWS["math"]
    longer = Counter(row for step in uninterrupted if step.stage == "anneal" for row in step.rows)
    assert sorted(Counter(longer.values()).items()) == [(1, 16), (2, 44)]  # 104 of 60 rows
