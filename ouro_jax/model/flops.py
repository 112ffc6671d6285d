"""Analytic FLOPs of the looped model. XLA's own count takes a scan's body once, so a looped model
must be counted by hand: T loops of N layers, T products with the head, causal attention halved.

L sequence, T loops, N layers.
"""

from ouro_jax.config import ModelConfig

# How often remat computes a layer's projections again, and how often its attention. Two levels:
# the loop, for what enters its layers, then each layer. `_dots` keeps the results of a layer's
# projections, but those of attention have batch dimensions and are never kept.
RECOMPUTED = {
    "none": (0, 0),
    "layer": (1, 1),
    "layer_dots": (0, 1),
    "loop_and_layer": (2, 2),
    "loop_and_layer_dots": (1, 2),
}


def forward_flops_per_token(config: ModelConfig, sequence_length: int, num_heads_read: int) -> int:
    """Multiply-adds × 2 of one token's forward pass in a row of `sequence_length`.

    `num_heads_read`: how many loops' states go through the LM head (all T in training, 1 when
    decoding). A token attends to (sequence_length + 1) / 2 positions on average.
    """
    layer = projection_flops(config) + attention_flops(config, sequence_length)
    return config.num_loops * config.num_layers * layer + num_heads_read * head_flops(config)


def train_flops_per_token(config: ModelConfig, sequence_length: int) -> int:
    """Forward and backward (3 × forward), every loop's head included; recomputation not counted.

    This is the model's work as used for MFU; remat adds to the hardware's work, not to this.
    """
    return 3 * forward_flops_per_token(config, sequence_length, config.num_loops)


def hardware_flops_per_token(
    config: ModelConfig, sequence_length: int, remat: str, attention_products: int = 4
) -> int:
    """`train_flops_per_token` and what is computed again: what the chip really does for a token.

    The logits are always computed again, a chunk at a time; of the layers, what `RECOMPUTED` says.
    `attention_products` are those of attention's backward pass: 4, of which flash attention
    repeats one (cuDNN, 5) or, in two kernels, three (splash, 7).
    """
    attention = attention_flops(config, sequence_length)
    projections_again, attention_again = RECOMPUTED[remat]
    layer = projections_again * projection_flops(config) + attention_again * attention
    layer += (attention_products - 4) * attention // 2
    again = config.num_loops * (config.num_layers * layer + head_flops(config))
    return train_flops_per_token(config, sequence_length) + again


def projection_flops(config: ModelConfig) -> int:
    """Forward FLOPs of a token in one layer's attention projections and MLP."""
    projections = config.head_dim * 2 * (config.num_heads + config.num_kv_heads)
    return 2 * config.hidden_size * (projections + 3 * config.intermediate_size)


def attention_flops(config: ModelConfig, sequence_length: int) -> int:
    """Forward FLOPs of a token in one layer's two attention products, causal."""
    return 2 * (sequence_length + 1) * config.num_heads * config.head_dim


def head_flops(config: ModelConfig) -> int:
    """Forward FLOPs of a token's product with the LM head."""
    return 2 * config.hidden_size * config.vocab_size
