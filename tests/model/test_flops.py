"""FLOPs of the model: against numbers written out, XLA's count and the traced program's products.

B batch, L sequence, D model width, V vocabulary, T loops, N layers.
"""

import math

import jax
import jax.numpy as jnp
import pytest

from ouro_jax.config import MeshConfig, ModelConfig, OptimizerConfig
from ouro_jax.data.batch import Batch
from ouro_jax.model.attention import dense_attention
from ouro_jax.model.flops import (
    attention_flops,
    forward_flops_per_token,
    hardware_flops_per_token,
    train_flops_per_token,
)
from ouro_jax.model.layers import Layer, RMSNorm, rotary_angles
from ouro_jax.parallel.mesh import make_mesh, use_mesh
from ouro_jax.training.state import abstract_params
from ouro_jax.training.step import StepInputs, StepSpec, batch_sums

BATCH, LENGTH = 2, 64
MODEL = ModelConfig(2048, 256, 704, 3, 4, 2, 64, num_loops=2, dtype="float32")


def test_forward_is_a_hand_count():
    # D 4, F 6, 2 heads and 1 KV head of 2, V 10, T 3, N 2, L 7:
    # q 4×4, k and v 4×2 each, o 4×4: 48 multiply-adds; MLP 3 × 4×6 = 72;
    # attention to 4 positions on average: scores 2 heads × 4 × 2 = 16, values 16; head 4×10 = 40.
    model = ModelConfig(10, 4, 6, 2, 2, 1, 2, num_loops=3)
    assert forward_flops_per_token(model, 7, num_heads_read=3) == 2 * (6 * (48 + 72 + 32) + 3 * 40)
    assert forward_flops_per_token(model, 7, num_heads_read=1) == 2 * (6 * (48 + 72 + 32) + 40)
    assert train_flops_per_token(model, 7) == 3 * 2 * (6 * 152 + 120)
    # Beside the model's 3 passes: logits again; a layer again (152), or the loop and the layer.
    products = {
        "none": 0, "layer": 152, "layer_dots": 32, "loop_and_layer": 304,
        "loop_and_layer_dots": 152 + 32,
    }  # fmt: skip
    for remat, again in products.items():
        expected = 2 * (6 * (3 * 152 + again) + 4 * 120)
        assert hardware_flops_per_token(model, 7, remat) == expected
        # Splash computes the scores twice and dO · V once more: 3 products of 16.
        assert hardware_flops_per_token(model, 7, remat, 7) == expected + 2 * 6 * 48


def test_published_size():
    # 24 layers of 51,380,224 weights, 4 loops, 4 heads of 2048 × 49,152, rows of 4096.
    model = ModelConfig(49_152, 2048, 5632, 24, 16, 16, 128)
    layer = 51_380_224 + 4097 * 2048
    assert train_flops_per_token(model, 4096) == 6 * (96 * layer + 4 * 100_663_296)


def unrolled_loss(params, tokens_BL, targets_BL):
    """The sum of all loops' cross-entropy without a scan, from the model's own modules."""
    stack = params["stack"]
    positions_BL = jnp.broadcast_to(jnp.arange(LENGTH), (BATCH, LENGTH))
    rotary = rotary_angles(positions_BL, MODEL.head_dim, MODEL.rope_theta)
    layer, norm = Layer(MODEL, dense_attention), RMSNorm(MODEL.norm_eps)
    x_BLD = jnp.take(params["embed_tokens"]["embedding"], tokens_BL, axis=0)
    total = 0.0
    for _ in range(MODEL.num_loops):
        for index in range(MODEL.num_layers):
            weights = {"params": jax.tree.map(lambda leaf, n=index: leaf[n], stack["layers"])}
            (x_BLD, _), _ = layer.apply(
                weights, (x_BLD, None), index, rotary, None, None
            )  # fmt: skip
        x_BLD = norm.apply({"params": stack["norm"]}, x_BLD)
        log_BLV = jax.nn.log_softmax(x_BLD @ params["lm_head"]["kernel"])
        total -= jnp.take_along_axis(log_BLV, targets_BL[..., None], axis=-1).sum()
    return total


def test_training_is_what_xla_counts_in_the_unrolled_program():
    ids = jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32)
    lowered = jax.jit(jax.grad(unrolled_loss)).lower(abstract_params(MODEL), ids, ids)
    counted = lowered.cost_analysis()["flops"] / (BATCH * LENGTH)
    assert counted == pytest.approx(dense(train_flops_per_token(MODEL, LENGTH), 3), rel=0.02)


def dense(flops: int, passes: float) -> float:
    """`flops` with all L² scores in `passes` forward-sized passes of attention, not the causal."""
    causal = attention_flops(MODEL, LENGTH)
    whole = causal * 2 * LENGTH / (LENGTH + 1)
    return flops + MODEL.num_loops * MODEL.num_layers * passes * (whole - causal)


def product_flops(jaxpr) -> int:
    """FLOPs of the matrix products of a traced program, a scan's body times its length."""
    total = 0
    for equation in jaxpr.eqns:
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
            total += 2 * math.prod(out) * math.prod(left[axis] for axis in contracted)
        for value in jax.tree.leaves(equation.params):
            inner = getattr(value, "jaxpr", value)
            total += times * product_flops(inner) if hasattr(inner, "eqns") else 0
    return total


@pytest.mark.parametrize(
    "remat, again",
    [("none", 0), ("layer", 1), ("layer_dots", 1), ("loop_and_layer", 2),
     ("loop_and_layer_dots", 2)],
)  # fmt: skip
def test_hardware_flops_are_the_products_of_the_traced_step(remat, again):
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    spec = StepSpec(MODEL, OptimizerConfig(), "expected", "uniform", remat, "each_loop", mesh)
    ids, mask = (jax.ShapeDtypeStruct((BATCH, LENGTH), dtype) for dtype in (jnp.int32, bool))

    def loss(params, batch):
        return batch_sums(spec, params, batch, StepInputs(0.0, 0.0, 0.05, 1e4)).loss

    with use_mesh(mesh):
        traced = jax.make_jaxpr(jax.grad(loss))(
            abstract_params(MODEL), Batch(ids, ids, ids, ids, mask)
        )  # fmt: skip
    expected = dense(hardware_flops_per_token(MODEL, LENGTH, remat), 3 + again)
    assert product_flops(traced.jaxpr) / (BATCH * LENGTH) == pytest.approx(expected, rel=0.005)
