"""HBM of a training step by kind, per chip.

What the state takes is exact, from its shardings. What a microbatch adds follows from the layout,
at the fuller of two moments: while logits are worked on, or in the backward pass of the last loop.
The rest of the compiler's peak is temporaries.

S = b · l · D elements: the states of a chip's microbatch, b rows and l = L / context positions;
D model width, H heads, G KV heads, K head width, F MLP width, V vocabulary, P parameters, T loops,
N layers. What `tensor` splits is divided by it.
"""

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
    """Bytes of one chip at the peak, by kind.

    Args:
      parameter_bytes, optimizer_bytes: of the state on one chip, from its shardings.
      peak_bytes: the compiler's peak. `temporaries` is what it leaves, at least 0; `overstated`
        is by how much the other kinds exceed it (buffers that the compiler shares).
    """
    held = held_bytes(model, sequence_length, layout, objective, parameter_bytes)
    kinds = {"parameters": parameter_bytes, "optimizer": optimizer_bytes} | held
    known = sum(kinds.values())
    return kinds | {
        "temporaries": max(0, peak_bytes - known),
        "overstated": max(0, known - peak_bytes),
        "peak": peak_bytes,
    }


def held_bytes(
    model: ModelConfig, sequence_length: int, layout: Layout, objective: str, parameter_bytes: int
) -> dict[str, int]:
    """What one microbatch adds to the state at the fuller moment, with bytes i per element:

                   logits                              backward pass
      gathered     i · P under `once`, else i · D · V  i · P under `once`
      gradients    sums, and 4 · D · V of the head     sums, and the microbatch's own
      activations  2T · i · S, and what is kept        T · i · S, what is kept, one loop's layers
      logits       2 · 4 · min(b · l, 1024) · V        –

    Sums over microbatches are 4 · P under `once`, the microbatch's own i · P; under `each_loop`
    both lie like the parameters. For what is kept see `_kept`. Nothing but states and a chunk's
    logits where only the gate is trained.
    """
    item, once = ITEM_BYTES[model.dtype], layout.gather == "once"
    whole, head = (
        size // layout.mesh.tensor
        for size in (num_parameters(model), model.hidden_size * model.vocab_size)
    )
    tokens = chip_tokens(sequence_length, layout)
    states = item * model.num_loops * tokens * model.hidden_size
    logits = 4 * min(tokens, CHUNK_TOKENS) * model.vocab_size // layout.mesh.tensor
    readout = {"gathered": item * (whole if once else head), "gradients": 0,
               "activations": states, "logits": logits}  # fmt: skip
    if objective in GATE_OBJECTIVES:
        return readout
    sums, own = (4 * whole, item * whole) if once else (parameter_bytes, parameter_bytes)
    for_all, for_one = (item * tokens * elements for elements in _kept(model, layout))
    readout |= {"gradients": sums + 4 * head, "activations": 2 * states + for_all,
                "logits": 2 * logits}  # fmt: skip
    backward = {"gathered": item * whole if once else 0, "gradients": sums + own,
                "activations": states + for_all + for_one, "logits": 0}  # fmt: skip
    return max(readout, backward, key=lambda kinds: sum(kinds.values()))


def chip_tokens(sequence_length: int, layout: Layout) -> int:
    """b · l: tokens of a microbatch on one chip."""
    return layout.microbatch_rows * sequence_length // layout.mesh.context


def _kept(model: ModelConfig, layout: Layout) -> tuple[int, int]:
    """Elements a token that all loops keep for the backward pass, and those of the loop in work.

    layer           T · N · D               –                  what enters each layer
    loop_and_layer  T · D                   N · D              what enters each loop
    …_dots          (2D + (H+2G)K + 2F) a layer more           the results of its products
    none            T · N of that and 4D + 2HK + 2F            what lies between them too
    """
    width, tensor = model.hidden_size, layout.mesh.tensor
    heads, groups = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    products = 2 * width + (heads + 2 * groups + 2 * model.intermediate_size) // tensor
    between = 4 * width + 2 * (heads + model.intermediate_size) // tensor
    layer = {"none": width + products + between}.get(layout.remat, width)
    layer += products if layout.remat.endswith("dots") else 0
    if layout.remat.startswith("loop_and_layer"):
        return model.num_loops * width, model.num_layers * layer
    return model.num_loops * model.num_layers * layer, 0
