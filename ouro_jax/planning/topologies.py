"""Pods by name: which ones exist, how many chips they have, and devices to compile for.

A TPU slice is `KIND:GRID`, as `v5e:16x16` or `v5p:4x4x4`; GPUs are `KIND:COUNT` of one node or
`KIND:NODESxCOUNT`. None of them needs to be there.
"""

import dataclasses
import importlib.util
import math
from collections.abc import Mapping
from typing import Any

from ouro_jax.errors import ConfigError, nearest
from ouro_jax.parallel.chips import CHIPS

SQUARES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
SMALL_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")
# Sides of a slice of 64 chips and more are multiples of 4, up to the largest that is sold.
LARGEST_CUBES = {"v4": (12, 16, 16), "v5p": (16, 16, 24), "tpu7x": (16, 16, 36)}
GPUS_PER_NODE = (1, 2, 4, 8)
MAX_NODES = 256
# TensorCores of a chip: Google's names of v4 and v5p slices count them, `v5p-128` has 64 chips.
CORES_IN_NAME = {"v4": 2, "v5p": 2, "tpu7x": 1, "v5e": 1, "v6e": 1}
SPELLINGS = {"v5litepod": "v5e", "v5p": "v5p", "v5": "v5p", "v6": "v6e", "v7x": "tpu7x"}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips to plan for: `num_slices` times `grid` chips of `kind`; of GPUs a slice is a node."""

    kind: str
    grid: tuple[int, ...]
    num_slices: int = 1

    @property
    def is_gpu(self) -> bool:
        """Whether these are NVIDIA GPUs."""
        return self.kind in ("h100", "h200")

    @property
    def num_chips(self) -> int:
        """Chips of all slices."""
        return self.num_slices * math.prod(self.grid)

    @property
    def num_devices(self) -> int:
        """JAX devices: a TPU7x chip is two."""
        return self.num_chips * (2 if self.kind == "tpu7x" else 1)

    @property
    def granted_bytes(self) -> int:
        """Memory of a device that a program may take."""
        memory = CHIPS[self.kind].hbm_bytes
        return int(GPU_SHARE * memory) if self.is_gpu else memory

    @property
    def name(self) -> str:
        """As it is written on the command line, the number of slices in front."""
        slices = f"{self.num_slices} × " if self.num_slices > 1 else ""
        return f"{slices}{self.kind}:{_text(self.grid)}"


def grids(kind: str) -> list[tuple[int, ...]]:
    """Every grid that a slice of `kind` can have, small ones first."""
    if kind in ("v5e", "v6e"):
        return [_sides(grid) for grid in SQUARES]
    if kind in LARGEST_CUBES:
        a, b, c = LARGEST_CUBES[kind]
        large = [
            (x, y, z)
            for x in range(4, a + 1, 4)
            for y in range(x, b + 1, 4)
            for z in range(y, c + 1, 4)
        ]
        return [_sides(grid) for grid in SMALL_CUBES] + sorted(large, key=math.prod)
    return [(count,) for count in GPUS_PER_NODE]


# Of a GPU's memory: as XLA_PYTHON_CLIENT_MEM_FRACTION=0.9 (the default is 0.75); CUDA and NCCL
# have the rest. XLA compiles programs for GPUs that exceed it.
GPU_SHARE = 0.9
# What XLA wants to know of a GPU that is not there (CUDA's tables for compute capability 9.0).
HOPPER = """
gpu_device_info {{
  cuda_compute_capability {{ major: 9 minor: 0 }}
  core_count: 132
  fpus_per_core: 128
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  memory_bandwidth: {bandwidth}
  device_memory_size: {memory}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
device_description_str: "{name}"
"""
KINDS = ("v4", "v5e", "v5p", "v6e", "tpu7x", "h100", "h200")


def parse_topology(text: str, num_slices: int = 1) -> Topology:
    """Reads a topology's name, Google's own names too (`v5e-256`, `v5p-128`).

    Raises ConfigError naming the nearest that exists.
    """
    if num_slices < 1:
        raise ConfigError(f"--num_slices={num_slices}: expected 1 or more.")
    kind, colon, grid = text.lower().partition(":")
    if not colon:
        kind, _, count = text.lower().partition("-")
        return _by_count(text, _kind(text, kind), count, num_slices)
    kind = _kind(text, kind)
    sides = _sides(grid) if all(side.isdigit() for side in grid.split("x")) else ()
    if kind in ("h100", "h200") and len(sides) == 2 and num_slices == 1:
        num_slices, sides = sides[0], sides[1:]
    if sides not in grids(kind) or num_slices > MAX_NODES:
        raise ConfigError(f"--topology={text}: there is no such slice.{_nearest_grid(kind, sides)}")
    return Topology(kind, sides, num_slices)


def _by_count(text: str, kind: str, count: str, num_slices: int) -> Topology:
    cores = CORES_IN_NAME.get(kind, 1)
    chips = int(count) // cores if count.isdigit() else 0
    found = [grid for grid in grids(kind) if math.prod(grid) == chips]
    if not found:
        raise ConfigError(
            f"--topology={text}: there is no such slice.{_nearest_grid(kind, (chips,))}"
        )
    # Several grids may have as many chips: Google's names mean the one nearest to a cube.
    return Topology(kind, min(found, key=sum), num_slices)


def _kind(text: str, kind: str) -> str:
    kind = SPELLINGS.get(kind, kind)
    if kind not in KINDS:
        raise ConfigError(
            f"--topology={text}: expected KIND:GRID with a kind of {', '.join(KINDS)}, as in "
            f"v5p:4x4x4 or h100:8.{nearest(kind, KINDS)}"
        )
    return kind


def _nearest_grid(kind: str, sides: tuple[int, ...]) -> str:
    """The hint that names the grid of `kind` with the most similar number of chips."""
    chips = max(1, math.prod(sides)) if sides else 1

    def distance(grid: tuple[int, ...]) -> tuple[float, int]:
        return abs(math.log(math.prod(grid) / chips)), sum(grid)

    close = min(grids(kind), key=distance)
    written = f"{kind}:{_text(close)}"
    known = ", ".join(_text(grid) for grid in grids(kind)[:9])
    return f" The nearest is {written}; {kind} has {known}{' …' if len(grids(kind)) > 9 else ''}."


def devices(topology: Topology) -> list[Any]:
    """Devices of `topology` to build a mesh of; of several slices each knows its own.

    Raises ConfigError naming the extra to install where the compiler is missing.
    """
    from jax.experimental import topologies

    if topology.is_gpu:
        return _gpus(topology)
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError("planning for TPU needs its compiler: pip install 'ouro_jax[tpu]'")
    options: dict[str, Any] = {}
    if topology.kind == "v4":
        options["chip_config_name"] = "megacore"
    if topology.num_slices > 1:
        options["num_slices"] = topology.num_slices
    if topology.grid == (1, 1):
        options["chips_per_host_bounds"] = (1, 1, 1)
    name = f"{topology.kind}:{_text(topology.grid)}"
    return topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices


def _gpus(topology: Topology) -> list[Any]:
    from jax.experimental import topologies

    if importlib.util.find_spec("jax_cuda12_plugin") is None:
        raise ConfigError(
            "planning for GPUs needs their compiler: pip install 'ouro_jax[plan-gpu]'"
        )
    chip = CHIPS[topology.kind]
    return topologies.get_topology_desc(
        platform="cuda",
        topology_name=topology.kind,
        topology=f"{topology.num_slices}x1x{topology.grid[0]}",
        target_config=HOPPER.format(
            name=chip.name, memory=chip.hbm_bytes, bandwidth=int(chip.hbm_bandwidth)
        ),
    ).devices


def environment(topology: Topology) -> Mapping[str, str]:
    """Variables of a process that compiles for `topology` on a machine that has none of it."""
    common = {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "1"}
    if topology.is_gpu:
        return common | {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}
    # Without them the compiler asks the metadata server what it runs on, and locks out a second.
    return common | {
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }


def _sides(grid: str) -> tuple[int, ...]:
    return tuple(int(side) for side in grid.split("x"))


def _text(grid: tuple[int, ...]) -> str:
    return "x".join(map(str, grid))
