"""Clocks by hand-made ticks, the accounting by hand, and both again over a real run."""

import dataclasses
import gzip
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from micro_run import micro_config

from ouro_jax.config import ProfileConfig
from ouro_jax.parallel import devices
from ouro_jax.parallel.chips import CHIPS
from ouro_jax.training import trainer
from ouro_jax.training.profiling import REQUEST_NAME
from ouro_jax.training.run_log import read_log
from ouro_jax.training.timing import (
    LOST_PARTS,
    PARTS,
    Compilations,
    RunTimes,
    StepClock,
    TimeSplit,
    compilations,
    goodput,
    read_times,
    time_spent,
)


class Clock:
    """A clock that the test moves."""

    now = 100.0

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += seconds


def parts(**seconds: float) -> dict[str, float]:
    return dict.fromkeys(PARTS, 0.0) | seconds


def test_every_moment_has_one_part():
    clock = Clock()
    split = TimeSplit(clock)
    clock.wait(1)
    with split("step"):
        clock.wait(2)
        with split("data"):
            clock.wait(4)
        with split("data"):
            clock.wait(8)
            split.count_as("step")
        clock.wait(16)
        assert split.take() == parts(other=1, step=26, data=4)
        clock.wait(32)
    clock.wait(64)
    assert split.take() == parts(step=32, other=64)
    with pytest.raises(ZeroDivisionError), split("evaluation"):
        clock.wait(1)
        _ = 1 / 0
    clock.wait(2)
    assert split.take() == parts(evaluation=1, other=2)


def test_compilation_is_taken_out_of_the_part_it_happened_in():
    clock, compiled = Clock(), Clock()
    split = TimeSplit(clock, compiled)
    with split("evaluation"):
        clock.wait(10)
        compiled.wait(7)
    # JAX reads another clock: what it says can be a little more than what passed.
    with split("step"):
        clock.wait(1)
        compiled.wait(1.01)
    assert split.take() == parts(evaluation=3, compile=8)


@given(st.lists(st.tuples(st.sampled_from(PARTS), st.integers(0, 1000)), max_size=20))
def test_parts_sum_to_the_time_that_passed(ticks):
    clock = Clock()
    split, began = TimeSplit(clock), clock()
    for part, seconds in ticks:
        with split(part):
            clock.wait(seconds)
            with split("data"):
                clock.wait(1)
    assert sum(split.take().values()) == clock() - began


def test_a_step_lasts_from_the_end_of_the_one_before():
    clock = Clock()
    steps = StepClock(clock)
    assert steps.tokens_per_second is None
    assert steps.take() == {"p50": None, "p90": None, "p99": None, "max": None}
    steps.step_ended(1000)  # after a pause: when it began is not known
    for seconds in (1, 2, 3, 4, 10):
        clock.wait(seconds)
        steps.step_ended(100)
    assert steps.tokens_per_second == 500 / 20
    # Linear between ranks: 90 % of the way from the 1st to the 5th is 0.6 past the 4th.
    assert steps.take() == pytest.approx({"p50": 3.0, "p90": 7.6, "p99": 9.76, "max": 10.0})
    clock.wait(50)
    steps.pause()
    steps.step_ended(100)
    assert steps.tokens_per_second is None
    clock.wait(5)
    steps.step_ended(100)
    assert steps.tokens_per_second == 20.0


def test_nested_traces_count_once():
    count, name = Compilations(), "/jax/core/compile/jaxpr_trace_duration"
    for start, end in ((1, 2), (3, 4), (0, 5), (5, 8)):
        count.add_span(name, start, end)
        count.add_span("/jax/other", 0, 100)
    assert count.seconds == 8


def test_jax_tells_of_its_compilations():
    function = jax.jit(lambda x: jnp.sin(x) @ x)
    x, before = np.ones((3, 3), np.float32), compilations().seconds
    began = time.perf_counter()
    function(x)
    passed, compiled = time.perf_counter() - began, compilations().seconds - before
    assert 0.2 * passed < compiled <= 1.01 * passed
    function(x)
    assert compilations().seconds == before + compiled


def window(at: float, end: int, steps: int, stage: str = "stable_1a", /, **seconds) -> dict:
    return {"kind": "window", "time": at, "stage": stage, "step": end, "steps": steps,
            "seconds": parts(**seconds)}  # fmt: skip


def attempt(at: float, step: int, stage: str = "stable_1a") -> dict:
    return {"kind": "attempt", "time": at, "stage": stage, "step": step}


# Killed five seconds after its last word and continued from step 15, then killed again and
# continued from step 10, the checkpoint of 15 lost.
LINES = [
    attempt(1000, 0),
    {"kind": "compile", "stage": "stable_1a", "step": 1, "seconds": 6.0, "from_cache": False},
    window(1015, 8, 8, compile=6, step=8, other=1),
    window(1030, 18, 10, step=10, checkpoint=5),
    attempt(1035, 15),
    window(1050, 18, 3, compile=5, step=3, other=7),
    attempt(1070, 10),
    window(1085, 20, 10, step=5, other=10),
    window(1086, 20, 0, checkpoint=1),
    window(1096, 30, 10, "gate", step=9, data=1),
]


def test_goodput_by_hand_over_two_kills():
    spent = time_spent(LINES)
    nothing = dict.fromkeys((*PARTS, *LOST_PARTS), 0.0)
    assert spent == {
        # Of the second window, steps 9 and 10 of 9 to 18 were kept; of the second attempt none.
        "stable_1a": nothing | {
            "compile": 11.0, "step": 8 + 2 + 5.0, "checkpoint": 6.0, "other": 18.0,
            "repeated": 8 + 3.0, "stopped": 5 + 20.0,
        },
        "gate": nothing | {"step": 9.0, "data": 1.0},
    }  # fmt: skip
    assert sum(sum(seconds.values()) for seconds in spent.values()) == 1096 - 1000
    assert goodput(spent) == pytest.approx(100 * 24 / 96)
    assert goodput({}) is None and time_spent([]) == {}


def test_time_after_the_end_of_a_run_is_not_lost():
    longer = [*LINES, {"kind": "end", "time": 1100}, attempt(9000, 30, "gate")]
    assert time_spent(longer) == time_spent(LINES)
    killed = [*LINES, attempt(9000, 30, "gate")]
    assert time_spent(killed)["gate"]["stopped"] == 9000 - 1096


def test_every_attempt_appends(tmp_path):
    for number in range(2):
        with RunTimes(tmp_path, lambda text: None) as times:
            times.start("gate", 5 * number)
            times.start("sft", 99)
            times.window("gate", 5 * number + 5)
        with (tmp_path / "times.jsonl").open("a") as file:
            file.write('{"kind": "torn')
    lines = read_times(tmp_path)
    assert [line["kind"] for line in lines] == ["attempt", "window", "end"] * 2
    assert [line.get("step") for line in lines] == [0, 5, None, 5, 10, None]
    assert [line["steps"] for line in lines if line["kind"] == "window"] == [5, 5]


def test_a_run_that_fails_has_not_come_to_its_end(tmp_path):
    with pytest.raises(FloatingPointError), RunTimes(tmp_path) as times:
        times.start("gate", 0)
        raise FloatingPointError
    assert [line["kind"] for line in read_times(tmp_path)] == ["attempt"]


def test_a_run_that_trains_nothing_and_other_processes_write_nothing(tmp_path):
    with RunTimes(tmp_path):
        pass
    with RunTimes(tmp_path, enabled=False) as times:
        times.start("gate", 0)
        times.end_stage("gate", 5)
    assert read_times(tmp_path) == [] and not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(workdir, wall seconds) of 16 steps on devices that are taken for TPU v5e, traced twice."""
    folder = tmp_path_factory.mktemp("timing")
    config = micro_config(folder / "data", profile=ProfileConfig(start_step=5, num_steps=2))
    stage = dataclasses.replace(config.stages["stable_1a"], batch_ramp=(), warmup_tokens=0)
    logging = dataclasses.replace(config.logging, every_steps=4)
    config = dataclasses.replace(config, stages={"stable_1a": stage}, logging=logging)
    trainer.prepare_data(config)
    workdir = folder / "run"
    workdir.mkdir()
    (workdir / REQUEST_NAME).touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "chip_of", lambda device: CHIPS["v5e"])
        began = time.perf_counter()
        trainer.train(config, workdir)
        return workdir, time.perf_counter() - began


def test_the_split_of_a_real_run_sums_to_its_wall_time(run):
    workdir, wall = run
    lines = read_times(workdir)
    spent = time_spent(lines)["stable_1a"]
    told = lines[-2]["time"] - lines[0]["time"]
    assert [lines[0]["kind"], lines[-2]["kind"], lines[-1]["kind"]] == ["attempt", "window", "end"]
    assert sum(spent.values()) == pytest.approx(told, abs=0.05)
    assert told == pytest.approx(wall, abs=0.1 * wall)
    for part in ("step", "data", "compile", "evaluation", "checkpoint", "other"):
        assert spent[part] > 0
    assert spent["repeated"] == spent["stopped"] == 0
    (compiled,) = (line for line in lines if line["kind"] == "compile")
    assert compiled["step"] == 1 and 0 < compiled["seconds"] < spent["compile"]
    records = [record for record in read_log(workdir) if record["kind"] == "train"]
    windows = [line for line in lines if line["kind"] == "window"]
    assert [line["steps"] for line in windows] == [4, 4, 4, 4, 0]
    assert [line["seconds"] for line in windows[:-1]] == [record["seconds"] for record in records]
    # The first eight steps stood beside a compilation, a trace or a checkpoint.
    assert [record["tokens_per_second"] is None for record in records] == [True, True, False, False]
    for record in records[2:]:
        p50, p90, p99, largest = (record["step_seconds"][n] for n in ("p50", "p90", "p99", "max"))
        assert 0 < p50 <= p90 <= p99 <= largest < record["seconds"]["step"]


def test_mfu_by_hand(run):
    # One layer twice, width 32, MLP 96 (gate, up, down), two heads of 16, vocabulary 300, rows of
    # 64: a token attends to 32.5 positions on average, for scores and for values.
    layer = 4 * 32 * 32 + 3 * 32 * 96 + 2 * 32.5 * 2 * 16
    flops = 3 * 2 * (2 * layer + 2 * 32 * 300)
    records = [record for record in read_log(run[0]) if record["kind"] == "train"]
    for record in records[2:]:
        speed = record["tokens_per_second"]
        assert record["tokens_per_second_per_device"] == speed / 8
        assert record["mfu"] == pytest.approx(100 * speed * flops / (8 * 197e12))
    for record in records:
        assert record["mfu_peak"] == "TPU v5e data sheet"
        # The CPU keeps no count of its memory.
        assert record["hbm_bytes_in_use"] is record["hbm_bytes_limit"] is None


def test_traces_hold_the_steps_asked_for(run):
    workdir, _ = run
    assert not (workdir / REQUEST_NAME).exists()
    folders = sorted((workdir / "profile").iterdir())
    assert [folder.name for folder in folders] == ["stable_1a-1", "stable_1a-5"]
    for folder, first in zip(folders, (1, 5), strict=True):
        (trace,) = folder.rglob("*.trace.json.gz")
        events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
        steps = [event["args"]["step_num"] for event in events if event.get("name") == "train"]
        assert sorted(map(int, steps)) == [first, first + 1]
        assert list(folder.rglob("*.xplane.pb"))
