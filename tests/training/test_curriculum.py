"""Batches, steps and learning rates of a stage against hand numbers and against walking it."""

import dataclasses
import math
import runpy
from pathlib import Path

import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ouro_jax.config import Config, ModelConfig, Stage, from_config_dict
from ouro_jax.errors import ConfigError
from ouro_jax.training.curriculum import StagePlan, first_rows, microbatch_rows

CONFIGS = Path(__file__).parents[2] / "configs"
STAGE = Stage(
    tokens=1000, sequence_length=10, batch_tokens=100, num_layers=1, num_loops=2,
    mixture={"code": 1.0}, learning_rate=1.0, final_learning_rate=0.1,
)  # fmt: skip


def plan(**changes) -> StagePlan:
    return StagePlan("anneal", dataclasses.replace(STAGE, **changes))


def walk(stage_plan: StagePlan) -> list[tuple[int, int]]:
    """(first row, rows) of every step, one after the other."""
    steps, row = [], 0
    while rows := stage_plan.batch_rows(row):
        steps.append((row, rows))
        row += rows
    return steps


def test_a_ramp_by_hand():
    # Batches of 2 rows to row 30, of 5 to row 50, of 10 to row 100.
    ramp = plan(batch_ramp=((300, 20), (500, 50)))
    rows = [rows for _, rows in walk(ramp)]
    assert rows == [2] * 15 + [5] * 4 + [10] * 5
    assert (ramp.total_rows, ramp.num_steps) == (100, 24)
    assert ramp.batch_sizes() == [2, 5, 10]
    assert ramp.batch_rows(100) == ramp.batch_rows(10**9) == 0


def test_a_step_that_reaches_over_a_border_is_whole():
    # 250 tokens end within the 13th step, which ends at row 26; 74 rows are 8 steps of 10.
    ramp = plan(batch_ramp=((250, 20),))
    assert [rows for _, rows in walk(ramp)] == [2] * 13 + [10] * 8
    assert (ramp.total_rows, ramp.num_steps) == (106, 21)
    # 1001 tokens are 101 rows, and the last step is whole too.
    assert plan(tokens=1001).total_rows == 110


def test_a_stage_that_ends_within_its_ramp():
    short = plan(tokens=100, batch_ramp=((300, 20), (500, 50)))
    assert (short.total_rows, short.num_steps) == (10, 5)


@settings(deadline=None)
@given(
    tokens=st.integers(1, 3000),
    ramp=st.lists(st.tuples(st.integers(1, 900), st.integers(1, 9)), max_size=4),
    batch=st.integers(1, 9),
)
def test_walking_a_stage_takes_as_many_steps_and_rows_as_it_says(tokens, ramp, batch):
    table, until = [], 0
    for more, rows in ramp:
        until += more
        table.append((until, 10 * rows))
    ramped = plan(tokens=tokens, batch_ramp=tuple(table), batch_tokens=10 * batch)
    steps = walk(ramped)
    assert len(steps) == ramped.num_steps
    last_row, last_rows = steps[-1]
    assert last_row * 10 < tokens <= ramped.total_rows * 10 == (last_row + last_rows) * 10
    for row, rows in steps:
        row_of_table = next((size for end, size in table if row * 10 < end), 10 * batch)
        assert rows * 10 == row_of_table


def rates(tokens, **changes) -> list[float]:
    stage_plan = plan(**changes)
    return [stage_plan.learning_rate(count // 10) for count in tokens]


def test_learning_rates_by_hand():
    constant = rates((100, 1000), schedule="constant")
    assert constant == [1.0, 1.0]
    warm = rates((10, 100, 200, 1000), warmup_tokens=200)
    assert warm == pytest.approx([0.05, 0.5, 1.0, 1.0])
    cosine = rates((0, 250, 500, 1000, 1100), schedule="cosine")
    quarter = 0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2
    assert cosine == pytest.approx([1.0, quarter, 0.55, 0.1, 0.1])
    warm_cosine = rates((100, 200, 600, 1000), schedule="cosine", warmup_tokens=200)
    assert warm_cosine == pytest.approx([0.5, 1.0, 0.55, 0.1])
    wsd = {"schedule": "wsd", "warmup_tokens": 200, "decay_tokens": 400}
    assert rates((100, 200, 600, 800, 1000, 1100), **wsd) == pytest.approx(
        [0.5, 1.0, 1.0, 0.55, 0.1, 0.1]
    )
    assert rates((500, 1000), schedule="wsd") == pytest.approx([1.0, 1.0])


def test_trillions_of_tokens_keep_their_clock():
    config = from_config_dict(runpy.run_path(str(CONFIGS / "ouro_1p4b.py"))["get_config"]())
    first, anneal = (StagePlan(name, config.stages[name]) for name in ("stable_1a", "anneal"))
    batch_rows = 2048
    ramp_rows = sum(
        math.ceil(10**11 / (batch * 2**20)) * batch * 256 for batch in (4, 5, 6, 7)
    )  # each batch size holds for about 100B tokens
    assert first.batch_rows(ramp_rows) == batch_rows
    assert 0 <= first.total_rows * 4096 - 3 * 10**12 < 8 * 2**20
    assert first.learning_rate(4 * 10**9 // 4096) == pytest.approx(1.5e-4, rel=1e-5)
    assert first.learning_rate(first.total_rows) == pytest.approx(3e-4, rel=1e-6)
    middle = 700 * 10**9 // 16_384
    assert anneal.learning_rate(middle) == pytest.approx(1.65e-4, rel=1e-5)
    assert anneal.learning_rate(anneal.total_rows) == pytest.approx(3e-5, rel=1e-6)
    # One step moves it: the clock is fine enough at the end of the stage too.
    steps = [anneal.learning_rate(middle + 512 * step) for step in range(0, 40, 10)]
    assert steps == sorted(steps, reverse=True) and len(set(steps)) == 4


def test_microbatches_are_chosen_to_divide_every_batch_and_hold_8192_tokens():
    long = plan(sequence_length=4096, batch_tokens=64 * 4096, batch_ramp=((4096, 48 * 4096),))
    assert microbatch_rows(long, 1, 0) == 2
    assert microbatch_rows(long, 8, 0) == 16  # 8 and 6 rows a device
    assert microbatch_rows(long, 16, 0) == 16  # 4 and 3 rows: 1 at a time
    assert microbatch_rows(long, 8, 1) == 8
    longest = plan(sequence_length=65_536, batch_tokens=4 * 65_536)
    assert microbatch_rows(longest, 2, 0) == 2
    assert microbatch_rows(plan(), 2, 0) == 10  # 5 rows of 10 tokens each: all at once
    assert microbatch_rows(plan(), 2, 5) == 10


def test_batches_that_do_not_divide_are_refused_with_the_way_out():
    with pytest.raises(ConfigError) as error:
        microbatch_rows(plan(), 4, 0)
    text = str(error.value)
    assert "stages.anneal.batch_tokens" in text and "10 rows of 10 tokens" in text
    assert "over 4 devices (mesh" in text and "a multiple of 40 tokens" in text
    with pytest.raises(ConfigError, match="2 rows of 10 tokens"):
        microbatch_rows(plan(batch_ramp=((300, 20),)), 5, 0)
    with pytest.raises(ConfigError) as error:
        microbatch_rows(plan(), 2, 3)
    text = str(error.value)
    assert "layout.microbatch_rows = 3" in text and "5 rows per device of stages.anneal" in text


def test_rates_are_those_of_the_schedules_of_optax():
    decay = optax.cosine_decay_schedule(1.0, 800.0, 0.1)
    warm = optax.join_schedules([optax.linear_schedule(0.0, 1.0, 200.0), decay], [200.0])
    tokens = range(10, 1200, 30)
    ours = rates(tokens, schedule="cosine", warmup_tokens=200)
    assert ours == pytest.approx([float(warm(float(n))) for n in tokens], abs=1e-6)
    stable, fall = optax.constant_schedule(1.0), optax.linear_schedule(1.0, 0.1, 300.0)
    wsd = optax.join_schedules([stable, fall], [700.0])
    ours = rates(tokens, schedule="wsd", decay_tokens=300)
    assert ours == pytest.approx([float(wsd(float(n))) for n in tokens], abs=1e-6)


def stages_of(**changes) -> Config:
    """Three stages with rows of 10 tokens and one of 20, in an order that is not the paper's."""
    model = ModelConfig(64, 8, 8, 1, 1, 1, 8)
    mixed = dataclasses.replace(STAGE, mixture={"code": 0.75, "math": 0.25})
    stages = {
        "gate": mixed,
        "stable_1a": STAGE,
        "anneal": dataclasses.replace(mixed, sequence_length=20, batch_tokens=200),
        "stable_1b": dataclasses.replace(mixed, skip_rows=((40, 60),)),
    }
    return Config(name="test", model=model, stages=stages, **changes)


def test_sources_go_on_where_earlier_stages_with_rows_of_their_length_stopped():
    config = stages_of()
    assert first_rows(config, "stable_1a") == {}
    assert first_rows(config, "stable_1b") == {"code": 100}
    assert first_rows(config, "anneal") == {}
    # 100 rows of stable_1b are given and 20 skipped: 120 are behind, a quarter of them math.
    assert first_rows(config, "gate") == {"code": 100 + 90, "math": 30}
    fork = stages_of(first_stage="stable_1b", init_from="elsewhere")
    assert first_rows(fork, "stable_1b") == {"code": 100}


def test_loops_are_drawn_evenly_where_fewer_are_allowed():
    drawn = [plan(num_loops=4, min_loops=2).num_loops(row) for row in range(0, 30_000, 10)]
    counts = {loops: drawn.count(loops) for loops in set(drawn)}
    assert set(counts) == {2, 3, 4}
    assert all(abs(count - 1000) < 4 * math.sqrt(1000 * 2 / 3) for count in counts.values())
    assert {plan(num_loops=4).num_loops(row) for row in range(0, 1000, 10)} == {4}


def test_work_on_a_token_is_that_of_the_mean_depth():
    model = ModelConfig(
        vocab_size=100, hidden_size=8, intermediate_size=16, num_layers=1, num_heads=1,
        num_kv_heads=1, head_dim=8, num_loops=4,
    )  # fmt: skip
    each = [
        plan(num_loops=loops).flops_per_token(dataclasses.replace(model, num_loops=loops))
        for loops in (2, 3, 4)
    ]
    assert plan(num_loops=4, min_loops=2).flops_per_token(model) == round(sum(each) / 3)
    assert each[0] < each[1] < each[2] == plan(num_loops=4).flops_per_token(model)
