"""Analytic FLOPs of the looped model. XLA's own count takes a scan's body once, so a looped model
must be counted by hand: T loops of N layers, T products with the head, causal attention halved."""

from ouro_jax.config import ModelConfig


def forward_flops_per_token(config: ModelConfig, sequence_length: int, num_heads_read: int) -> int:
    """Multiply-adds × 2 of one token's forward pass in a row of `sequence_length`.

    `num_heads_read`: how many loops' states go through the LM head (all T in training, 1 when
    decoding). A token attends to (sequence_length + 1) / 2 positions on average.
    """
    projections = config.head_dim * 2 * (config.num_heads + config.num_kv_heads)
    layer = 2 * config.hidden_size * (projections + 3 * config.intermediate_size)
    attention = 2 * (sequence_length + 1) * config.num_heads * config.head_dim
    head = 2 * config.hidden_size * config.vocab_size
    return config.num_loops * config.num_layers * (layer + attention) + num_heads_read * head


def train_flops_per_token(config: ModelConfig, sequence_length: int) -> int:
    """Forward and backward (3 × forward), every loop's head included; recomputation not counted.

    This is the model's work as used for MFU; remat adds to the hardware's work, not to this.
    """
    return 3 * forward_flops_per_token(config, sequence_length, config.num_loops)
