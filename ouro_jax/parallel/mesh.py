"""One mesh of five axes, and one table from the model's logical axes to them.

`slice` crosses pods (DCN), `data` and `fsdp` split the batch, `fsdp` also the parameters and the
optimizer, `tensor` heads, MLP width and vocabulary, `context` the sequence.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ouro_jax.config import MESH_AXES, MeshConfig, ModelConfig
from ouro_jax.errors import ConfigError

BATCH_AXES = ("slice", "data", "fsdp")

LOGICAL_AXIS_RULES = (
    ("vocab", "tensor"),
    ("embed", "fsdp"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("head_dim", None),
    ("mlp", "tensor"),
    ("norm", None),
    ("layers", None),
    ("act_batch", BATCH_AXES),
    ("act_length", "context"),
    ("act_embed", None),
    ("act_heads", "tensor"),
    ("act_kv_heads", "tensor"),
    ("act_head_dim", None),
    ("act_mlp", "tensor"),
    ("act_vocab", "tensor"),
)
Rules = tuple[tuple[str, Any], ...]
# Where every device sees its own rows, only what `tensor` splits is left to the compiler.
MANUAL_AXES = (*BATCH_AXES, "context")
MANUAL_RULES = tuple(
    (name, axis if axis == "tensor" else None) for name, axis in LOGICAL_AXIS_RULES
)


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of `config` over all devices; axes set to 0 as in `complete_axes`.

    Raises ConfigError when the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = dataclasses.astuple(complete_axes(config, len(devices), num_slices(devices)))
    # Auto axes: under Explicit ones, logical constraints raise instead of constraining.
    types = (AxisType.Auto,) * len(MESH_AXES)
    return Mesh(_arranged(sizes, devices), MESH_AXES, axis_types=types)


def complete_axes(config: MeshConfig, num_devices: int, slices: int = 1) -> MeshConfig:
    """`config` with every axis set: `slice` to the slices there are, `data` to what is left.

    Raises ConfigError when the axes do not multiply to the number of devices.
    """
    sizes = dataclasses.asdict(config)
    sizes["slice"] = sizes["slice"] or slices
    fixed = math.prod(size for size in sizes.values() if size)
    sizes["data"] = sizes["data"] or max(1, num_devices // fixed)
    sizes = {axis: size or 1 for axis, size in sizes.items()}
    if math.prod(sizes.values()) != num_devices:
        shape = " × ".join(f"mesh.{axis}={size}" for axis, size in sizes.items())
        raise ConfigError(
            f"{shape} = {math.prod(sizes.values())} devices, but {num_devices} are here. "
            "Change the axes, or leave mesh.data unset to have it chosen."
        )
    return MeshConfig(**sizes)


def num_slices(devices: Sequence[Any]) -> int:
    """Groups of devices that only the data-center network connects: TPU slices, GPU nodes."""
    if devices[0].platform == "cpu":
        return 1
    return len({getattr(device, "slice_index", 0) for device in devices})


def _arranged(shape: tuple[int, ...], devices: Sequence[Any]) -> np.ndarray:
    """`devices` as an array of `shape` whose inner axes follow the links of the torus."""
    slices = num_slices(devices)
    if slices > 1 and shape[0] == slices:
        return mesh_utils.create_hybrid_device_mesh(
            (1, *shape[1:]), (slices, 1, 1, 1, 1), devices, allow_split_physical_axes=True
        )
    if slices > 1 and devices[0].platform == "tpu":
        raise ConfigError(
            f"mesh.slice = {shape[0]}: the devices are {slices} slices; set it to {slices}, or "
            "leave it unset."
        )
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)


@contextlib.contextmanager
def use_mesh(mesh: Mesh) -> Iterator[None]:
    """Inside, logical names mean axes of `mesh`.

    `jax.set_mesh` and not `with mesh:`, under which logical constraints silently do nothing.
    """
    with jax.set_mesh(mesh), nn.logical_axis_rules(LOGICAL_AXIS_RULES):
        yield


def require_mesh() -> None:
    """Called while tracing: refuses to go on outside `use_mesh`, where constraints do nothing."""
    if jax.sharding.get_abstract_mesh().empty:
        raise RuntimeError("call this inside `with use_mesh(mesh):`")


def is_manual() -> bool:
    """Called while tracing: whether this is inside a `shard_map` over `MANUAL_AXES`."""
    return set(MANUAL_AXES) <= set(jax.sharding.get_abstract_mesh().manual_axes)


def per_device(function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """`function` on each device's rows and columns; `tensor` stays automatic.

    Inside, logical names mean what is left of the mesh: a rule that names a manual axis raises.
    """

    def inside(*arguments):
        with nn.logical_axis_rules(MANUAL_RULES):
            return function(*arguments)

    return jax.shard_map(
        inside, in_specs=in_specs, out_specs=out_specs, axis_names=set(MANUAL_AXES),
        check_vma=False,
    )  # fmt: skip


def check_divides(model: ModelConfig, sequence_length: int, mesh: MeshConfig, key: str) -> None:
    """Raises a ConfigError that names the size in the stage `key` which a mesh axis does not
    divide."""
    sizes = dataclasses.asdict(model) | {"sequence_length": sequence_length}
    for axis, names in (
        ("tensor", ("num_heads", "num_kv_heads", "intermediate_size", "vocab_size")),
        ("fsdp", ("hidden_size",)),
        ("context", ("sequence_length",)),
    ):
        parts = getattr(mesh, axis)
        for name in names:
            if sizes[name] % parts:
                raise ConfigError(
                    f"mesh.{axis} = {parts} does not divide {name} = {sizes[name]} of {key}; "
                    "choose a divisor."
                )


def batch_shards(mesh: Mesh) -> int:
    """Over how many parts the rows of a batch are split."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def batch_sharding(mesh: Mesh, microbatched: bool) -> NamedSharding:
    """Sharding of arrays [rows, L], or [microbatches, rows, L]."""
    spec = (BATCH_AXES, "context")
    return NamedSharding(mesh, PartitionSpec(None, *spec) if microbatched else PartitionSpec(*spec))


def fsdp_spec(sharding: NamedSharding) -> PartitionSpec:
    """The part of a parameter's layout that `MANUAL_AXES` decide: where `fsdp` splits it."""
    return PartitionSpec(*(axis if axis == "fsdp" else None for axis in sharding.spec))


def shardings(boxed_tree, mesh: Mesh, rules: Rules = LOGICAL_AXIS_RULES):
    """Shardings of a tree whose leaves carry logical axis names (unboxed shape of the tree).

    Raises ConfigError naming the parameter of which two axes would lie on one axis of the mesh,
    where flax silently splits the first alone, or whose size the mesh does not divide.
    """
    names = nn.get_partition_spec(boxed_tree)
    found = nn.logical_to_mesh_sharding(names, mesh, rules)
    check = functools.partial(_check_split, dict(rules))
    jax.tree_util.tree_map_with_path(check, found, names, boxed_tree)
    return found


def _check_split(rules: dict[str, Any], path: Any, found: NamedSharding, names: Any, boxed: Any):
    (leaf,) = jax.tree.leaves(boxed)
    parameter = f"parameter {jax.tree_util.keystr(path, simple=True, separator='/')}"
    for number, (name, axes) in enumerate(zip(names, found.spec, strict=True)):
        if axes != rules.get(name):
            raise ConfigError(
                f"{parameter}, axes {tuple(names)}: the rules of LOGICAL_AXIS_RULES put {name!r} "
                f"on mesh.{rules[name]}, which another of these axes has; change one of the rules."
            )
        parts = found.mesh.shape[axes] if axes else 1
        if leaf.shape[number] % parts:
            raise ConfigError(
                f"{parameter}, axes {tuple(names)}, shape {leaf.shape}: mesh.{axes} = {parts} does "
                f"not divide {name!r} = {leaf.shape[number]}; choose a divisor."
            )
