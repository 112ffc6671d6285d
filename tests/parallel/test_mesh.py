"""The mesh of a config, and the refusal of sizes that its axes do not divide."""

import re

import flax.linen as nn
import jax
import pytest
from jax.sharding import PartitionSpec

from ouro_jax.config import MeshConfig, ModelConfig
from ouro_jax.errors import ConfigError
from ouro_jax.parallel.mesh import (
    LOGICAL_AXIS_RULES,
    batch_sharding,
    batch_shards,
    check_divides,
    complete_axes,
    make_mesh,
    require_mesh,
    shardings,
    use_mesh,
)

MODEL = ModelConfig(128, 32, 48, 2, 4, 2, 8)


def test_data_takes_what_the_other_axes_leave():
    for config, shape, shards in (
        (MeshConfig(), (1, 8, 1, 1, 1), 8),
        (MeshConfig(fsdp=2, tensor=2), (1, 2, 2, 2, 1), 4),
        (MeshConfig(slice=2, context=4), (2, 1, 1, 1, 4), 2),
        (MeshConfig(data=1, fsdp=8), (1, 1, 8, 1, 1), 8),
    ):
        mesh = make_mesh(config)
        assert mesh.axis_names == ("slice", "data", "fsdp", "tensor", "context")
        assert mesh.devices.shape == shape
        assert batch_shards(mesh) == shards
    assert make_mesh(MeshConfig(), jax.devices()[:3]).devices.size == 3


@pytest.mark.parametrize("config", [MeshConfig(fsdp=3), MeshConfig(data=2), MeshConfig(tensor=16)])
def test_a_mesh_that_does_not_match_the_devices_is_refused(config):
    with pytest.raises(ConfigError, match="but 8 are here. Change the axes, or leave mesh.data"):
        make_mesh(config)


def test_rows_are_split_over_the_batch_axes_and_positions_over_context():
    mesh = make_mesh(MeshConfig(slice=2, fsdp=2, context=2))
    assert batch_sharding(mesh, microbatched=False).shard_shape((8, 6)) == (2, 3)
    assert batch_sharding(mesh, microbatched=True).shard_shape((3, 8, 6)) == (3, 2, 3)


@pytest.mark.parametrize(
    ("mesh", "words"),
    [
        (MeshConfig(tensor=4), "mesh.tensor = 4 does not divide num_kv_heads = 2 of stages.sft"),
        (MeshConfig(fsdp=5), "mesh.fsdp = 5 does not divide hidden_size = 32 of stages.sft"),
        (MeshConfig(context=4), "mesh.context = 4 does not divide sequence_length = 10 of"),
    ],
)
def test_sizes_that_an_axis_does_not_divide_are_named(mesh, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        check_divides(MODEL, 10, complete_axes(mesh, 5 if mesh.fsdp else 4), "stages.sft")
    check_divides(MODEL, 10, MeshConfig(1, 2, 1, 2, 2), "stages.sft")


def test_tracing_outside_a_mesh_is_refused():
    with pytest.raises(RuntimeError, match="use_mesh"):
        require_mesh()
    with use_mesh(make_mesh(MeshConfig())):
        require_mesh()


def test_every_logical_axis_of_a_parameter_has_a_rule():
    from ouro_jax.model.loop_lm import LoopLM

    tokens = jax.ShapeDtypeStruct((1, 2), "int32")
    boxed = jax.eval_shape(LoopLM(MODEL).init, jax.random.key(0), tokens)
    leaves = jax.tree.leaves(boxed, is_leaf=lambda leaf: hasattr(leaf, "names"))
    names = {name for leaf in leaves for name in leaf.names} - {None}
    assert len(leaves) == 16 and names <= dict(LOGICAL_AXIS_RULES).keys()
    assert {"vocab", "embed", "heads", "kv_heads", "mlp", "layers"} <= names


@pytest.fixture
def boxed():
    """Shapes and axis names of two parameters."""
    names = ("layers", "embed", "kv_heads", "head_dim"), ("vocab", "embed")
    shapes = (3, 32, 2, 8), (128, 32)
    return {
        "attention": {
            "k_proj": nn.Partitioned(jax.ShapeDtypeStruct(shapes[0], "float32"), names[0])
        },
        "embedding": nn.Partitioned(jax.ShapeDtypeStruct(shapes[1], "float32"), names[1]),
    }


def test_parameters_are_split_by_the_rules(boxed):
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    with use_mesh(mesh):
        found = shardings(boxed, mesh)
    assert found["attention"]["k_proj"].spec == PartitionSpec(None, "fsdp", "tensor", None)
    assert found["embedding"].spec == PartitionSpec("tensor", "fsdp")


def test_two_axes_of_a_parameter_on_one_axis_of_the_mesh_are_refused(boxed):
    rules = tuple((name, "tensor" if name == "head_dim" else axis)
                  for name, axis in LOGICAL_AXIS_RULES)  # fmt: skip
    words = "parameter attention/k_proj, axes .* put 'head_dim' on mesh.tensor, which another"
    with pytest.raises(ConfigError, match=words):
        shardings(boxed, make_mesh(MeshConfig(fsdp=4, tensor=2)), rules)


def test_a_parameter_that_the_mesh_does_not_divide_is_named(boxed):
    with pytest.raises(ConfigError, match=r"attention/k_proj.*mesh.tensor = 8 .*'kv_heads' = 2;"):
        shardings(boxed, make_mesh(MeshConfig(tensor=8)))
