"""Whether a state is sound: finite, the same on all replicas, and the same when computed twice.

Every device sums the bits of what it holds of each array, as integers modulo 2³²: exact in any
order, and another sum after the flip of any bit. Devices that hold copies of one part must agree.
"""

import functools
from collections import Counter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from ouro_jax.training.state import TrainState, replicated


class StateSums(NamedTuple):
    """Of every device (in the order of the mesh) and array: the sum of its bits, all finite."""

    bits: np.ndarray
    finite: np.ndarray


def state_sums(state: TrainState, mesh: Mesh) -> StateSums:
    """The sums of all devices, on every process."""
    leaves = jax.tree.leaves(state)
    specs = tuple(leaf.sharding.spec for leaf in leaves)
    return StateSums(*jax.device_get(_compiled_sums(mesh, specs)(*leaves)))


@functools.cache
def _compiled_sums(mesh: Mesh, specs: tuple[PartitionSpec, ...]) -> Any:
    each = PartitionSpec(mesh.axis_names)

    def own(*parts: jax.Array) -> tuple[jax.Array, jax.Array]:
        bits = jnp.stack([_sum_of_bits(part) for part in parts])
        finite = jnp.stack([jnp.all(jnp.isfinite(part)) for part in parts])
        return bits[None], finite[None]

    run = jax.shard_map(own, mesh=mesh, in_specs=specs, out_specs=(each, each), check_vma=False)
    return jax.jit(run, out_shardings=replicated(mesh))


def _sum_of_bits(part: jax.Array) -> jax.Array:
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[part.dtype.itemsize]
    return jnp.sum(jax.lax.bitcast_convert_type(part, unsigned).astype(jnp.uint32))


def not_finite(state: TrainState, sums: StateSums) -> list[str]:
    """Names of the arrays with a value that is not finite; the guard begins with such."""
    return [
        name for name, finite in zip(_names(state), sums.finite.T, strict=True)
        if not finite.all() and not name.startswith("guard")
    ]  # fmt: skip


def disagreeing(state: TrainState, sums: StateSums, mesh: Mesh) -> list[str]:
    """Arrays of which replicas differ, each with the devices that are in the minority."""
    found = []
    for number, (name, leaf) in enumerate(zip(_names(state), jax.tree.leaves(state), strict=True)):
        for holders in _holders(leaf.sharding, leaf.shape, mesh):
            counts = Counter(sums.bits[list(holders), number].tolist())
            if len(counts) > 1:
                ((usual, _),) = counts.most_common(1)
                odd = [place for place in holders if sums.bits[place, number] != usual]
                found.append(f"{name} on {_devices(mesh, odd)}")
    return found


def differing(state: TrainState, one: StateSums, other: StateSums, mesh: Mesh) -> list[str]:
    """Arrays that two computations of one step made differently, with the devices."""
    return [
        f"{name} on {_devices(mesh, np.flatnonzero(differs))}"
        for name, differs in zip(_names(state), (one.bits != other.bits).T, strict=True)
        if differs.any()
    ]


@functools.cache
def _holders(sharding: Any, shape: tuple[int, ...], mesh: Mesh) -> list[tuple[int, ...]]:
    """Places in the mesh of the devices that hold each part of an array."""
    holders: dict[str, list[int]] = {}
    parts = sharding.devices_indices_map(shape)
    for place, device in enumerate(mesh.devices.flat):
        holders.setdefault(str(parts[device]), []).append(place)
    return [tuple(places) for places in holders.values()]


def _names(state: TrainState) -> list[str]:
    return [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(state)
    ]


def _devices(mesh: Mesh, places: Any) -> str:
    devices: list[Any] = mesh.devices.flatten().tolist()
    odd = [devices[place] for place in places]
    return ", ".join(f"device {device.id} of process {device.process_index}" for device in odd)
