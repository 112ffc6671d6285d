"""int8 kernels in the model, and the moments of its matrices' inputs, against numpy float64.

B batch, L sequence, T loops, D model width, H heads, K head width, F MLP width.
"""

import dataclasses

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import reference
from safetensors.numpy import save_file

from ouro_jax.interop.huggingface import load_huggingface
from ouro_jax.model.layers import Projection
from ouro_jax.model.loop_lm import LoopLM
from ouro_jax.model.moments import HEAD, collect_moments

GROUPED = dict(heads=6, kv_heads=2, head_dim=4, hidden=32, mlp=48, vocab=96, layers=2)
TOKENS_BL = np.random.default_rng(1).integers(0, 96, (2, 12))


def int8_checkpoint(folder):
    """A quantised grouped-query checkpoint whose numbers numpy made; its fields, and the float64
    tensors that it stands for."""
    fields, tensors = reference.random_checkpoint(np.random.default_rng(0), **GROUPED)
    fields["quantization_config"] = {
        "quant_method": "int8", "bits": 8, "symmetric": True, "per_channel": True,
    }  # fmt: skip
    stored, meant = {}, {}
    for name, tensor in tensors.items():
        stored[name], meant[name] = tensor, tensor.astype(np.float64)
        if "_proj" in name or name == "lm_head.weight":
            scale = np.abs(tensor).max(1, keepdims=True) / np.float32(100)
            stored[name] = np.round(tensor / scale).astype(np.int8)
            stored[f"{name}_scale"] = scale
            meant[name] = stored[name].astype(np.float64) * scale.astype(np.float64)
    reference.write_checkpoint(folder, fields, {})
    save_file(stored, folder / "model.safetensors")
    return fields, meant


def test_the_whole_model_is_that_of_the_products_in_float64(tmp_path):
    fields, meant = int8_checkpoint(tmp_path)
    config, params = load_huggingface(tmp_path)
    assert params["stack"]["layers"]["self_attn"]["k_proj"]["kernel"].dtype == jnp.int8
    expected = reference.forward(fields, meant, TOKENS_BL, num_loops=6)
    model = LoopLM(config)
    out = model.apply({"params": params}, TOKENS_BL, num_loops=6)
    np.testing.assert_allclose(out.states_TBLD, expected.states_TBLD, atol=2e-4)
    logits = model.apply({"params": params}, out.states_TBLD, method="logits")
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, expected.logits_TBLV, atol=5e-4)


@pytest.mark.parametrize(
    ("equation", "shape", "summed"),
    [("BLD,DHK->BLHK", (64, 2, 8), 1), ("BLHK,HKD->BLD", (4, 16, 8), 2)],
)
def test_a_bfloat16_product_is_rounded_once(equation, shape, summed):
    """Its numbers are exact in bfloat16 and sums and scales are float32: one rounding is left."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 5, *shape[:summed])).astype(ml_dtypes.bfloat16)
    kernel = rng.integers(-128, 128, shape).astype(np.int8)
    scale = rng.uniform(0.001, 0.1, shape[summed:]).astype(np.float32)
    module = Projection(equation, shape, ("a",) * len(shape), 0.02)
    params = {"kernel": jnp.asarray(kernel), "kernel_scale": jnp.asarray(scale)}
    out = module.apply({"params": params}, jnp.asarray(x))
    assert out.dtype == jnp.bfloat16
    expected = np.einsum(equation, x.astype(np.float64), kernel * scale.astype(np.float64))
    # Half a unit in the last of 8 bits, and what sums in float32 leave.
    slack = 1e-4 * np.abs(expected).max()
    assert (np.abs(np.asarray(out, np.float64) - expected) <= np.abs(expected) / 256 + slack).all()


def test_an_int8_kernel_without_a_scale_is_refused(tmp_path):
    int8_checkpoint(tmp_path)
    config, params = load_huggingface(tmp_path)
    params["lm_head"] = {"kernel": params["lm_head"]["kernel"]}
    with pytest.raises(ValueError, match="lm_head.*no kernel_scale"):
        LoopLM(config).apply({"params": params}, jnp.zeros((1, 32)), method="logits")


def inputs_of(fields, tensors, loops):
    """What every matrix is multiplied with, by (layer, module), and what attention adds."""
    out = reference.forward(fields, tensors, TOKENS_BL, num_loops=loops)
    eps, last = fields["rms_norm_eps"], fields["num_hidden_layers"] - 1
    tensors = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    length = TOKENS_BL.shape[1]
    positions_BL = np.broadcast_to(np.arange(length), TOKENS_BL.shape)
    visible_BLL = np.broadcast_to(np.tril(np.ones((length, length), bool)), (2, length, length))
    found = {}
    for loop in range(loops):
        x_BLD = (
            out.states_TBLD[loop - 1] if loop else tensors["model.embed_tokens.weight"][TOKENS_BL]
        )
        for layer in range(last + 1):
            w = reference._layer(tensors, layer)
            a = reference._norm(x_BLD, w["input_layernorm"], eps)
            attended = reference._attention(fields, w, a, positions_BL, visible_BLL)
            x2 = x_BLD + reference._norm(attended, w["input_layernorm_2"], eps)
            m = reference._norm(x2, w["post_attention_layernorm"], eps)
            gate = m @ w["mlp.gate_proj"].T
            inner = gate / (1 + np.exp(-gate)) * (m @ w["mlp.up_proj"].T)
            for module, x in (("v_proj", a), ("attended", attended), ("up_proj", m),
                              ("down_proj", inner)):  # fmt: skip
                found.setdefault((layer, module), []).append(x.reshape(-1, x.shape[-1]))
            x_BLD = out.layer_outputs[loop, layer]
        states = out.states_TBLD[loop]
        found.setdefault((0, "head"), []).append(states.reshape(-1, states.shape[-1]))
    return {key: np.concatenate(parts) for key, parts in found.items()}


def test_moments_are_those_of_all_loops_and_tokens(tmp_path):
    fields, tensors = reference.random_checkpoint(np.random.default_rng(0), **GROUPED)
    reference.write_checkpoint(tmp_path, fields, tensors)
    config, params = load_huggingface(tmp_path)
    config = dataclasses.replace(config, num_loops=3)
    # One row at a time: the batches' sums are added up.
    moments = collect_moments(config, params, TOKENS_BL, batch=1)
    inputs = inputs_of(fields, tensors, loops=3)

    def expected(layer, name):
        x_NI = inputs[layer, name]
        return x_NI.T @ x_NI / len(x_NI)

    for layer in range(2):
        for part, name in (("self_attn", "v_proj"), ("mlp", "up_proj"), ("mlp", "down_proj")):
            ours = moments.of(layer, (part, name))
            np.testing.assert_allclose(ours, expected(layer, name), rtol=1e-3, atol=1e-4)
        # The heads' outputs by what the matrix after them makes of them.
        o_DI = tensors[f"model.layers.{layer}.self_attn.o_proj.weight"].astype(np.float64)
        made = o_DI @ np.asarray(moments.of(layer, ("self_attn", "o_proj"))) @ o_DI.T
        np.testing.assert_allclose(made, expected(layer, "attended"), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(moments.of(0, HEAD), expected(0, "head"), rtol=1e-3, atol=1e-4)
