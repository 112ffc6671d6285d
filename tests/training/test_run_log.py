"""The log equals an uninterrupted run's, whatever happened on the way."""

import json
import sys
import types

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorboardX.proto.event_pb2 import Event

from ouro_jax.errors import ConfigError
from ouro_jax.training.run_log import RunLog, read_log, scalars_of


def train_record(step: int, **fields) -> dict:
    return {
        "kind": "train", "time": 1.5 * step, "stage": "stable_1a", "step": step,
        "tokens": 4096 * step, "loss": 5.0 / (step + 1), "loss_per_loop": [3.0, 2.5],
        "grad_norms": {"head": 0.25}, "learning_rate": 1e-3, "tokens_per_second": None,
    } | fields  # fmt: skip


def event(name: str, step: int) -> dict:
    return {"kind": "event", "event": name, "stage": "stable_1a", "step": step, "tokens": 0}


def log_of(workdir, tensorboard=False, **options) -> RunLog:
    return RunLog(workdir, tensorboard=tensorboard, **options)


def write_all(workdir, records) -> None:
    log = log_of(workdir)
    for record in records:
        log.write(record)
    log.close()


def read_events(directory) -> list[Event]:
    """Reads TensorBoard's framing (length, CRC, data, CRC) without TensorBoard."""
    events = []
    for path in sorted(directory.iterdir()):
        content, at = path.read_bytes(), 0
        while at < len(content):
            size = int.from_bytes(content[at : at + 8], "little")
            events.append(Event.FromString(content[at + 12 : at + 12 + size]))
            at += 16 + size
    return events


def test_a_log_reads_back_as_written(tmp_path):
    records = [event("stage_start", 0), train_record(1), train_record(2)]
    write_all(tmp_path, records)
    assert read_log(tmp_path) == records


def test_each_record_is_on_disk_at_once(tmp_path):
    log = log_of(tmp_path)
    log.write(train_record(1))
    assert read_log(tmp_path) == [train_record(1)]
    log.close()


def test_nan_and_infinity_are_null(tmp_path):
    write_all(
        tmp_path,
        [train_record(1, loss=float("nan"), loss_per_loop=[1.0, float("inf")])],
    )
    (record,) = read_log(tmp_path)
    assert record["loss"] is None and record["loss_per_loop"] == [1.0, None]
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def test_other_processes_write_nothing(tmp_path):
    log = log_of(tmp_path, enabled=False, tensorboard=True)
    log.write(train_record(1))
    log.rewind(0)
    log.close()
    assert list(tmp_path.iterdir()) == []
    assert log.records() == []


@given(cut=st.integers(1, 400))
def test_a_torn_last_line_is_dropped_and_the_log_goes_on(tmp_path_factory, cut):
    workdir = tmp_path_factory.mktemp("torn")
    write_all(workdir, [train_record(1), train_record(2)])
    path = workdir / "metrics.jsonl"
    second = len(path.read_bytes().splitlines(keepends=True)[1])
    path.write_bytes(path.read_bytes()[: -min(cut, second)])
    assert read_log(workdir) == [train_record(1)]
    write_all(workdir, [train_record(3)])
    assert read_log(workdir) == [train_record(1), train_record(3)]


@pytest.mark.parametrize("line", ["{torn", "[1, 2]", '{"no": "kind"}'])
def test_a_corrupt_line_in_the_middle_is_named(tmp_path, line):
    write_all(tmp_path, [train_record(1)])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(line + "\n" + json.dumps(train_record(2)) + "\n")
    with pytest.raises(ConfigError, match=r"metrics\.jsonl, line 2"):
        read_log(tmp_path)


def test_a_missing_log_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"metrics\.jsonl: no such file"):
        read_log(tmp_path / "elsewhere")


@given(killed_at=st.integers(1, 12), every=st.integers(1, 5))
def test_a_killed_and_continued_log_equals_an_uninterrupted_one(tmp_path_factory, killed_at, every):
    """A stage of 6 steps, then one of 6; a checkpoint every few steps and at the stages' ends."""
    steps = [
        *[train_record(step) for step in range(1, 7)],
        *[train_record(step, stage="anneal") for step in range(7, 13)],
    ]

    def segment(start: int, stop: int) -> list[dict]:
        records = []
        for record in steps[start:stop]:
            if record["step"] in (1, 7):
                records.append(event("stage_start", record["step"] - 1))
            records.append(record)
            if record["step"] in (6, 12):
                records.append(event("stage_end", record["step"]))
        return records

    workdir = tmp_path_factory.mktemp("killed")
    checkpoint = max(s for s in range(killed_at + 1) if s % every == 0 or s == 6)
    write_all(workdir, segment(0, killed_at))
    if killed_at == 6:
        write_all(workdir, [event("stage_start", 6)])
    log = log_of(workdir)
    log.rewind(checkpoint)
    log.close()
    write_all(workdir, segment(checkpoint, 12))
    assert read_log(workdir) == segment(0, 12)


def test_rewinding_keeps_what_has_no_step(tmp_path):
    baseline = {"kind": "baseline", "source": "code", "unigram_bits_per_byte": 4.0}
    write_all(tmp_path, [train_record(1), baseline, train_record(2)])
    log = log_of(tmp_path)
    log.rewind(1)
    assert log.records() == [train_record(1), baseline]
    log.write(train_record(2, loss=9.0))
    log.close()
    assert read_log(tmp_path)[-1]["loss"] == 9.0


def test_names_of_scalars():
    assert dict(scalars_of(train_record(3))) == {
        "train/loss": 1.25, "train/loss_per_loop/1": 3.0, "train/loss_per_loop/2": 2.5,
        "train/grad_norms/head": 0.25, "train/learning_rate": 1e-3,
    }  # fmt: skip
    heldout = {"kind": "heldout", "source": "code", "tokens": 1, "stage": "gate", "mean_depth": 2.0,
               "trained_loops": 4, "num_tokens": 10, "num_bytes": 20}  # fmt: skip
    assert dict(scalars_of(heldout)) == {"heldout/code/mean_depth": 2.0}
    assert dict(scalars_of(event("start", 0))) == {}


def test_tensorboard_counts_in_tokens_and_voids_what_was_rewound(tmp_path):
    tokens = 7_700_000_000_000
    log = RunLog(tmp_path)
    log.write(train_record(1, tokens=tokens))
    log.write(train_record(2, tokens=tokens + 4096))
    log.rewind(1)
    log.write(train_record(2, tokens=tokens + 4096, loss=9.0))
    log.close()
    events = read_events(tmp_path / "tensorboard")
    losses = [
        (event.step, value.simple_value)
        for event in events
        for value in event.summary.value
        if value.tag == "train/loss"
    ]
    assert losses[0] == (tokens, 2.5)
    assert losses[-1] == (tokens + 4096, 9.0)
    assert [event.step for event in events if event.HasField("session_log")] == [tokens + 1]


def test_wandb_gets_the_scalars_over_tokens_and_one_run_per_workdir(tmp_path, monkeypatch):
    runs = []

    class Run:
        def __init__(self, **options):
            self.options, self.logged = options, []
            runs.append(self)

        def define_metric(self, *_, **__): ...

        def log(self, values):
            self.logged.append(values)

        def finish(self): ...

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=Run))
    for step in (1, 2):
        log = log_of(tmp_path, wandb_project="ouro")
        log.write(train_record(step))
        log.close()
    assert runs[0].logged[0]["tokens"] == 4096 and runs[0].logged[0]["train/loss"] == 2.5
    assert runs[0].options["project"] == "ouro"
    assert runs[0].options["id"] == runs[1].options["id"]


def test_an_absent_wandb_is_a_clear_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="pip install wandb"):
        log_of(tmp_path, wandb_project="ouro")
