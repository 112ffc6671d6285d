"""What a stage, or an answer, costs on a topology: facts of the compiled program, as plain data."""

import dataclasses
from pathlib import Path
from typing import Any

from ouro_jax.config import GATE_OBJECTIVES, Config, ModelConfig
from ouro_jax.inference.slots import PIECES
from ouro_jax.model.flops import forward_flops_per_token, hardware_flops_per_token, head_flops
from ouro_jax.parallel.chips import CHIPS, GIB
from ouro_jax.planning.compile import program_text
from ouro_jax.planning.hlo import collectives
from ouro_jax.planning.programs import Request
from ouro_jax.planning.roofline import hbm_bytes_per_step, roofline
from ouro_jax.planning.topologies import Topology
from ouro_jax.training.curriculum import StagePlan
from ouro_jax.training.layout import Layout
from ouro_jax.training.layout_choice import candidates
from ouro_jax.training.memory import ITEM_BYTES, memory_by_kind

Row = dict[str, Any]
"""What `ouro plan --json` prints of one program, and its `request`."""


def stage_layouts(config: Config, name: str, topology: Topology) -> list[Layout]:
    """Layouts of stage `name` on `topology`, the one that a run would choose first."""
    chip = CHIPS[topology.kind]
    return candidates(config, name, topology.num_devices, topology.num_slices, chip)


def stage_request(config: Config, name: str, topology: Topology, layout: Layout) -> Request:
    """The train step of stage `name` at its full batch."""
    stage = config.stages[name]
    rows = StagePlan(name, stage).batch_sizes()[-1]
    microbatches = rows // (layout.batch_shards * layout.microbatch_rows)
    return Request(
        "train", topology, _program_model(config, name), stage.sequence_length, microbatches,
        config.optimizer, stage.objective, stage.prior, layout,
    )  # fmt: skip


def answer_request(
    config: Config, name: str, topology: Topology, program: str, rows: int
) -> Request:
    """`prefill` or `decode` of `rows` prompts as long as a row of stage `name`, on one chip."""
    return Request(
        program, dataclasses.replace(topology, num_slices=1), _program_model(config, name),
        config.stages[name].sequence_length, rows,
    )  # fmt: skip


def _program_model(config: Config, name: str) -> ModelConfig:
    """The model of a stage as far as programs depend on it: the RoPE base is an input of a step."""
    return dataclasses.replace(config.stage_model(name), rope_theta=config.model.rope_theta)


def describe(config: Config, name: str, request: Request, result: Row, cache: Path) -> Row:
    """The row of stage `name` from what came of compiling its request."""
    peak = result["peak_bytes"]
    row = {
        "request": request,
        "stage": name,
        "program": request.program,
        "topology": request.topology.name,
        "chip": CHIPS[request.topology.kind].name,
        "fits": result["fits"],
        "reason": result.get("reason"),
        "hbm_gib": peak and peak / GIB,
        "hbm_capacity_gib": request.topology.granted_bytes / GIB,
        "flops_per_step": None,
        "collective_gb": None,
        "mfu_bound": None,
        "compile_seconds": result.get("compile_seconds"),
        "rematerializations": result["warnings"],
    }
    if request.program == "train":
        return row | _describe_step(StagePlan(name, config.stages[name]), request, result, cache)
    return row | _describe_answer(request, result)


def _describe_step(plan: StagePlan, request: Request, result: Row, cache: Path) -> Row:
    model, layout, chips = request.model, request.layout, request.topology.num_devices
    assert layout is not None, "training is laid out on a mesh"
    length, batch = plan.stage.sequence_length, plan.batch_sizes()[-1] * plan.stage.sequence_length
    flops = batch * plan.flops_per_token(model)
    row = {
        "flops_per_step": flops,
        "layout": dataclasses.asdict(layout),
        "chips": request.topology.num_chips,
        "tokens_per_step": batch,
        "microbatches": request.rows,
        "replicated_matrices": result.get("replicated_matrices"),
    }
    if not result["fits"]:
        return row
    text = program_text(request, cache)
    moved = collectives(text, result["mesh"])
    hardware = batch * _hardware_flops(plan, request, text)
    state = result["parameter_bytes"], result["optimizer_bytes"]
    stage = model, length, layout, plan.stage.objective
    hbm = hbm_bytes_per_step(*stage, request.rows, sum(state))
    times = roofline(
        CHIPS[request.topology.kind], flops / chips, hardware / chips, hbm, moved,
        request.topology.num_slices,
    )  # fmt: skip
    kinds = memory_by_kind(*stage, *state, result["peak_bytes"])
    steps = plan.total_rows * length / batch
    return row | {
        "hardware_flops_per_step": hardware,
        "hbm_by_kind_gib": {kind: size / GIB for kind, size in kinds.items()},
        "hbm_gb_per_step": hbm / 1e9,
        "collective_gb": sum(transfer.total_bytes for transfer in moved) / 1e9,
        "collectives": [
            dataclasses.asdict(transfer) | {"total_bytes": transfer.total_bytes}
            for transfer in moved
        ],
        "seconds": {name: getattr(times, name) for name in ("compute", "hbm", "ici", "dcn")},
        "bound_by": times.bound_by,
        "mfu_bound": times.mfu_bound,
        "tokens": plan.total_rows * length,
        "days": steps * times.bound / 86_400,
        "chip_hours": steps * times.bound / 3600 * request.topology.num_chips,
    }  # fmt: skip


def _hardware_flops(plan: StagePlan, request: Request, text: str) -> int:
    """FLOPs of a token with what is computed again; a frozen model has no backward pass."""
    assert request.layout is not None, "training is laid out on a mesh"
    if request.objective in GATE_OBJECTIVES:
        return plan.flops_per_token(request.model)
    kernels = {"tpu_custom_call": 7, "__cudnn$fmha": 5}  # splash's two kernels, and cuDNN's
    products = next((count for call, count in kernels.items() if call in text), 4)
    return hardware_flops_per_token(
        request.model, request.sequence_length, request.layout.remat, products
    )


def _describe_answer(request: Request, result: Row) -> Row:
    """All loops run for every token: a step reads the layers' weights once per loop, the head once.

    In `prefill` every piece of a prompt reads the weights, and the cache is written once; in
    `decode` a token attends to every slot of it.
    """
    model, rows, length = request.model, request.rows, request.sequence_length
    embedding = ITEM_BYTES[model.dtype] * model.vocab_size * model.hidden_size
    layers = result["parameter_bytes"] - 2 * embedding
    passes = rows * -(-length // PIECES[0]) if request.program == "prefill" else 1
    read = passes * model.num_loops * layers + embedding + result["cache_bytes"]
    if request.program == "prefill":
        tokens = rows * length
        flops = tokens * forward_flops_per_token(model, length, 0) + rows * head_flops(model)
    else:
        tokens = rows
        # The formula halves a row's positions: this one attends to all of them.
        flops = tokens * forward_flops_per_token(model, 2 * length - 1, 1)
    row = {"flops_per_step": flops, "rows": rows, "sequence_length": length, "chips": 1}
    if not result["fits"]:
        return row
    times = roofline(CHIPS[request.topology.kind], flops, flops, read, [])
    return row | {
        "hardware_flops_per_step": flops,
        "hbm_by_kind_gib": {
            "parameters": result["parameter_bytes"] / GIB,
            "cache": result["cache_bytes"] / GIB,
        },
        "hbm_gb_per_step": read / 1e9,
        "collective_gb": 0.0,
        "collectives": [],
        "seconds": {name: getattr(times, name) for name in ("compute", "hbm", "ici", "dcn")},
        "bound_by": times.bound_by,
        "mfu_bound": times.mfu_bound,
        "tokens_per_second": tokens / times.bound,
    }
