"""Which layout a stage gets where its config leaves it open: the fastest, by estimate, that fits.

Estimates are formulas (memory.py, and the bytes on the links below); `ouro plan` puts the same
candidates before the compiler.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from ouro_jax.config import GATE_OBJECTIVES, Config, MeshConfig, ModelConfig, num_parameters
from ouro_jax.errors import ConfigError
from ouro_jax.model.flops import RECOMPUTED, hardware_flops_per_token
from ouro_jax.parallel.attention import balance_order
from ouro_jax.parallel.chips import Chip, chip_of
from ouro_jax.parallel.mesh import check_divides, complete_axes, num_slices
from ouro_jax.training.curriculum import StagePlan, microbatch_rows
from ouro_jax.training.layout import Layout
from ouro_jax.training.memory import ITEM_BYTES, chip_tokens, held_bytes

# A ring of 16 is one side of a v5e or v6e pod; over 64 chips of a v5p the compiler gave up
# all-gathers for all-reduces.
MOST_FSDP = 16
MOST_TENSOR = 8
STATE_BYTES = 12  # a parameter and two moments, float32


def choose_layout(config: Config, name: str, devices: Sequence[Any] | None = None) -> Layout:
    """The layout of stage `name` on `devices`; keys of the config that are set are kept.

    Raises ConfigError where no mesh matches the devices, the model and the batch.
    """
    devices = jax.devices() if devices is None else devices
    return candidates(config, name, len(devices), num_slices(devices), chip_of(devices[0]))[0]


def candidates(
    config: Config, name: str, num_devices: int, slices: int = 1, chip: Chip | None = None
) -> list[Layout]:
    """Layouts of stage `name`, the estimated best first: those that fit by time, then by memory.

    Of a chip that is not known only `data` and `fsdp` are chosen, and nothing is estimated.
    Raises ConfigError, that of the first mesh tried, if there is no layout.
    """
    plan, model = StagePlan(name, config.stages[name]), config.stage_model(name)
    found = []
    for mesh in _meshes(config.mesh, model, num_devices, chip is not None):
        try:
            found += _layouts(config, plan, model, complete_axes(mesh, num_devices, slices), chip)
        except ConfigError:
            continue  # no candidate: where there is none at all, the next line says why
    found = found or _layouts(
        config, plan, model, complete_axes(config.mesh, num_devices, slices), chip
    )
    if chip is None:
        return found

    def rank(layout: Layout) -> tuple[float, ...]:
        held = estimated_bytes(model, plan, layout)
        seconds = estimated_seconds(model, plan, layout, chip)
        # Nothing here is known to 2 %: among equals larger products, then less memory.
        equal = round(math.log(seconds) / 0.02)
        return max(0.0, held - chip.hbm_bytes), equal, -layout.microbatch_rows, held

    return sorted(found, key=rank)


def _meshes(
    config: MeshConfig, model: ModelConfig, num_devices: int, chip_is_known: bool
) -> Iterator[MeshConfig]:
    """Meshes that keep what `config` sets; `data` may be left open. The largest fsdp first."""

    def choices(axis: str, most: int, size: int) -> list[int]:
        divisors = [n for n in range(1, most + 1) if num_devices % n == 0 and size % n == 0]
        return [getattr(config, axis)] if getattr(config, axis) else divisors[::-1]

    most_tensor, most_context = (MOST_TENSOR, num_devices) if chip_is_known else (1, 1)
    for context, tensor, fsdp in itertools.product(
        choices("context", most_context, num_devices),
        choices("tensor", most_tensor, model.num_kv_heads),
        choices("fsdp", MOST_FSDP, model.hidden_size),
    ):
        yield dataclasses.replace(config, context=context, tensor=tensor, fsdp=fsdp)


def _layouts(
    config: Config, plan: StagePlan, model: ModelConfig, mesh: MeshConfig, chip: Chip | None
) -> list[Layout]:
    """Every layout on `mesh`; ConfigErrors where it does not divide the model or the batch."""
    wanted, stage = config.layout, plan.stage
    check_divides(model, stage.sequence_length, mesh, f"stages.{plan.name}")
    balance_order(stage.sequence_length, mesh.context)
    shards = mesh.slice * mesh.data * mesh.fsdp
    most = microbatch_rows(plan, shards, wanted.microbatch_rows) // shards
    rows = [wanted.microbatch_rows or n for n in range(1, most + 1) if most % n == 0]
    usual = "once" if shards * mesh.context > 1 else "each_loop"
    gathers = [usual] if chip is None else ["once", "each_loop"]
    # What lies between a layer's products is never worth its memory.
    remats = ["layer"] if chip is None else [name for name in RECOMPUTED if name != "none"]
    gathers = gathers if wanted.gather == "auto" else [wanted.gather]
    remats = remats if wanted.remat == "auto" else [wanted.remat]
    return [
        Layout(mesh, gather, remat, count)
        for gather, remat, count in itertools.product(gathers, remats, sorted(set(rows))[::-1])
    ]


def estimated_bytes(model: ModelConfig, plan: StagePlan, layout: Layout) -> float:
    """HBM of a chip: what memory.py counts, a fifth more, and 0.75 GiB of the compiler's own.

    (1.4B, 4K, T = 4, `once`, `loop_and_layer` on v5e: 12.1 GiB are counted, the peak is 14.4; with
    `layer` 13.3, which the compiler refuses.)
    """
    parameters = 4 * num_parameters(model) // (layout.mesh.fsdp * layout.mesh.tensor)
    stage = plan.stage
    trained = stage.objective not in GATE_OBJECTIVES
    state = parameters * (STATE_BYTES // 4 if trained else 1)
    held = held_bytes(model, stage.sequence_length, layout, stage.objective, parameters)
    return 1.2 * (state + sum(held.values())) + 0.75 * 2**30


def estimated_seconds(model: ModelConfig, plan: StagePlan, layout: Layout, chip: Chip) -> float:
    """Products and transfers of a step at the chip's full rates, one after the other."""
    stage, mesh = plan.stage, layout.mesh
    devices = layout.batch_shards * mesh.tensor * mesh.context
    tokens = plan.batch_sizes()[-1] * stage.sequence_length / devices
    flops = hardware_flops_per_token(model, stage.sequence_length, layout.remat)
    if stage.objective in GATE_OBJECTIVES:
        flops = plan.flops_per_token(model)
    weights, between = _weight_bytes(model, plan, layout)
    ici = weights + _activation_bytes(model, plan, layout)
    return (
        tokens * flops / chip.peak_flops + ici / chip.ici_bandwidth + between / chip.dcn_bandwidth
    )


def _left(parts: int) -> float:
    """Share of a payload that leaves each chip when it is gathered or scattered over a ring."""
    return (parts - 1) / parts


def _weight_bytes(model: ModelConfig, plan: StagePlan, layout: Layout) -> tuple[float, float]:
    """Bytes of weights and gradients that a chip sends in a step: within its slice, between."""
    mesh, item = layout.mesh, ITEM_BYTES[model.dtype]
    whole = num_parameters(model) / mesh.tensor
    trained = plan.stage.objective not in GATE_OBJECTIVES
    gathers, sums, width = 1, 1, 4
    if layout.gather == "each_loop":
        sums, width = _num_microbatches(plan, layout) * model.num_loops, item
        gathers = sums * (2 + RECOMPUTED[layout.remat][0] if trained else 1)
    sums = sums if trained else 0
    ring = mesh.data * mesh.context
    scattered = _left(mesh.fsdp) + 2 * _left(ring) / mesh.fsdp
    within = whole * (gathers * item * _left(mesh.fsdp) + sums * width * scattered)
    between = sums * width * whole * 2 * _left(mesh.slice) / (mesh.fsdp * ring)
    return within, between


def _activation_bytes(model: ModelConfig, plan: StagePlan, layout: Layout) -> float:
    """Bytes of activations that a chip sends in a step: sums over `tensor`, keys over `context`."""
    mesh, item = layout.mesh, ITEM_BYTES[model.dtype]
    tokens = chip_tokens(plan.stage.sequence_length, layout)
    backward = plan.stage.objective not in GATE_OBJECTIVES
    passes = 2 + RECOMPUTED[layout.remat][0] if backward else 1
    # Two sums of a state a pass and layer; an all-reduce sends twice what a gather does.
    summed = passes * 2 * 2 * _left(mesh.tensor) * tokens * model.hidden_size
    keys = 2 * model.num_kv_heads * model.head_dim * tokens * mesh.context / mesh.tensor
    gathered = (2 + RECOMPUTED[layout.remat][1] if backward else 1) * keys * _left(mesh.context)
    layers = _num_microbatches(plan, layout) * model.num_loops * model.num_layers
    return item * layers * (summed + gathered)


def _num_microbatches(plan: StagePlan, layout: Layout) -> int:
    return plan.batch_sizes()[-1] // (layout.batch_shards * layout.microbatch_rows)
