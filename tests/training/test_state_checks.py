"""A state is sound or not: finite, the same on all replicas; what is not is named with devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ouro_jax.config import MeshConfig, ModelConfig, OptimizerConfig
from ouro_jax.parallel.mesh import make_mesh
from ouro_jax.training.state import StateFactory
from ouro_jax.training.state_checks import differing, disagreeing, not_finite, state_sums

MODEL = ModelConfig(64, 32, 48, 2, 4, 2, 8, dtype="float32")
MESH = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))


@pytest.fixture(scope="module")
def state():
    return StateFactory(MODEL, OptimizerConfig(), "expected", MESH).init(0)


def changed(state, device: int, change):
    """The state after `change` of what one device holds of the head."""
    head = state.params["lm_head"]["kernel"]
    shards = [
        jax.device_put(change(np.array(shard.data)) if shard.device.id == device else shard.data,
                       shard.device)
        for shard in head.addressable_shards
    ]  # fmt: skip
    other = jax.make_array_from_single_device_arrays(head.shape, head.sharding, shards)
    return state.replace(params=state.params | {"lm_head": {"kernel": other}})


def flip_lowest_bit(part):
    part.view(np.uint32)[3, 5] ^= 1
    return part


def test_a_sound_state_is(state):
    sums = state_sums(state, MESH)
    assert sums.bits.shape == (8, len(jax.tree.leaves(state)))
    assert disagreeing(state, sums, MESH) == not_finite(state, sums) == []


def test_the_sum_is_that_of_the_bits(state):
    kernel = state.params["lm_head"]["kernel"]
    (place,) = (n for n, leaf in enumerate(jax.tree.leaves(state)) if leaf is kernel)
    head = np.asarray(kernel)
    # fsdp splits its rows, tensor its columns; the mesh's order is data, fsdp, tensor.
    parts = [half for rows in np.split(head, 2) for half in np.split(rows, 2, axis=1)]
    expected = [int(part.view(np.uint32).sum(dtype=np.uint64)) % 2**32 for part in parts]
    assert state_sums(state, MESH).bits[:, place].tolist() == expected * 2


@pytest.mark.parametrize("device", [0, 5])
def test_one_flipped_bit_of_a_replica_is_found_and_its_device_named(state, device):
    other = changed(state, device, flip_lowest_bit)
    (found,) = disagreeing(other, state_sums(other, MESH), MESH)
    assert found.startswith("params/lm_head/kernel on device ")
    # Of two replicas nobody knows which one is right: one of them is named.
    assert any(f"device {place} " in found for place in (device, (device + 4) % 8))


def test_the_minority_is_named():
    mesh = make_mesh(MeshConfig(data=4, tensor=2))
    made = StateFactory(MODEL, OptimizerConfig(), "expected", mesh).init(0)
    other = changed(made, 6, flip_lowest_bit)
    (found,) = disagreeing(other, state_sums(other, mesh), mesh)
    assert found == "params/lm_head/kernel on device 6 of process 0"


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_named(state, value):
    def spoil(part):
        part[0, 0] = value
        return part

    other = changed(state, 3, spoil)
    assert not_finite(other, state_sums(other, MESH)) == ["params/lm_head/kernel"]


def test_two_computations_are_compared_by_array_and_device(state):
    moved = jax.tree.map(jnp.copy, state)
    assert differing(state, state_sums(state, MESH), state_sums(moved, MESH), MESH) == []
    other = changed(state, 2, flip_lowest_bit)
    found = differing(state, state_sums(state, MESH), state_sums(other, MESH), MESH)
    assert found == ["params/lm_head/kernel on device 2 of process 0"]
