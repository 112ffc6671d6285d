"""Going on with another config: what is refused, what is free, and what is allowed by name."""

import dataclasses
import json
import runpy
from pathlib import Path

import pytest

from ouro_jax.config import Config, from_config_dict, to_dict
from ouro_jax.errors import ConfigError
from ouro_jax.training.drift import FREE, check_drift, differences

TINY = Path(__file__).parents[2] / "configs" / "tiny.py"
CONFIG = from_config_dict(runpy.run_path(str(TINY))["get_config"]())


def saved(config: Config):
    """As a checkpoint holds it: tuples have become lists."""
    return json.loads(json.dumps(to_dict(config)))


def changed(**stage) -> Config:
    stages = CONFIG.stages | {"anneal": dataclasses.replace(CONFIG.stages["anneal"], **stage)}
    return dataclasses.replace(CONFIG, stages=stages)


def check(config: Config, *allowed: str):
    return check_drift(saved(CONFIG), saved(config), allowed, "run/anneal/40")


def test_the_same_config_has_not_changed():
    assert check(CONFIG) == {}


def test_a_change_is_shown_with_both_values_and_the_flag_that_allows_it():
    config = dataclasses.replace(changed(learning_rate=0.5, tokens=640), seed=7)
    with pytest.raises(ConfigError) as error:
        check(config)
    text = str(error.value)
    anneal = CONFIG.stages["anneal"]
    assert f"stages.anneal.learning_rate: {anneal.learning_rate} → 0.5" in text
    assert f"stages.anneal.tokens: {anneal.tokens} → 640" in text and "seed: 0 → 7" in text
    flag = text.split("--allow_config_change=")[1]
    assert check(config, *flag.split(",")).keys() == {
        "seed", "stages.anneal.tokens", "stages.anneal.learning_rate"
    }  # fmt: skip
    # A name covers what lies under it, and nothing beside it.
    assert check(config, "seed", "stages.anneal")["seed"] == (0, 7)
    with pytest.raises(ConfigError, match="seed: 0 → 7"):
        check(config, "stages.anneal")
    with pytest.raises(ConfigError, match=r"stages\.anneal\.tokens"):
        check(config, "seed", "stages.anneal.learning_rate")
    with pytest.raises(ConfigError, match=r"stages\.ann: no such key.*'stages\.anneal'"):
        check(config, "seed", "stages.ann")


def test_a_name_that_is_no_key_is_refused_with_the_nearest():
    with pytest.raises(ConfigError) as error:
        check(changed(tokens=640), "stages.anneal.token")
    assert "--allow_config_change=stages.anneal.token: no such key" in str(error.value)
    assert "'stages.anneal.tokens'" in str(error.value)


def test_a_key_that_has_not_changed_may_be_allowed():
    """A launcher repeats the command after the change is in a checkpoint."""
    assert check(CONFIG, "seed", "stages.anneal") == {}


def test_what_is_free_needs_no_word():
    config = dataclasses.replace(
        changed(skip_rows=((1, 2),)), name="other",
        mesh=dataclasses.replace(CONFIG.mesh, fsdp=4),
        checkpoint=dataclasses.replace(CONFIG.checkpoint, keep=9),
        deadlines=dataclasses.replace(CONFIG.deadlines, step=9.0),
        guard=dataclasses.replace(CONFIG.guard, patience=9),
    )  # fmt: skip
    assert check(config).keys() == {
        "name", "mesh.fsdp", "checkpoint.keep", "deadlines.step", "guard.patience",
        "stages.anneal.skip_rows",
    }  # fmt: skip
    with pytest.raises(ConfigError, match=r"guard\.spike_deviations: 0\.0 → 6\.0"):
        check(dataclasses.replace(
            CONFIG, guard=dataclasses.replace(CONFIG.guard, spike_deviations=6.0)
        ))  # fmt: skip


def test_every_free_key_is_a_key():
    for name in FREE:
        tree = to_dict(CONFIG)
        for part in name.split("."):
            part = next(iter(tree)) if part == "*" else part
            assert part in tree, name
            tree = tree[part]


def test_stages_that_come_or_go_are_changes():
    fewer = dataclasses.replace(
        CONFIG, stages={k: v for k, v in CONFIG.stages.items() if k != "gate"}
    )
    with pytest.raises(ConfigError, match=r"stages\.gate: \{'tokens'.*… → None"):
        check(fewer)
    assert dict(differences({"a": 1}, {"a": 1, "b": {"c": 2}})) == {"b": (None, {"c": 2})}
