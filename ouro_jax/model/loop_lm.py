"""LoopLM: one stack of layers with shared weights, applied T times (paper, section 3; eq. 1-3).

B batch, L sequence, D model width, V vocabulary, T loops.
"""

from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from ouro_jax.config import ModelConfig
from ouro_jax.model.attention import Attention, dense_attention, matmul_precision
from ouro_jax.model.cache import Address, KVCache
from ouro_jax.model.int8 import scale_of
from ouro_jax.model.layers import Layer, RMSNorm, constrain, parameter, rotary_angles


class LoopOutput(struct.PyTreeNode):
    """What every loop left: the normed states and the exit gate's logits (float32)."""

    states_TBLD: jax.Array
    gate_logits_TBL: jax.Array


class ExitGate(nn.Module):
    """λ = σ(w·h + b) in logits; one gate for all loops (eq. 3). Its logits are float32."""

    @nn.compact
    def __call__(self, state_BLD: jax.Array) -> jax.Array:
        init = nn.initializers
        width = state_BLD.shape[-1]
        kernel = parameter(self, "kernel", init.normal(0.02), ("norm", None), (width, 1))
        bias = parameter(self, "bias", init.zeros, (None,), (1,))
        logits_BL1 = jnp.einsum(
            "BLD,DO->BLO", state_BLD, kernel.astype(state_BLD.dtype),
            precision=matmul_precision(state_BLD.dtype), preferred_element_type=jnp.float32,
        )  # fmt: skip
        return logits_BL1[..., 0] + bias.astype(jnp.float32)


class Stack(nn.Module):
    """One loop: all layers, by a scan over stacked weights or one by one; final norm; gate."""

    config: ModelConfig
    attention: Attention
    remat: str
    layers_apart: bool

    @nn.compact
    def __call__(self, x_BLD, rotary, segment_ids_BL, cache, address):
        run = self._one_by_one if self.layers_apart else self._scanned
        x_BLD, cache = run((x_BLD, cache), rotary, segment_ids_BL, address)
        state_BLD = RMSNorm(self.config.norm_eps, name="norm")(x_BLD)
        state_BLD = constrain(state_BLD, ("act_batch", "act_length", "act_embed"))
        return state_BLD, ExitGate(name="early_exit_gate")(state_BLD), cache

    def _one_by_one(self, carry, rotary, segment_ids_BL, address):
        for index in range(self.config.num_layers):
            layer = Layer(self.config, self.attention, name=f"layer_{index}")
            carry, _ = layer(carry, index, rotary, segment_ids_BL, address)
        return carry

    def _scanned(self, carry, rotary, segment_ids_BL, address):
        layer = Layer
        if self.remat != "none":
            # Of the products, attention's have batch dimensions: its scores are never kept.
            keeps = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
            policy = keeps if self.remat.endswith("_dots") else None
            layer = nn.remat(Layer, prevent_cse=False, policy=policy)
        layers = nn.scan(
            layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=cast(Any, (0, nn.broadcast, nn.broadcast, nn.broadcast)),
            length=self.config.num_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(self.config, self.attention, name="layers")
        indices = jnp.arange(self.config.num_layers)
        return layers(carry, indices, rotary, segment_ids_BL, address)[0]


def take_layers_apart(params: dict) -> dict:
    """The same parameters with `layer_0`, `layer_1`, … in the stack instead of stacked `layers`."""
    stack = dict(params["stack"])
    layers = stack.pop("layers")
    for index in range(len(jax.tree.leaves(layers)[0])):
        stack[f"layer_{index}"] = jax.tree.map(lambda x, index=index: x[index], layers)
    return {**params, "stack": stack}


class Embedding(nn.Module):
    """Token embedding, unscaled, in the compute dtype."""

    config: ModelConfig

    @nn.compact
    def __call__(self, tokens_BL: jax.Array) -> jax.Array:
        config = self.config
        init = nn.initializers.normal(config.embedding_initializer_range)
        shape = (config.vocab_size, config.hidden_size)
        table_VD = parameter(self, "embedding", init, ("vocab", "embed"), shape)
        # A gather from a table sharded over its width makes XLA replicate the result first.
        table_VD = constrain(table_VD.astype(config.dtype), ("vocab", "act_embed"))
        x_BLD = jnp.take(table_VD, tokens_BL, axis=0)
        return constrain(x_BLD, ("act_batch", "act_length", "act_embed"))


class Head(nn.Module):
    """The untied LM head; logits are float32. Its kernel may be int8 (`ouro_jax.model.int8`)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, states: jax.Array) -> jax.Array:
        config = self.config
        init = nn.initializers.normal(config.initializer_range)
        shape = (config.hidden_size, config.vocab_size)
        kernel_DV = parameter(self, "kernel", init, ("embed", "vocab"), shape)
        logits = jnp.einsum(
            "...D,DV->...V", states, kernel_DV.astype(states.dtype),
            precision=matmul_precision(states.dtype), preferred_element_type=jnp.float32,
        )  # fmt: skip
        scale_V = scale_of(self, kernel_DV)
        return logits if scale_V is None else logits * scale_V


class LoopLM(nn.Module):
    """The looped language model.

    `remat`: `none`, `layer` (recompute each layer in the backward pass) or `loop_and_layer`
    (keep only the states between loops, recompute everything inside); `layer_dots` and
    `loop_and_layer_dots` keep the results of a layer's matrix products instead of computing them
    again. `attention` is chosen by the floor above. With `layers_apart` the parameters are those
    that `take_layers_apart` returns, for inference. Parameters and program size do not depend on
    the number of loops.
    """

    config: ModelConfig
    attention: Attention = dense_attention
    remat: str = "layer"
    layers_apart: bool = False

    def setup(self) -> None:
        self.embed_tokens = Embedding(self.config)
        self.stack = Stack(self.config, self.attention, self.remat, self.layers_apart)
        self.lm_head = Head(self.config)

    def __call__(
        self,
        tokens_BL: jax.Array,
        positions_BL: jax.Array | None = None,
        segment_ids_BL: jax.Array | None = None,
        num_loops: int | None = None,
        rope_theta: jax.Array | float | None = None,
    ) -> LoopOutput:
        """States and gate logits of every loop.

        Args:
          tokens_BL: token ids.
          positions_BL: positions for RoPE, restarting with each document; 0 … L-1 if None.
          segment_ids_BL: attention stays within equal ids; the whole row if None.
          num_loops: loops to run, `config.num_loops` if None; any number from 1 on.
          rope_theta: RoPE base, `config.rope_theta` if None; may be a traced value.
        """
        x_BLD = self.embed(tokens_BL)
        if positions_BL is None:
            positions_BL = jnp.broadcast_to(jnp.arange(tokens_BL.shape[1]), tokens_BL.shape)
        rotary = self._rotary(positions_BL, rope_theta)

        def loop(stack, x_BLD, _):
            state_BLD, gate_BL, _ = stack(x_BLD, rotary, segment_ids_BL, None, None)
            return state_BLD, (state_BLD, gate_BL)

        if self.remat.startswith("loop_and_layer"):
            loop = nn.remat(loop, prevent_cse=False)
        loops = nn.scan(
            loop,
            variable_broadcast="params",
            split_rngs={"params": False},
            length=num_loops or self.config.num_loops,
        )
        _, (states_TBLD, gate_logits_TBL) = loops(self.stack, x_BLD, None)
        if self.is_initializing():
            self.lm_head(x_BLD)
        return LoopOutput(states_TBLD, gate_logits_TBL)

    def embed(self, tokens_BL: jax.Array) -> jax.Array:
        """x_BLD that the first loop starts from."""
        return self.embed_tokens(tokens_BL)

    def loop(
        self,
        x_BLD: jax.Array,
        loop: jax.Array | int,
        positions_BL: jax.Array,
        cache: KVCache,
        rows_B: jax.Array | None = None,
        longest: jax.Array | int | None = None,
    ) -> tuple[jax.Array, jax.Array, KVCache]:
        """One loop over the positions given, with the cache: (state_BLD, gate_logits_BL, cache).

        Args:
          loop: number of the loop, from 0; one for all rows, or [B].
          positions_BL: follow each other within a row. Keys and values are written there, and the
            slots up to each position are attended to; stale slots beyond are never read.
          rows_B: the cache rows of the batch; 0 … B-1 if None.
          longest: how many slots at the start of the cache are read at least; all that the
            positions ask for if None.
        """
        batch = x_BLD.shape[0]
        loop_B = jnp.broadcast_to(jnp.asarray(loop, jnp.int32), (batch,))
        rows_B = jnp.arange(batch) if rows_B is None else rows_B
        longest = jnp.max(positions_BL) + 1 if longest is None else jnp.asarray(longest)
        address = Address(loop_B, rows_B, positions_BL, longest)
        rotary = self._rotary(positions_BL, None)
        return cast(Any, self.stack(x_BLD, rotary, None, cache, address))

    def logits(self, states: jax.Array) -> jax.Array:
        """Logits over the vocabulary of states of any leading shape: […, D] → […, V], float32."""
        return self.lm_head(states)

    def _rotary(self, positions_BL, rope_theta):
        theta = self.config.rope_theta if rope_theta is None else rope_theta
        return rotary_angles(positions_BL, self.config.head_dim, theta)
