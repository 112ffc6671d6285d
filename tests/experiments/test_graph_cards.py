"""The cards of Depo and Brevo: every run has a vocabulary and rows that hold its problems."""

import importlib.util
from pathlib import Path

import pytest

from ouro_jax.data.tasks.rows import make_task
from ouro_jax.experiments.experiment import PROTOCOLS
from ouro_jax.experiments.sweep import Sweep, plan_runs

CARDS = Path(__file__).parents[2] / "configs" / "experiments"


def load(name):
    spec = importlib.util.spec_from_file_location(f"card_{name}", CARDS / f"{name}.py")
    assert spec and spec.loader
    card = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(card)
    return card


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", ["depo", "brevo"])
def test_runs_fit_their_task(name, protocol):
    card = load(name)
    experiment = card.get_experiment(protocol)
    runs = plan_runs(Sweep(name, experiment.runs), card.get_config(protocol).to_dict())
    for run in runs:
        (stage,), task = run.config.stages.values(), make_task(run.config.data.task)
        assert stage.sequence_length >= task.longest(), run.name
        assert run.config.model.vocab_size == len(task.vocabulary), run.name
        # The paper's optimizer, whatever the scale.
        assert (stage.weight_decay, stage.objective) == (0.03, "last_loop")
        assert stage.final_learning_rate == pytest.approx(stage.learning_rate / 10)
    models = {(s.num_layers, s.num_loops) for run in runs for s in run.config.stages.values()}
    (layers, loops) = max(models, key=lambda model: model[1])
    assert models == {(layers, loops), (layers, 1), (layers * loops, 1)}


def test_the_papers_sizes_and_steps():
    seen = {}
    for name in ("depo", "brevo"):
        card = load(name)
        for run in plan_runs(
            Sweep(name, card.get_experiment("paper").runs), card.get_config("paper").to_dict()
        ):
            (stage,) = run.config.stages.values()
            key = name, run.config.data.task["max_nodes"]
            seen[key] = (stage.sequence_length, stage.tokens // stage.batch_tokens,
                         stage.warmup_tokens // stage.batch_tokens)  # fmt: skip
    assert seen == {
        ("depo", 225): (2048, 87_500, 1000), ("depo", 300): (2048, 100_000, 1000),
        ("depo", 375): (2048, 112_500, 1000), ("depo", 75): (2048, 100_000, 1000),
        ("depo", 100): (2048, 125_000, 1000), ("depo", 125): (2048, 150_000, 1000),
        ("brevo", 70): (1024, 100_000, 1000), ("brevo", 90): (1024, 125_000, 1000),
        ("brevo", 110): (1024, 150_000, 1000), ("brevo", 30): (1536, 200_000, 1000),
        ("brevo", 40): (1536, 225_000, 1000), ("brevo", 50): (1536, 250_000, 1000),
    }  # fmt: skip
