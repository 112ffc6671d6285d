"""Whole runs of the trainer: killed and continued, repeated, forked, converted and read back."""

import dataclasses
import json
import shutil
import signal
import subprocess
import time
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from micro_run import BATCH, command, micro_config, ouro, write_config

import ouro_jax
from ouro_jax.cli.open_checkpoint import open_checkpoint
from ouro_jax.config import DataConfig, MeshConfig
from ouro_jax.data.interleave import Interleave
from ouro_jax.data.rows import read_manifest
from ouro_jax.data.tokenizer import load_tokenizer
from ouro_jax.errors import ConfigError
from ouro_jax.parallel.mesh import make_mesh
from ouro_jax.training import stage_trainer, trainer
from ouro_jax.training.checkpoints import StageCheckpoints, load_params, load_position
from ouro_jax.training.curriculum import StagePlan
from ouro_jax.training.run_log import read_log
from ouro_jax.training.state import StateFactory
from ouro_jax.training.timing import goodput, read_times, time_spent
from ouro_jax.training.transitions import upcycle

# The batch ramp of stable_1a: 4 steps of half a batch, then 14 whole ones.
FIRST_STEPS = 18
STAGE_STEPS = {"stable_1a": FIRST_STEPS, "stable_1b": FIRST_STEPS + 80, "gate": FIRST_STEPS + 88}
SKIPPED = ((300, 340),)
TIMES = {
    "time", "tokens_per_second", "tokens_per_second_per_device", "mfu", "seconds", "step_seconds",
    "hbm_bytes_in_use", "hbm_bytes_peak", "hbm_bytes_limit",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("trainer")


@pytest.fixture(scope="module")
def config(folder):
    """The micro run, its data made already and read as any prepared data.

    So little of it that sources run out; a span of stable_1b is skipped and its depths are drawn.
    """
    config = micro_config(folder / "data", data=DataConfig(str(folder / "data"), 30_000))
    root = trainer.prepare_data(config)
    stable_1b = dataclasses.replace(config.stages["stable_1b"], skip_rows=SKIPPED, min_loops=1)
    stages = {**config.stages, "stable_1b": stable_1b}
    return dataclasses.replace(config, data=DataConfig(root=str(root)), stages=stages)


@pytest.fixture(scope="module")
def config_file(config, folder):
    return write_config(folder / "micro.py", config)


@pytest.fixture(scope="module")
def compile_once(folder):
    """Compiled programs are kept in a folder of this module's, so that the first run has none."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(folder / "programs"))
        yield


def train_records(workdir: Path) -> list[dict]:
    """What was logged of training, less the times."""
    return [
        {key: value for key, value in record.items() if key not in TIMES}
        for record in read_log(workdir) if record["kind"] == "train"
    ]  # fmt: skip


@pytest.fixture(scope="module")
def killed(config_file, folder, compile_once):
    """The workdir of a run killed in the middle of its second stage, and how far it got."""
    workdir = folder / "killed"
    arguments = command("train", f"--config={config_file}", f"--workdir={workdir}")
    with (folder / "killed.log").open("w") as output:
        process = subprocess.Popen(**arguments, stdout=output, stderr=subprocess.STDOUT)
    while not (workdir / "metrics.jsonl").exists() or len(train_records(workdir)) < 50:
        assert process.poll() is None, (folder / "killed.log").read_text()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    return workdir, train_records(workdir)[-1]["step"]


@pytest.fixture(scope="module")
def finished(config_file, folder, compile_once):
    """The workdir of the same run, uninterrupted."""
    result = ouro("train", f"--config={config_file}", f"--workdir={folder}/finished")
    assert result.returncode == 0, result.stderr
    return folder / "finished"


def whole_state(workdir: Path, stage: str):
    position = load_position(workdir / stage)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    optimizer = micro_config(Path()).optimizer
    factory = StateFactory(position.model, optimizer, position.objective, mesh)
    with StageCheckpoints(workdir / stage, read_only=True) as checkpoints:
        return position, checkpoints.restore(factory.abstract(), position.step)


def assert_same_bits(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_a_killed_run_repeated_ends_bit_for_bit_as_an_uninterrupted_one(
    config_file, killed, finished, compile_once
):
    workdir, last_step = killed
    assert FIRST_STEPS < last_step < STAGE_STEPS["stable_1b"]
    saved = load_position(workdir)
    assert saved.stage == "stable_1b" and FIRST_STEPS < saved.step < STAGE_STEPS["stable_1b"]
    assert len(train_records(finished)) == STAGE_STEPS["gate"]

    result = ouro("train", f"--config={config_file}", f"--workdir={workdir}")
    assert result.returncode == 0, result.stderr
    assert f"stable_1a: finished at step {FIRST_STEPS}" in result.stdout
    resumed = [record for record in read_log(workdir) if record.get("event") == "resume"]
    assert [(record["stage"], record["step"]) for record in resumed] == [("stable_1b", saved.step)]
    for stage, step in STAGE_STEPS.items():
        position, state = whole_state(workdir, stage)
        expected_position, expected = whole_state(finished, stage)
        assert position == expected_position and position.step == step == state.step
        assert_same_bits(state, expected)
    assert train_records(workdir) == train_records(finished)
    heldout = [[{k: v for k, v in record.items() if k != "time"} for record in read_log(path)
                if record["kind"] == "heldout"] for path in (workdir, finished)]  # fmt: skip
    assert heldout[0] == heldout[1] and len(heldout[0]) == 9
    assert restarts(workdir) == restarts(finished)
    goodput_counts_the_lost_steps(read_times(workdir), saved.step, last_step)


def goodput_counts_the_lost_steps(lines: list[dict], saved: int, killed: int) -> None:
    begun = [line for line in lines if line["kind"] == "attempt"]
    assert [(line["stage"], line["step"]) for line in begun] == [
        ("stable_1a", 0), ("stable_1b", saved)
    ]  # fmt: skip
    first, second = lines[: lines.index(begun[1])], lines[lines.index(begun[1]) :]
    *_, last = (line for line in first if line["kind"] == "window")
    assert last["step"] >= killed
    for attempt, cached in ((first, [False] * 4), (second, [True] * 3)):
        compiled = [line["from_cache"] for line in attempt if line["kind"] == "compile"]
        assert compiled == cached
    spent = time_spent(lines)
    wall = sum(sum(parts.values()) for parts in spent.values())
    assert wall == pytest.approx(lines[-2]["time"] - lines[0]["time"], abs=0.1)
    # A record was logged at every step, so what was lost are whole windows.
    lost = [line["seconds"]["step"] for line in first if line.get("step", 0) > saved
            and line["kind"] == "window"]  # fmt: skip
    assert spent["stable_1b"]["repeated"] == pytest.approx(sum(lost)) and len(lost) > 0
    assert spent["stable_1b"]["stopped"] == begun[1]["time"] - last["time"] > 0
    kept = [line["seconds"]["step"] for line in (*first, *second) if line["kind"] == "window"]
    assert goodput(spent) == pytest.approx(100 * (sum(kept) - sum(lost)) / wall)


def test_a_finished_run_repeated_says_so_and_trains_nothing(config_file, finished):
    log = (finished / "metrics.jsonl").read_bytes()
    result = ouro("train", f"--config={config_file}", f"--workdir={finished}", "--json")
    assert result.returncode == 0, result.stderr
    for stage, step in STAGE_STEPS.items():
        assert f"{stage}: finished at step {step}." in result.stdout
    assert json.loads(result.stdout.splitlines()[-1]) == {
        "workdir": str(finished), "finished": True, "stage": "gate", "step": STAGE_STEPS["gate"],
        "tokens": 104 * BATCH,
    }  # fmt: skip
    assert (finished / "metrics.jsonl").read_bytes() == log


def test_the_log_follows_the_clock(finished):
    records = read_log(finished)
    events = [(r["event"], r["stage"], r["step"]) for r in records if r["kind"] == "event"
              and r["event"] != "source_restart"]  # fmt: skip
    expected = []
    for (stage, end), start in zip(STAGE_STEPS.items(), (0, *STAGE_STEPS.values()), strict=False):
        expected += [("stage_start", stage, start), ("stage_end", stage, end)]
    assert events == [*expected, ("finished", "gate", STAGE_STEPS["gate"])]
    training = [record for record in records if record["kind"] == "train"]
    assert [record["step"] for record in training] == list(range(1, STAGE_STEPS["gate"] + 1))
    sizes = [record["batch_tokens"] for record in training]
    assert sizes == [BATCH // 2] * 4 + [BATCH] * (STAGE_STEPS["gate"] - 4)
    assert [record["tokens"] for record in training] == np.cumsum(sizes).tolist()
    # Warm-up over four batches of tokens, reached after 4 half and 2 whole steps.
    rates = np.array([record["learning_rate"] for record in training[:7]])
    np.testing.assert_allclose(rates / rates[-1], np.array([1, 2, 3, 4, 6, 8, 8]) / 8, rtol=1e-6)
    assert training[-1]["loss_per_loop"][-1] < training[0]["loss_per_loop"][-1] - 0.5


def test_steps_run_the_loops_that_were_drawn(config, finished):
    ran = {name: [] for name in config.stages}
    for record in train_records(finished):
        assert len(record["exit_distribution"]) == len(record["loss_per_loop"])
        ran[record["stage"]].append(len(record["loss_per_loop"]))
    assert set(ran["stable_1a"]) == set(ran["gate"]) == {2}
    plan = StagePlan("stable_1b", config.stages["stable_1b"])
    assert ran["stable_1b"] == [plan.num_loops(row) for row in range(0, plan.total_rows, 8)]
    assert 20 < ran["stable_1b"].count(1) < 60


def restarts(workdir: Path) -> list[dict]:
    """The events of sources that started again, less the times."""
    return [
        {key: value for key, value in record.items() if key != "time"}
        for record in read_log(workdir) if record.get("event") == "source_restart"
    ]  # fmt: skip


def test_the_log_says_what_each_source_gave_and_where_it_started_again(config, finished):
    rows_of = {
        source: read_manifest(Path(config.data.root) / source / "train-64").rows
        for source in config.stages["gate"].mixture
    }
    # Every row of the run that is given or skipped, in order: (source, step it belongs to).
    drawn, expected, step = dict.fromkeys(rows_of, 0), [], 0
    for name, stage in config.stream():
        plan, whole = StagePlan(name, stage), Interleave(stage.mixture)
        start = 0
        given = dict.fromkeys(rows_of, 0)
        while batch := plan.batch_rows(start):
            step += 1
            for row in range(plan.order.passed(start), plan.order.passed(start + batch)):
                source, _ = whole.locate(row)
                drawn[source] += 1
                if not any(first <= row < stop for first, stop in stage.skip_rows):
                    given[source] += 1
                if drawn[source] % rows_of[source] == 1 and drawn[source] > 1:
                    epoch = drawn[source] // rows_of[source] + 1
                    expected.append((source, epoch, name, step))
            start += batch
            (record,) = (r for r in train_records(finished) if r["step"] == step)
            assert record["source_tokens"] == {name: 64 * rows for name, rows in given.items()}
        assert sum(given.values()) == plan.total_rows
    told = [(r["source"], r["epoch"], r["stage"], r["step"]) for r in restarts(finished)]
    assert sorted(told) == sorted(expected)
    assert ("code", 2, "stable_1b") in [place[:3] for place in told]


def starts(config, workdir, monkeypatch, *changed) -> list[tuple]:
    """(position, state) that each stage would train from, with `changed` keys of the config;
    nothing is trained."""
    begun = []

    class Recorder:
        def __init__(self, run, stage, checkpoints, state, position):
            begun.append((position, state))

        def run(self):
            pass

    monkeypatch.setattr(stage_trainer, "StageRun", Recorder)
    monkeypatch.setattr(trainer, "_finish", lambda run: {})
    trainer.train(config, workdir, changed)
    return begun


def only(config, name, init_from, **changes):
    """A run of one stage, on 2 × 2 × 2 devices; its rows follow those of the stages before."""
    stages = dict(config.earlier_stages(name))
    stages[name] = dataclasses.replace(config.stages[name], **changes)
    return dataclasses.replace(
        config, stages=stages, mesh=MeshConfig(fsdp=2, tensor=2), first_stage=name,
        init_from=str(init_from),
    )  # fmt: skip


# What `only` makes another of than the config was.
CHANGED = ("first_stage", "stages.stable_1b", "stages.gate")


def test_only_rows_that_lie_ahead_can_be_skipped_anew(config, finished, tmp_path, monkeypatch):
    shutil.copytree(finished / "stable_1b", tmp_path / "stable_1b")

    def longer(*spans):
        return only(
            config, "stable_1b", finished, tokens=90 * BATCH, skip_rows=spans, transition="none"
        )

    # 640 rows were given, 40 skipped: 680 are behind.
    spans = (*SKIPPED, (680, 690), (700, 710))
    ((position, _),) = starts(longer(*spans), tmp_path, monkeypatch, *CHANGED)
    assert (position.rows, position.skip_rows) == (640, spans)
    for changed in ((), ((300, 341),), (*SKIPPED, (679, 690))):
        with pytest.raises(ConfigError) as error:
            trainer.train(longer(*changed), tmp_path)
        text = str(error.value)
        assert "stages.stable_1b.skip_rows" in text and "before row 680" in text
        assert str(changed) in text and str(SKIPPED) in text


def test_a_fork_takes_parameters_and_moments_through_its_transition(
    config, finished, tmp_path, monkeypatch
):
    source = finished / "stable_1a"
    fork = only(config, "stable_1b", source, transition="upcycle_interleaved")
    ((position, state),) = starts(fork, tmp_path / "fork", monkeypatch)
    before, old = whole_state(finished, "stable_1a")
    assert (position.stage, position.step, position.rows) == ("stable_1b", FIRST_STEPS, 0)
    assert position.tokens_seen == before.tokens_seen == 16 * BATCH
    assert (position.model.num_layers, before.model.num_layers) == (2, 1)
    assert_same_bits(state.params, upcycle(old.params, 2, "upcycle_interleaved"))
    assert_same_bits(state.opt_state, upcycle(old.opt_state, 2, "upcycle_interleaved"))
    assert optax.tree.norm(optax.tree.get(state.opt_state, "mu")) > 0
    assert_same_bits((state.step, state.rng), (old.step, old.rng))

    anew = only(fork, "stable_1b", source, reset_optimizer=True)
    ((_, state),) = starts(anew, tmp_path / "anew", monkeypatch)
    assert_same_bits(state.params, upcycle(old.params, 2, "upcycle_interleaved"))
    assert not optax.tree.norm(optax.tree.get(state.opt_state, "mu"))
    assert optax.tree.get(state.opt_state, "count") == 0

    # A workdir means its last stage; after a gate stage there are no moments to take over.
    last = only(config, "stable_1b", finished, transition="none")
    ((position, state),) = starts(last, tmp_path / "last", monkeypatch)
    assert position.step == STAGE_STEPS["gate"]
    assert_same_bits(state.params, whole_state(finished, "gate")[1].params)
    assert optax.tree.get(state.opt_state, "count") == 0


def test_a_fork_trains_on_another_mesh(config, finished, tmp_path):
    fork = only(config, "stable_1b", finished / "stable_1a", tokens=4 * BATCH)
    summary = trainer.train(fork, tmp_path)
    assert (summary["step"], summary["tokens"]) == (FIRST_STEPS + 4, 20 * BATCH)
    # The uninterrupted run took the same first steps on one device.
    ours, theirs = train_records(tmp_path), train_records(finished)[FIRST_STEPS:][:4]
    np.testing.assert_allclose([r["loss"] for r in ours], [r["loss"] for r in theirs], rtol=1e-5)


@pytest.fixture(scope="module")
def exported(finished, folder):
    """The finished run as a folder in the Hugging Face format, by the verb."""
    result = ouro("convert", f"--from={finished}", f"--to={folder}/exported")
    assert result.returncode == 0, result.stderr
    return folder / "exported"


def test_what_was_trained_and_converted_generates_the_same(finished, exported):
    trained, converted = open_checkpoint(finished), open_checkpoint(exported)
    assert_same_bits(trained.params, converted.params)
    # How embeddings were initialised is no field of the format.
    trained_shape, converted_shape = (
        dataclasses.replace(one.config, embedding_initializer_range=1.0)
        for one in (trained, converted)
    )
    assert trained_shape == converted_shape
    tokenizer = load_tokenizer(converted.tokenizer_file)
    assert converted.tokenizer_file.read_bytes() == trained.tokenizer_file.read_bytes()
    prompts = [tokenizer.encode(text).ids for text in ("def main(", "The ")]
    answers = [
        ouro_jax.generate(checkpoint.config, checkpoint.params, prompts, max_new_tokens=12)
        for checkpoint in (trained, converted)
    ]
    assert answers[0].tokens == answers[1].tokens and answers[0].depths == answers[1].depths
    assert all(len(tokens) == 12 for tokens in answers[0].tokens)


def test_the_order_of_starts(config, finished, exported, tmp_path, monkeypatch):
    """Own checkpoint before the previous stage before `init_from` before nothing."""
    longer = only(config, "stable_1b", exported, tokens=90 * BATCH, transition="none")
    own = tmp_path / "own"
    shutil.copytree(finished / "stable_1b", own / "stable_1b")
    ((position, state),) = starts(longer, own, monkeypatch, *CHANGED)
    expected, saved = whole_state(finished, "stable_1b")
    assert position == expected and position.rows == 80 * 8
    assert_same_bits(state, saved)
    # What the run has left behind may be gone.
    gone = dataclasses.replace(longer, init_from=str(tmp_path / "gone"))
    assert starts(gone, own, monkeypatch, *CHANGED)[0][0] == expected

    previous = tmp_path / "previous"
    shutil.copytree(finished / "stable_1b", previous / "stable_1b")
    later = dataclasses.replace(config, first_stage="stable_1b", init_from=str(exported), stages={
        "stable_1b": dataclasses.replace(config.stages["stable_1b"], transition="none"),
        "gate": config.stages["gate"],
    })  # fmt: skip
    ((position, state),) = starts(
        later, previous, monkeypatch, "first_stage", "stages.stable_1a", "stages.stable_1b"
    )
    assert (position.stage, position.step) == ("gate", STAGE_STEPS["stable_1b"])
    assert_same_bits(state.params, saved.params)

    ((position, state),) = starts(longer, tmp_path / "released", monkeypatch)
    assert (position.step, position.tokens_seen, position.stage) == (0, 0, "stable_1b")
    assert_same_bits(state.params, load_params(finished)[1])
    assert optax.tree.get(state.opt_state, "count") == 0 and int(state.step) == 0

    fresh = dataclasses.replace(longer, init_from="")
    ((position, state),) = starts(fresh, tmp_path / "fresh", monkeypatch)
    assert (position.step, position.stage) == (0, "stable_1b")
    table = np.asarray(state.params["lm_head"]["kernel"])
    assert abs(table.std() - fresh.model.initializer_range) < 0.1 * fresh.model.initializer_range
    ((_, again),) = starts(fresh, tmp_path / "again", monkeypatch)
    assert_same_bits(again, state)
    ((_, other),) = starts(dataclasses.replace(fresh, seed=1), tmp_path / "other", monkeypatch)
    assert not np.array_equal(np.asarray(other.params["lm_head"]["kernel"]), table)
