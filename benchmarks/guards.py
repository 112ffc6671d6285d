"""What the guards of training cost, as a share of the time of a step.

    python -m benchmarks.guards [--pairs=40] [--hidden_size=256]

Steps with and without the judgement (finite, spike, order, requests of the processes) are taken in
turn, and the ratio of each pair is counted, so that other work on the machine counts for both. What
the host does for the guards in every step (watchdog, requests, looking after saves) is timed by
itself, as is the check of a state before it is saved, at the default policy of a save every 15
minutes. A step computed twice costs a step and two checks, every `guard.repeat_every_steps`.
"""

import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks.measure import seconds, shown
from ouro_jax.config import DeadlineConfig, MeshConfig, ModelConfig, OptimizerConfig
from ouro_jax.data.batch import Batch
from ouro_jax.parallel.mesh import make_mesh, use_mesh
from ouro_jax.settings import CheckpointConfig
from ouro_jax.training import step as step_module
from ouro_jax.training.guard import Verdict
from ouro_jax.training.requests import Requests
from ouro_jax.training.state import StateFactory
from ouro_jax.training.state_checks import disagreeing, not_finite, state_sums
from ouro_jax.training.step import StepInputs, StepSpec, compiled_train_step
from ouro_jax.training.watchdog import Watchdog

LENGTH, ROWS = 256, 8

_PAIRS = flags.DEFINE_integer("pairs", 40, "Steps of each kind.", 3)
_HIDDEN = flags.DEFINE_integer("hidden_size", 256, "Of the model: four layers, four loops.", 64)


def main(_: Sequence[str]) -> None:
    """Prints the shares, and the same as one JSON line last."""
    hidden = _HIDDEN.value
    model = ModelConfig(4096, hidden, 3 * hidden, 4, hidden // 32, hidden // 32, 32,
                        dtype="float32")  # fmt: skip
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    spec = StepSpec(model, OptimizerConfig(), "expected", "uniform", "layer", "once", mesh)
    factory = StateFactory(model, OptimizerConfig(), "expected", mesh)
    tokens = np.random.default_rng(0).integers(0, 4096, (1, ROWS, LENGTH + 1)).astype(np.int32)
    ones = np.ones((1, ROWS, LENGTH), np.int32)
    places = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), ones.shape)
    batch = Batch(tokens[..., :-1], tokens[..., 1:], ones, places, ones.astype(bool))
    with use_mesh(mesh), Watchdog(DeadlineConfig(), Path("stacks.txt")) as watchdog:
        requests = Requests(watchdog, mesh, CheckpointConfig().every_minutes)
        plain, guarded, ratio = paired(spec, factory, batch, requests)
        host = host_seconds(watchdog, requests)
        state = factory.init(0)
        check = min(seconds_of_check(state, mesh) for _ in range(5))
    report = {
        "step_seconds": plain, "guarded_step_seconds": guarded,
        "judgement_percent": 100 * (ratio - 1), "host_percent": 100 * host / plain,
        "check_percent": 100 * check / (60 * CheckpointConfig().every_minutes),
        "state_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(state)),
    }  # fmt: skip
    shares = ("judgement_percent", "host_percent", "check_percent")
    report["all_percent"] = sum(report[share] for share in shares)
    for name, value in report.items():
        print(f"{name:24s} {shown(value)}")
    print(json.dumps(report))


def bare_step(spec: StepSpec, state: Any, batch: Batch, inputs: StepInputs) -> Any:
    """The step compiled without the judgement, which is taken out while it is traced."""

    def accept(guard: Any, *_: Any) -> Any:
        return Verdict(jnp.bool_(True), jnp.float32(0), jnp.float32(0)), guard

    judge, step_module.judge = step_module.judge, accept
    try:
        return compiled_train_step.__wrapped__(spec).lower(state, batch, inputs).compile()
    finally:
        step_module.judge = judge


def paired(
    spec: StepSpec, factory: StateFactory, batch: Batch, requests: Requests
) -> tuple[float, float, float]:
    """Median seconds of a step without and with the judgement, and the median of their ratios."""
    numbers = jax.device_put(tuple(map(np.float32, (3e-4, 0.1, 0.05, 1e4, np.inf))))
    plain_inputs = StepInputs(*numbers)
    states = [factory.init(0), factory.init(0)]

    bare = bare_step(spec, states[0], batch, plain_inputs)
    guarded = compiled_train_step(spec)
    times: list[list[float]] = [[], []]
    for number in range(_PAIRS.value + 2):
        inputs = plain_inputs._replace(step=jnp.int32(number), requests=requests.ask(number))

        def take(kind: int, step: Any, inputs: StepInputs) -> Any:
            states[kind], metrics = step(states[kind], batch, inputs)
            return metrics

        pair = [
            (0, seconds(take, 0, bare, plain_inputs)), (1, seconds(take, 1, guarded, inputs))
        ] if number % 2 else [
            (1, seconds(take, 1, guarded, inputs)), (0, seconds(take, 0, bare, plain_inputs))
        ]  # fmt: skip
        if number >= 2:  # the first ones compile
            for kind, duration in pair:
                times[kind].append(duration)
    ratios = [guarded / plain for plain, guarded in zip(*times, strict=True)]
    without, judged = map(statistics.median, times)
    return without, judged, statistics.median(ratios)


def host_seconds(watchdog: Watchdog, requests: Requests) -> float:
    """What the guards' part of the loop takes in a step."""
    began, rounds = time.perf_counter(), 2000
    for number in range(rounds):
        for phase in ("data", "step", "data", "step"):
            watchdog.enter(phase)
        requests.ask(number)
        requests.heard(0)
    return (time.perf_counter() - began) / rounds


def seconds_of_check(state: Any, mesh: Any) -> float:
    """Of the check of a state before it is saved."""
    began = time.perf_counter()
    sums = state_sums(state, mesh)
    assert not disagreeing(state, sums, mesh) and not not_finite(state, sums)
    return time.perf_counter() - began


if __name__ == "__main__":
    app.run(main)
