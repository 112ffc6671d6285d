"""Which rows of a batch a process reads, and how it puts them on its devices.

Devices that differ only along `tensor` and `context` need the same rows. Where such devices belong
to several processes, these read the same rows: together they are one host of data.

M microbatches, B rows of a microbatch, L sequence.
"""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from ouro_jax.errors import ConfigError
from ouro_jax.parallel.attention import balance_order
from ouro_jax.parallel.mesh import batch_shards


@dataclasses.dataclass(frozen=True)
class DataHost:
    """This process is host `index` of `count`: it reads the rows of these `shards` of a batch."""

    index: int
    count: int
    shards: tuple[int, ...]


@functools.cache
def data_host(mesh: Mesh) -> DataHost:
    """What this process reads for training on `mesh`."""
    devices = mesh.devices.reshape(batch_shards(mesh), -1)  # [shard, those with the same rows]
    owners = [[device.process_index for device in row] for row in devices]
    return divide(owners, jax.process_index())


def divide(owners: list[list[int]], process: int) -> DataHost:
    """The host of `process`, where `owners[s]` are the processes that need the rows of shard s.

    Raises ConfigError where processes share some shards and not others, or read unequal parts.
    """
    needs = {
        owner: tuple(shard for shard, row in enumerate(owners) if owner in row)
        for owner in {owner for row in owners for owner in row}
    }
    hosts = sorted(set(needs.values()))
    if sum(map(len, hosts)) != len(owners) or len({len(shards) for shards in hosts}) > 1:
        described = "; ".join(f"process {owner}: {needs[owner]}" for owner in sorted(needs))
        raise ConfigError(
            "mesh.*: processes need partly the same rows, or unequal parts of a batch (parts of "
            f"{len(owners)}: {described}); choose mesh.tensor × mesh.context so that it divides "
            "the devices of a process, or is a multiple of them."
        )
    return DataHost(hosts.index(needs[process]), len(hosts), needs[process])


def place(batch: Any, sharding: NamedSharding) -> Any:
    """This host's rows [B, L] or [M, B, L] of a batch as arrays over the whole mesh.

    The columns come into the order in which `context` holds them.
    """
    host = data_host(sharding.mesh)
    order = balance_order(jax.tree.leaves(batch)[0].shape[-1], sharding.mesh.shape["context"])

    def put(own: np.ndarray) -> jax.Array:
        size = own.shape[-2] // len(host.shards)

        def part(index: Any) -> np.ndarray:
            *microbatches, rows, columns = index
            first = size * host.shards.index((rows.start or 0) // size)
            return own[*microbatches, first : first + size][..., order[columns]]

        shape = (*own.shape[:-2], own.shape[-2] * host.count, own.shape[-1])
        return jax.make_array_from_callback(shape, sharding, part)

    return jax.tree.map(put, batch)
