"""Faults planted into real runs: what is refused, skipped and gone back over leaves no trace.

Each run is compared bit for bit with one whose config skips the same rows from the start.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from micro_run import BATCH, micro_config

from ouro_jax.config import Config, ConfigError, DataConfig, GuardConfig, MeshConfig
from ouro_jax.data.interleave import Interleave
from ouro_jax.errors import RunError
from ouro_jax.training import stage_run, trainer
from ouro_jax.training import step as step_module
from ouro_jax.training.checkpoints import StageCheckpoints, load_position
from ouro_jax.training.curriculum import StagePlan
from ouro_jax.training.events import read_events
from ouro_jax.training.recovery import Patience, Refused, merged, skipping, span_of
from ouro_jax.training.run_log import read_log
from ouro_jax.training.stage_rows import open_stage_mixture
from ouro_jax.training.state import StateFactory
from ouro_jax.training.step import StepInputs, compiled_train_step

STAGES = ("stable_1b", "gate")
ROWS = 8


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Config:
    """40 steps of 8 rows, a checkpoint every 8 steps, then 8 steps of the gate; two replicas."""
    root = tmp_path_factory.mktemp("recovery") / "data"
    whole = micro_config(root)
    stages = {
        "stable_1b": dataclasses.replace(
            whole.stages["stable_1b"], tokens=40 * BATCH, transition="none", warmup_tokens=4 * BATCH
        ),
        "gate": whole.stages["gate"],
    }
    prepared = trainer.prepare_data(whole)
    return dataclasses.replace(
        whole, stages=stages, data=DataConfig(root=str(prepared)),
        mesh=MeshConfig(data=2, fsdp=2, tensor=2),
    )  # fmt: skip


def with_skips(config: Config, *spans: tuple[int, int]) -> Config:
    return skipping(config, "stable_1b", spans)


def state_of(config: Config, workdir, stage: str):
    position = load_position(workdir / stage)
    mesh = step_mesh(config)
    factory = StateFactory(position.model, config.optimizer, position.objective, mesh)
    with StageCheckpoints(workdir / stage, read_only=True) as checkpoints:
        return position, checkpoints.restore(factory.abstract(), position.step)


def step_mesh(config: Config):
    return trainer.make_mesh(config.mesh)


def assert_same_run(config: Config, ours, theirs) -> None:
    """States at the end of both stages and the log of training, bit for bit."""
    for stage in STAGES:
        (position, state), (expected, other) = (
            state_of(config, workdir, stage) for workdir in (ours, theirs)
        )
        assert position == expected
        for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(other), strict=True):
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    losses = [
        [(r["step"], r["loss"], r["grad_norm"], r["learning_rate"]) for r in read_log(workdir)
         if r["kind"] == "train"] for workdir in (ours, theirs)
    ]  # fmt: skip
    assert losses[0] == losses[1] and len(losses[0]) == 48


@pytest.fixture(scope="module")
def clean(config, tmp_path_factory):
    """Runs the config with some rows skipped, once for each choice, and returns the workdir."""
    folder, done = tmp_path_factory.mktemp("clean"), {}

    def run(*spans):
        if spans not in done:
            done[spans] = folder / str(len(done))
            trainer.train(with_skips(config, *spans), done[spans])
        return done[spans]

    return run


class Faults:
    """Stands between the loop and the compiled step. `before(state, batch, inputs, call)` may
    change what the step gets; `call` counts the calls of stable_1b from 0."""

    def __init__(self, monkeypatch, before):
        self.calls, self._before = 0, before
        monkeypatch.setattr(stage_run, "compiled_train_step", self._wrap)

    def _wrap(self, spec):
        step = compiled_train_step(spec)

        def faulty(state, batch, inputs):
            if spec.objective == "expected":
                state, batch, inputs = self._before(state, batch, inputs, self.calls)
                self.calls += 1
            return step(state, batch, inputs)

        return faulty


def rows_of(config: Config, *numbers: int) -> list[bytes]:
    """The tokens of these rows of stable_1b, numbered before skipping."""
    plan = StagePlan("stable_1b", config.stages["stable_1b"])
    mixture = open_stage_mixture(config, trainer.epath.Path(config.data.root), plan)
    return [mixture.read(number, 1).tokens_BL.tobytes() for number in numbers]


def replaced(inputs: StepInputs, field: str, value: float) -> StepInputs:
    """The inputs with another number, placed as it was: anything else would compile anew."""
    return inputs._replace(**{field: jax.device_put(np.float32(value))})


def poison_rows(poisoned: list[bytes], field: str, value: float):
    """A batch with one of these rows has another number among its inputs."""

    def before(state, batch, inputs, call):
        tokens = np.asarray(batch.tokens_BL).reshape(-1, batch.tokens_BL.shape[-1])
        if {row.tobytes() for row in tokens} & set(poisoned):
            inputs = replaced(inputs, field, value)
        return state, batch, inputs

    return before


def happenings(workdir) -> list[dict[str, Any]]:
    return [event for event in read_events(workdir) if event["kind"] in ("skip", "rollback")]


def test_a_batch_that_is_not_finite_is_skipped_without_a_trace(
    config, clean, tmp_path, monkeypatch, capsys
):
    # Rows 83 and 160: the 11th step, and the 21st less what was skipped before.
    before = poison_rows(rows_of(config, 83, 160), "entropy_weight", np.nan)
    faults = Faults(monkeypatch, before)
    trainer.train(config, tmp_path)
    # The refused steps, and those that had been sent off after them.
    assert faults.calls == 40 + 4
    first, second = happenings(tmp_path)
    assert (first["step"], first["skip_rows"]) == (10, [[80, 88]])
    assert (second["step"], second["skip_rows"]) == (19, [[160, 168]])
    assert first["reason"] == "loss nan, gradient norm nan" and "step 11 was not taken" in (
        capsys.readouterr().out
    )
    order = Interleave(config.stages["stable_1b"].mixture)
    assert {name: stop - start for name, (start, stop) in first["rows"].items()} == {
        name: order.drawn(88)[name] - order.drawn(80)[name] for name in order.drawn(1)
    }
    assert_same_run(config, tmp_path, clean((80, 88), (160, 168)))


def test_a_fault_of_the_machine_is_skipped_again_by_a_later_attempt(
    config, clean, tmp_path, monkeypatch
):
    """Once a device gave NaN; the run is stopped before the next checkpoint, and the fault gone."""

    class Killed(Exception):
        pass

    def before(state, batch, inputs, call):
        if call == 20:
            inputs = replaced(inputs, "entropy_weight", np.nan)
        if call == 23:
            raise Killed
        return state, batch, inputs

    with monkeypatch.context() as patch, pytest.raises(Killed):
        Faults(patch, before)
        trainer.train(config, tmp_path)
    assert load_position(tmp_path).step == 16
    assert [event["skip_rows"] for event in happenings(tmp_path)] == [[[160, 168]]]
    trainer.train(config, tmp_path)
    assert len(happenings(tmp_path)) == 1
    assert_same_run(config, tmp_path, clean((160, 168)))


def test_one_device_whose_gradient_is_not_finite_is_enough(config, clean, tmp_path, monkeypatch):
    """Of the rows that one device works on by itself, under `gather = once`."""
    summed = step_module._summed
    (poisoned,) = rows_of(config, 42)
    first_tokens = np.frombuffer(poisoned, np.int32)[:16]

    def faulty(spec, params, batch, inputs):
        gradients, sums = summed(spec, params, batch, inputs)
        here = jnp.any(jnp.all(batch.tokens_BL[..., :16] == first_tokens, axis=-1))
        kernel = gradients["lm_head"]["kernel"]
        gradients["lm_head"]["kernel"] = kernel.at[0, 0].add(jnp.where(here, jnp.nan, 0.0))
        return gradients, sums

    once = dataclasses.replace(config, layout=dataclasses.replace(config.layout, gather="once"))
    expected = tmp_path / "clean"
    monkeypatch.setattr(step_module, "_summed", lambda spec, *rest: (
        faulty if spec.objective == "expected" else summed
    )(spec, *rest))  # fmt: skip
    step_module.compiled_train_step.cache_clear()
    try:
        # By the same program, as another one rounds otherwise; it never meets the row.
        trainer.train(with_skips(once, (40, 48)), expected)
        trainer.train(once, tmp_path / "faulty")
    finally:
        step_module.compiled_train_step.cache_clear()
    (event,) = happenings(tmp_path / "faulty")
    assert event["skip_rows"] == [[40, 48]] and event["grad_norm"] is None
    assert np.isfinite(event["loss"])
    assert_same_run(once, tmp_path / "faulty", expected)


def test_a_planted_spike_is_skipped_by_policy(config, clean, tmp_path, monkeypatch):
    guarded = dataclasses.replace(config, guard=GuardConfig(spike_deviations=12.0))
    # After 32 steps a spike is one: the loss of this batch is 5 nats higher.
    before = poison_rows(rows_of(config, 35 * ROWS), "entropy_weight", -10.0)
    Faults(monkeypatch, before)
    trainer.train(guarded, tmp_path / "guarded")
    (event,) = happenings(tmp_path / "guarded")
    assert event["skip_rows"] == [[280, 288]] and event["reason"].startswith("a spike: loss ")
    assert_same_run(config, tmp_path / "guarded", clean((280, 288)))
    trainer.train(config, tmp_path / "unguarded")
    assert not happenings(tmp_path / "unguarded")


def spoiled(tree: Any, value: float, device: int | None = None) -> Any:
    """The tree with another number in the head, on all devices or as one of them holds it."""
    head = tree["lm_head"]["kernel"]
    shards = []
    for shard in head.addressable_shards:
        data = np.array(shard.data)
        if device is None or shard.device.id == device:
            data[0, 0] = value
        shards.append(jax.device_put(data, shard.device))
    kernel = jax.make_array_from_single_device_arrays(head.shape, head.sharding, shards)
    return tree | {"lm_head": {"kernel": kernel}}


def test_a_parameter_that_is_not_finite_sends_the_run_back(config, clean, tmp_path, monkeypatch):
    def before(state, batch, inputs, call):
        if call == 20:
            state = state.replace(params=spoiled(state.params, np.nan))
        return state, batch, inputs

    Faults(monkeypatch, before)
    trainer.train(config, tmp_path)
    *skips, back = happenings(tmp_path)
    assert [event["skip_rows"] for event in skips] == [[[160, 168]], [[168, 176]], [[176, 184]]]
    assert back["kind"] == "rollback" and (back["step"], back["to_step"]) == (20, 16)
    assert back["skip_rows"] == [[128, 160]] and "3 steps in a row were not taken" in back["reason"]
    assert_same_run(config, tmp_path, clean((128, 184)))


def test_a_replica_that_differs_is_not_saved_and_the_run_goes_back(
    config, clean, tmp_path, monkeypatch
):
    """One bit of one device's copy, at step 20; found before the save of step 24. No row is to
    blame, so none is skipped."""

    def before(state, batch, inputs, call):
        if call == 20:
            head = state.params["lm_head"]["kernel"]
            value = np.nextafter(np.asarray(head.addressable_shards[5].data)[0, 0], np.inf)
            state = state.replace(params=spoiled(state.params, value, device=5))
        return state, batch, inputs

    Faults(monkeypatch, before)
    trainer.train(config, tmp_path)
    (back,) = happenings(tmp_path)
    assert (back["step"], back["to_step"], back["skip_rows"]) == (24, 16, [])
    assert back["reason"].startswith("replicas differ: params/lm_head/kernel on device ")
    assert_same_run(config, tmp_path, clean())


def test_a_step_that_comes_out_otherwise_the_second_time_sends_the_run_back(
    config, clean, tmp_path, monkeypatch
):
    """Steps 5, 10, … are computed twice. Once, one of them starts from a parameter that is off."""
    guarded = dataclasses.replace(config, guard=GuardConfig(repeat_every_steps=5))

    def before(state, batch, inputs, call):
        if call == 22:  # after 19 steps, three of them twice: the first time of the 20th
            state = state.replace(params=spoiled(state.params, 0.1234, device=3))
        return state, batch, inputs

    faults = Faults(monkeypatch, before)
    trainer.train(guarded, tmp_path)
    (back,) = happenings(tmp_path)
    assert (back["step"], back["to_step"], back["skip_rows"]) == (19, 16, [])
    assert back["reason"].startswith("step 20 computed twice differs in ")
    # 40 steps, 8 of them twice, and the three of 17 … 19 and the first 20th anew.
    assert faults.calls == 40 + 8 + 3 + 2
    assert_same_run(config, tmp_path, clean())


def test_a_fault_that_stays_ends_the_run(config, tmp_path, monkeypatch):
    guarded = dataclasses.replace(config, guard=GuardConfig(patience=2, rollbacks=1))

    def before(state, batch, inputs, call):
        if inputs.step >= 18:
            inputs = replaced(inputs, "entropy_weight", np.nan)
        return state, batch, inputs

    Faults(monkeypatch, before)
    with pytest.raises(ConfigError) as error:
        trainer.train(guarded, tmp_path)
    text = str(error.value)
    assert "has gone back to step 16 1 times (guard.rollbacks)" in text
    assert "stages.stable_1b.learning_rate" in text
    stop = read_events(tmp_path)[-1]
    assert (stop["kind"], stop["code"]) == ("stop", 2) and "guard.rollbacks" in stop["reason"]


def refused(step: int) -> Refused:
    position = dataclasses.make_dataclass("Where", ["step"])(step)
    return Refused("", None, position, 0, {})  # type: ignore[reportArgumentType]


def test_patience_by_hand():
    patience = Patience(GuardConfig(patience=2, rollbacks=2), "stable_1a")
    assert [patience.is_over(refused(step)) for step in (5, 6, 6)] == [False, False, True]
    patience.go_back(4, "why", by_machine=True)
    assert [patience.is_over(refused(step)) for step in (6, 6)] == [False, True]
    patience.go_back(4, "why", by_machine=True)
    patience.go_back(8, "why", by_machine=False)  # it had come further
    patience.go_back(8, "why", by_machine=False)
    with pytest.raises(RunError, match="why. The run has gone back to step 8 2 times"):
        patience.go_back(8, "why", by_machine=True)


def test_spans_by_hand():
    order = Interleave({"a": 1.0}, ((4, 8),))
    assert span_of(order, 2, 4) == (2, 4) and span_of(order, 4, 6) == (8, 10)
    assert span_of(order, 2, 6) == (2, 10)
    assert merged(((8, 10), (1, 2), (2, 4), (9, 12))) == ((1, 4), (8, 12))
