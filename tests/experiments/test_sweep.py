"""The words that make a sweep, and what is refused before anything runs."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from micro_run import micro_config

from ouro_jax.config import from_config_dict, to_config_dict, to_dict
from ouro_jax.errors import ConfigError
from ouro_jax.experiments.sweep import Sweep, chain, one_of, plan_runs, product, zipped

BASE = to_dict(micro_config("data"))
RATE = "stages.stable_1a.learning_rate"


def planned(*runs):
    return plan_runs(Sweep("base.py", runs), BASE)


def test_the_words():
    a, b = one_of("a", [1, 2]), one_of("b", [3, 4])
    assert a == [{"a": 1}, {"a": 2}]
    assert product(a, b) == [{"a": x, "b": y} for x, y in ((1, 3), (1, 4), (2, 3), (2, 4))]
    assert zipped(a, b) == [{"a": 1, "b": 3}, {"a": 2, "b": 4}]
    assert chain(a, [{"c": 5}], b) == [*a, {"c": 5}, *b]
    assert product(zipped(a, b), one_of("c", [5])) == [
        {"a": 1, "b": 3, "c": 5}, {"a": 2, "b": 4, "c": 5},
    ]  # fmt: skip


@given(st.lists(st.integers(0, 4), max_size=4))
def test_a_product_holds_every_combination_once(sizes):
    parts = [one_of(str(place), range(size)) for place, size in enumerate(sizes)]
    expected = 1
    for size in sizes:
        expected *= size
    runs = product(*parts)
    assert len({tuple(run.items()) for run in runs}) == len(runs) == expected


def test_words_that_do_not_fit_together():
    with pytest.raises(ConfigError, match=r"zipped: the parts have \[2, 3\] runs"):
        zipped(one_of("a", [1, 2]), one_of("b", [1, 2, 3]))
    with pytest.raises(ConfigError, match="sets 'a' twice in one run"):
        product(one_of("a", [1]), [{"b": 1, "a": 2}])


def test_runs_are_named_by_what_they_override():
    names = [run.name for run in planned({RATE: 1e-3, "layout.remat": "none"}, {"seed": 4}, {})]
    assert names == ["learning_rate=0.001,remat=none", "seed=4", "base"]
    both = planned({RATE: 2.0, "stages.gate.learning_rate": 1}, {"data.root": "gs://x/y z"})
    assert both[0].name == f"{RATE}=2,stages.gate.learning_rate=1"
    assert both[1].name == "root=gs-x-y-z"


def test_overrides_reach_the_config_and_the_command_line():
    (run,) = planned({"stages.*.learning_rate": 0.5, "stages.stable_1a.batch_ramp": ((512, 256),)})
    rates = {name: stage.learning_rate for name, stage in run.config.stages.items()}
    assert rates == dict.fromkeys(("stable_1a", "stable_1b", "gate"), 0.5)
    assert run.config.stages["stable_1a"].batch_ramp == ((512, 256),)
    assert run.labels == {"learning_rate": 0.5, "batch_ramp": ((512, 256),)}
    assert run.flags() == [
        "--config.stages.stable_1a.learning_rate=0.5",
        "--config.stages.stable_1b.learning_rate=0.5",
        "--config.stages.gate.learning_rate=0.5",
        "--config.stages.stable_1a.batch_ramp=((512, 256),)",
    ]
    assert from_config_dict(BASE) == from_config_dict(to_config_dict(from_config_dict(BASE)))
    assert from_config_dict(BASE).stages["gate"].learning_rate != 0.5, "the base was changed"


@pytest.mark.parametrize(
    ("runs", "words"),
    [
        ([], "the sweep has no runs"),
        ([{"seed": 1}, {"seed": 2}, {"seed": 1}], "2 runs of the sweep are the same: seed=1"),
        ([{"seed": 1}, {"stages.stable_1a.learning_rat": 1.0}],
         "run learning_rat=1: Unknown config key 'stages.stable_1a.learning_rat'. "
         "Did you mean 'learning_rate'?"),
        ([{"stages.stabel_1a.tokens": 1}], "'stages.stabel_1a'. Did you mean 'stable_1a'?"),
        ([{"model": 3}], "model: expected one of vocab_size, hidden_size"),
        ([{"seed.value": 3}], "seed.value: expected no key below it after seed"),
        ([{RATE: -1.0}], "run learning_rate=-1: stages.stable_1a.learning_rate = -1.0: expected"),
        ([{"seed": 1.5}], "run seed=1.5: seed = 1.5: expected int"),
    ],
)  # fmt: skip
def test_a_wrong_sweep_is_refused(runs, words):
    with pytest.raises(ConfigError) as error:
        planned(*runs)
    assert words in str(error.value)
