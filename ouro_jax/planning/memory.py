"""HBM of a training step by kind, per chip.

What the state takes is exact, from its shardings; what one microbatch keeps for its backward pass
follows from the layout by the formulas here; the rest of the compiler's peak is temporaries.

b rows and l = L / context positions of a chip's microbatch, D model width, H heads, G KV heads,
K head width, F MLP width, V vocabulary, T loops, N layers; weights are split over `tensor`, and
outside the step's loops over `fsdp` too.
"""

import math

from ouro_jax.config import GATE_OBJECTIVES, ModelConfig, num_parameters
from ouro_jax.training.layout import Layout
from ouro_jax.training.step import CHUNK_TOKENS

ITEM_BYTES = {"float32": 4, "bfloat16": 2}


def memory_by_kind(
    model: ModelConfig,
    sequence_length: int,
    layout: Layout,
    objective: str,
    parameter_bytes: int,
    optimizer_bytes: int,
    peak_bytes: int,
) -> dict[str, int]:
    """Bytes of one chip: the kinds, which add up to `peak` unless the formulas overstate.

    Args:
      parameter_bytes, optimizer_bytes: of the state on one chip, from its shardings.
      peak_bytes: the compiler's peak. `temporaries` is what it leaves, at least 0; `overstated`
        is by how much the other kinds exceed it (buffers that the compiler shares).
    """
    trains = objective not in GATE_OBJECTIVES
    kinds = {
        "parameters": parameter_bytes,
        "optimizer": optimizer_bytes,
        "gathered": gathered_bytes(model, layout),
        "gradients": gradient_bytes(model, layout, parameter_bytes) if trains else 0,
        "activations": activation_bytes(model, sequence_length, layout) if trains else 0,
        "logits": logits_bytes(model, sequence_length, layout),
    }
    known = sum(kinds.values())
    return kinds | {
        "temporaries": max(0, peak_bytes - known),
        "overstated": max(0, known - peak_bytes),
        "peak": peak_bytes,
    }


def chip_tokens(sequence_length: int, layout: Layout) -> int:
    """b · l: tokens of a microbatch on one chip."""
    return layout.microbatch_rows * sequence_length // layout.mesh.context


def gathered_bytes(model: ModelConfig, layout: Layout) -> int:
    """Whole weights, in the compute dtype, that are kept beside the chip's own part.

    All of them under `once`, else the head for its chunks.
    """
    once = layout.gather == "once"
    whole = num_parameters(model) if once else model.hidden_size * model.vocab_size
    return ITEM_BYTES[model.dtype] * whole // layout.mesh.tensor if layout.mesh.fsdp > 1 else 0


def gradient_bytes(model: ModelConfig, layout: Layout, parameter_bytes: int) -> int:
    """Float32 sums over microbatches, the microbatch's gradient, the head's sum over chunks.

    The first two are laid out like the parameters under `each_loop`; under `once` they are whole
    until the one reduction at the end, the microbatch's in the compute dtype.
    """
    head = 4 * model.hidden_size * model.vocab_size // layout.mesh.tensor
    if layout.gather == "each_loop":
        return 2 * parameter_bytes + head
    sums = (4 + ITEM_BYTES[model.dtype]) * num_parameters(model) // layout.mesh.tensor
    return sums + head


def activation_bytes(model: ModelConfig, sequence_length: int, layout: Layout) -> int:
    """What one microbatch keeps for its backward pass: T loops' states and their gradients, and

    layer              T · N · b · l · D: what enters each layer
    layer_dots         that and the results of its products, T · N · b · l · (2D + (H+2G)K + 2F)
    none               that and what lies between them, T · N · b · l · (4D + 2HK + 2F) more
    loop_and_layer…    (T + N) · b · l · D: what enters each loop, and the layers of one loop
                       (`_dots`: with their products)
    """
    width, heads = model.hidden_size, model.num_heads * model.head_dim
    groups = model.num_kv_heads * model.head_dim
    # What lies between split products is split over `tensor` with them; states are not.
    products = 2 * width + (heads + 2 * groups + 2 * model.intermediate_size) / layout.mesh.tensor
    between = 4 * width + 2 * (heads + model.intermediate_size) / layout.mesh.tensor
    kept = {"none": width + products + between}.get(layout.remat, width)
    if layout.remat.endswith("dots"):
        kept += products
    loops = model.num_loops
    if layout.remat.startswith("loop_and_layer"):
        layers = loops * width + model.num_layers * kept
    else:
        layers = loops * model.num_layers * kept
    elements = chip_tokens(sequence_length, layout) * (2 * loops * width + layers)
    return math.ceil(ITEM_BYTES[model.dtype] * elements)


def logits_bytes(model: ModelConfig, sequence_length: int, layout: Layout) -> int:
    """A chunk's logits and their gradient, float32: 2 · min(b · l, 1024) · V."""
    tokens = min(chip_tokens(sequence_length, layout), CHUNK_TOKENS)
    return 2 * 4 * tokens * model.vocab_size // layout.mesh.tensor
