"""What a training step carries from one step to the next, and how it lies on the mesh."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from ouro_jax.config import ModelConfig, OptimizerConfig
from ouro_jax.model.loop_lm import LoopLM
from ouro_jax.parallel.mesh import shardings
from ouro_jax.training.guard import GuardState, fresh_guard
from ouro_jax.training.optimizer import make_optimizer, trained_part


class TrainState(struct.PyTreeNode):
    """Parameters (float32), optimizer state of the trained part, optimizer steps, random key, and
    what the judgement of the stage's steps goes by."""

    params: Any
    opt_state: Any
    step: jax.Array
    rng: jax.Array
    guard: GuardState


@dataclasses.dataclass(frozen=True)
class StateFactory:
    """Makes states of one model under one objective, and describes them without making one."""

    model: ModelConfig
    optimizer: OptimizerConfig
    objective: str
    mesh: Mesh

    def init(self, seed: int) -> TrainState:
        """Fresh parameters, N(0, initializer_range), drawn in place on the mesh."""
        return jax.jit(self._unboxed, out_shardings=self.shardings())(jax.random.key(seed))

    def fresh_optimizer(self, params: Any) -> Any:
        """A new optimizer state for the trained part of `params`."""
        make = jax.jit(self._optimizer_state, out_shardings=self.shardings().opt_state)
        return make(params)

    def fresh_guard(self) -> GuardState:
        """What a stage begins with."""
        return jax.jit(fresh_guard, out_shardings=self.shardings().guard)()

    def abstract(self) -> TrainState:
        """Shapes, dtypes and shardings of the state; nothing is allocated."""
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            jax.eval_shape(lambda: self._unboxed(jax.random.key(0))),
            self.shardings(),
        )

    def shardings(self) -> TrainState:
        """Where every leaf lies: parameters and moments over `fsdp` and `tensor`."""
        return shardings(jax.eval_shape(lambda: self._boxed(jax.random.key(0))), self.mesh)

    def _unboxed(self, key: jax.Array) -> TrainState:
        return nn.unbox(self._boxed(key))

    def _boxed(self, key: jax.Array) -> TrainState:
        init_key, run_key = jax.random.split(key)
        tokens = jnp.zeros((1, 2), jnp.int32)
        params = LoopLM(self.model).init(init_key, tokens)["params"]
        return TrainState(
            params, self._optimizer_state(params), jnp.zeros((), jnp.int32),
            jax.random.key_data(run_key), fresh_guard(),
        )  # fmt: skip

    def _optimizer_state(self, params):
        return make_optimizer(self.optimizer, 0.0, 0.0).init(trained_part(params, self.objective))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of a value that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def abstract_params(model: ModelConfig) -> Any:
    """Shapes and dtypes of the parameters of `model`, whole on the first device."""

    def init():
        variables = LoopLM(model).init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
        return nn.unbox(variables)["params"]

    sharding = SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        jax.eval_shape(init),
    )
