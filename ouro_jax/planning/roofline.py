"""What bounds a training step: products, HBM, or the links within a slice and between slices.

Every time is a lower bound of one resource used without a pause; the largest of them bounds the
step. Nothing here knows how well they overlap.
"""

import dataclasses
from collections.abc import Iterable

from ouro_jax.config import GATE_OBJECTIVES, ModelConfig, num_parameters
from ouro_jax.model.flops import RECOMPUTED
from ouro_jax.parallel.chips import Chip
from ouro_jax.planning.hlo import Collective
from ouro_jax.training.layout import Layout
from ouro_jax.training.memory import ITEM_BYTES, chip_tokens
from ouro_jax.training.step import CHUNK_TOKENS


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds of a step on each resource, and the share of peak that the longest allows."""

    compute: float
    hbm: float
    ici: float
    dcn: float
    mfu_bound: float

    @property
    def bound(self) -> float:
        """Seconds that the step takes at least."""
        return max(self.compute, self.hbm, self.ici, self.dcn)

    @property
    def bound_by(self) -> str:
        """The resource that the step waits for: compute, hbm, ici or dcn."""
        return max(("compute", "hbm", "ici", "dcn"), key=lambda name: getattr(self, name))


def roofline(
    chip: Chip,
    model_flops: float,
    hardware_flops: float,
    hbm_bytes: float,
    transfers: Iterable[Collective],
    num_slices: int = 1,
) -> Roofline:
    """The roofline of a step, all numbers per chip and step.

    `model_flops` are the model's work, as MFU counts it; `hardware_flops` have what is computed
    again. Recomputation lowers the bound on MFU even where products bound the step.
    """
    ici = dcn = 0.0
    for transfer in transfers:
        within, between = link_bytes(transfer, num_slices)
        ici += within / chip.ici_bandwidth
        dcn += between / chip.dcn_bandwidth
    compute = hardware_flops / chip.peak_flops
    hbm = hbm_bytes / chip.hbm_bandwidth
    bound = max(compute, hbm, ici, dcn)
    return Roofline(compute, hbm, ici, dcn, model_flops / (bound * chip.peak_flops))


def link_bytes(transfer: Collective, num_slices: int) -> tuple[float, float]:
    """Bytes that each chip sends within its slice and between slices, in a ring.

    Of a payload gathered or scattered over n chips (n - 1) / n leaves each chip, of an all-reduce
    twice that. Groups across slices do it within the slice first; only a chip's own part,
    1 / (chips of the group in a slice), then crosses.
    """
    slices = num_slices if "slice" in transfer.axes else 1
    inner = transfer.group_size // slices
    rings = 2 if transfer.kind == "all-reduce" else 1
    if transfer.kind in ("collective-permute", "collective-broadcast"):
        sent = (0.0, 1.0) if slices > 1 else (1.0, 0.0)
    else:
        sent = rings * (inner - 1) / inner, rings * (slices - 1) / slices / inner
    return sent[0] * transfer.total_bytes, sent[1] * transfer.total_bytes


def hbm_bytes_per_step(
    model: ModelConfig,
    sequence_length: int,
    layout: Layout,
    objective: str,
    num_microbatches: int,
    state_bytes: int,
) -> float:
    """Bytes that one chip reads and writes in HBM for a step, by the formulas below.

    `state_bytes`: parameters and moments of the chip, 12 bytes a parameter. Each product reads
    its operands and writes its result once; elementwise work is fused into them, and nothing
    stays in fast memory from one product to the next.
    """
    tokens, tensor = chip_tokens(sequence_length, layout), layout.mesh.tensor
    head = model.hidden_size * model.vocab_size // tensor
    whole, item = num_parameters(model) // tensor, ITEM_BYTES[model.dtype]
    weights = (whole - 2 * head) / model.num_layers
    chunks = model.num_loops * max(1, tokens / CHUNK_TOKENS)
    # Float32 logits, written once and read once for each product.
    logits = 2 * 4 * model.num_loops * tokens * model.vocab_size / tensor
    elements = tokens * _layer_elements(model) / tensor
    layers = model.num_loops * model.num_layers
    if objective in GATE_OBJECTIVES:
        forward = item * (layers * (weights + elements) + chunks * head) + logits
        return num_microbatches * forward
    again = RECOMPUTED[layout.remat][0]
    # Forward, again, backward; weights are read once a pass and their gradient written and read,
    # the backward pass of activations counts twice.
    passes = item * layers * ((4 + again) * weights + (3 + again) * elements)
    # A chunk reads the head for logits, again, and for the states' gradient; its own part of the
    # head's gradient goes into a float32 sum. So does the microbatch's gradient of everything.
    readout = chunks * head * (3 * item + 8) + 3 * logits
    sums = (8 + item) * whole / (1 if layout.gather == "once" else layout.mesh.fsdp)
    # AdamW reads the gradient, the parameter and its moments, and writes the last three.
    return num_microbatches * (passes + readout + sums) + 28 / 12 * state_bytes


def _layer_elements(model: ModelConfig) -> int:
    """Elements read and written for a token in a layer's forward pass.

    Products: D → (H+2G)K, attention (H+2G)K → HK, HK → D, D → 2F, 2F → D; two residual sums with
    their norms read 2D and write D each.
    """
    heads = model.num_heads * model.head_dim
    groups = 2 * model.num_kv_heads * model.head_dim
    return 10 * model.hidden_size + 4 * heads + 2 * groups + 4 * model.intermediate_size
