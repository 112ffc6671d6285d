"""Checkpoints: bit for bit onto any mesh, shapes checked by name, the right stage found."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ouro_jax.config import MeshConfig, ModelConfig, OptimizerConfig
from ouro_jax.errors import ConfigError
from ouro_jax.parallel.mesh import make_mesh
from ouro_jax.training.checkpoints import (
    Position,
    StageCheckpoints,
    latest_stage,
    load_params,
    load_position,
    save_params,
)
from ouro_jax.training.state import StateFactory

MODEL = ModelConfig(64, 32, 48, 2, 4, 2, 8, dtype="float32")
POSITION = Position("stable_1b", 120, 960, 5 * 10**12, MODEL, "expected", 3, ((5, 9), (20, 21)))


def factory(mesh=None, devices=8, **changes) -> StateFactory:
    mesh = make_mesh(mesh or MeshConfig(), jax.devices()[:devices])
    return StateFactory(dataclasses.replace(MODEL, **changes), OptimizerConfig(), "expected", mesh)


def assert_same_bits(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.fixture(scope="module")
def state():
    """A state on 2 × 2 × 2 devices with moments that are not zero."""
    made = factory(MeshConfig(data=2, fsdp=2, tensor=2)).init(0)
    moments = jax.tree.map(lambda leaf: leaf + 0.125 if leaf.ndim else leaf, made.opt_state)
    return made.replace(opt_state=moments, step=made.step + 120)


@pytest.fixture(scope="module")
def stage(state, tmp_path_factory):
    """The folder of a stage with two checkpoints, the newest at step 120."""
    folder = tmp_path_factory.mktemp("run") / "stable_1b"
    with StageCheckpoints(folder, keep=2) as checkpoints:
        early = dataclasses.replace(POSITION, step=20, rows=160)
        for position in (dataclasses.replace(POSITION, step=10), early, POSITION):
            checkpoints.save(state, position, {"name": "test"}, permanent=False)
            checkpoints.wait()
    return folder


@pytest.mark.parametrize(
    ("mesh", "devices"), [(MeshConfig(), 1), (MeshConfig(fsdp=4, tensor=2), 8)]
)
def test_a_state_comes_back_bit_for_bit_on_another_mesh(stage, state, mesh, devices):
    target = factory(mesh, devices).abstract()
    assert load_position(stage) == POSITION
    with StageCheckpoints(stage, read_only=True) as checkpoints:
        restored = checkpoints.restore(target, 120)
    assert_same_bits(restored, state)
    for leaf, wanted in zip(jax.tree.leaves(restored), jax.tree.leaves(target), strict=True):
        assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)


def test_only_the_newest_stay(stage):
    assert sorted(entry.name for entry in stage.iterdir() if entry.is_dir()) == ["120", "20"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": 64}, ["embed_tokens/embedding", "(64, 32)", "(64, 64)"]),
        ({"num_layers": 4}, ["stack/layers/", "(2, 32)", "(4, 32)", "stages.*.num_layers"]),
    ],
)
def test_a_wrong_shape_names_the_parameter_and_both_shapes(stage, changes, words):
    target = factory(**changes).abstract()
    with (
        StageCheckpoints(stage, read_only=True) as checkpoints,
        pytest.raises(ConfigError) as error,
    ):
        checkpoints.restore(target, 120)
    text = str(error.value)
    assert all(word in text for word in [str(stage / "120"), *words]), text
    assert len(text) < 600


def test_parameters_alone_keep_their_dtypes(tmp_path, stage, state):
    position, params = load_params(stage.parent)
    assert position == POSITION and position.tokens_seen == 5 * 10**12
    assert_same_bits(params, state.params)
    halved = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), jnp.bfloat16), params)
    halved["stack"]["norm"]["scale"] = params["stack"]["norm"]["scale"]
    save_params(tmp_path / "anneal", halved, MODEL)
    position, loaded = load_params(tmp_path)
    assert (position.stage, position.step, position.model) == ("anneal", 0, MODEL)
    assert_same_bits(loaded, halved)
    with StageCheckpoints(tmp_path / "anneal", read_only=True) as checkpoints:
        assert not checkpoints.has_optimizer(0)
    with StageCheckpoints(stage, read_only=True) as checkpoints:
        assert checkpoints.has_optimizer(120)


def make_checkpoint(folder):
    (folder / "7" / "meta").mkdir(parents=True)
    (folder / "7" / "SHA256SUMS").touch()
    return folder


def test_the_last_stage_begun_is_meant(tmp_path):
    for name in ("stable_1b", "stable_1a", "long_context"):
        make_checkpoint(tmp_path / name)
    (tmp_path / "sft").mkdir()  # begun, nothing saved
    (tmp_path / "mid_training" / "3.orbax-checkpoint-tmp-1").mkdir(parents=True)
    (tmp_path / "gate" / "9").mkdir(parents=True)  # killed before the checksums were there
    assert latest_stage(tmp_path) == tmp_path / "long_context"
    assert latest_stage(str(tmp_path / "stable_1a")) == tmp_path / "stable_1a"
    with pytest.raises(ConfigError, match="no checkpoint here; expected a workdir"):
        latest_stage(tmp_path / "sft")
    with pytest.raises(ConfigError, match="no such folder"):
        latest_stage(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "content",
    [
        None,
        "{",
        "{}",
        '{"model": {"vocab": 3}}',
        "[]",
        '{"schema_version": 1}',
        '{"schema_version": 3}',
    ],
)
def test_an_unreadable_position_names_its_file(tmp_path, content):
    file = make_checkpoint(tmp_path / "anneal") / "7" / "meta" / "metadata"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError) as error:
        load_position(tmp_path)
    assert str(file) in str(error.value)
