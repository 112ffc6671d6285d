"""What a stage costs on a topology, from its compiled program."""

import dataclasses
import math
from pathlib import Path
from typing import Any

from ouro_jax.config import Config, MeshConfig
from ouro_jax.parallel.chips import CHIPS, GIB
from ouro_jax.planning.compile import program_text
from ouro_jax.planning.hlo import collectives
from ouro_jax.planning.programs import Request
from ouro_jax.planning.topologies import Topology
from ouro_jax.training.curriculum import StagePlan, microbatch_rows
from ouro_jax.training.layout import Layout

SECONDS_PER_DAY = 86_400


def stage_request(config: Config, name: str, topology: Topology, layout: Layout) -> Request:
    """The train step of stage `name` at its full batch."""
    stage, mesh = config.stages[name], layout.mesh
    rows = StagePlan(name, stage).batch_sizes()[-1]
    microbatches = rows // (mesh.slice * mesh.data * mesh.fsdp * layout.microbatch_rows)
    return Request(
        "train", topology, config.stage_model(name), stage.sequence_length, microbatches,
        config.optimizer, stage.objective, stage.prior, layout,
    )  # fmt: skip


def describe(config: Config, name: str, request: Request, result: dict[str, Any],
             cache: Path) -> dict[str, Any]:  # fmt: skip
    """The row of stage `name` as `ouro plan --json` prints it, from a compiled train step."""
    topology, layout = request.topology, request.layout
    chip, plan = CHIPS[topology.kind], StagePlan(name, config.stages[name])
    tokens = plan.batch_sizes()[-1] * plan.stage.sequence_length
    flops = tokens * plan.flops_per_token(request.model)
    peak = result["peak_bytes"]
    row = {
        "stage": name,
        "topology": topology.name,
        "fits": result["fits"],
        "reason": result.get("reason"),
        "hbm_gib": peak and peak / GIB,
        "hbm_capacity_gib": chip.hbm_bytes / GIB,
        "flops_per_step": flops,
        "collective_gb": None,
        "mfu_bound": None,
        "layout": dataclasses.asdict(layout),
        "microbatches": request.rows,
        "compile_seconds": result.get("compile_seconds"),
        "warnings": result["warnings"],
        "replicated_matrices": result.get("replicated_matrices"),
    }
    if result["fits"]:
        moved = collectives(program_text(request, cache), result["mesh"])
        row["collectives"] = [dataclasses.asdict(transfer) for transfer in moved]
        row["collective_gb"] = sum(transfer.total_bytes for transfer in moved) / 1e9
    return row


def stage_layouts(config: Config, name: str, topology: Topology) -> list[Layout]:
    """Layouts of stage `name` on `topology`, the most promising first."""
    sizes = dataclasses.asdict(config.mesh)
    sizes["slice"] = sizes["slice"] or topology.num_slices
    others = math.prod(size or 1 for axis, size in sizes.items() if axis != "data")
    sizes["data"] = sizes["data"] or topology.num_devices // others
    mesh = MeshConfig(**{axis: size or 1 for axis, size in sizes.items()})
    shards = mesh.slice * mesh.data * mesh.fsdp
    plan = StagePlan(name, config.stages[name])
    rows = microbatch_rows(plan, shards, config.layout.microbatch_rows) // shards
    gather, remat = config.layout.gather, config.layout.remat
    return [
        Layout(
            mesh, "each_loop" if gather == "auto" else gather,
            "layer" if remat == "auto" else remat, rows,
        )
    ]  # fmt: skip
