"""The model against outputs of the published code (golden set A, float32), within 1e-4."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from ouro_jax.interop.huggingface import load_huggingface, save_huggingface
from ouro_jax.model.exit import exit_distribution, q_exit, select_exit
from ouro_jax.model.loop_lm import LoopLM
from ouro_jax.objectives.cross_entropy import cross_entropy
from ouro_jax.objectives.losses import expected_loss

THRESHOLDS = (0.3, 0.5, 0.7, 0.9, 1.0)
close = dict(rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def golden(golden_dir):
    return load_file(golden_dir / "set_a" / "golden.safetensors")


@pytest.fixture(scope="module")
def checkpoint(golden_dir):
    return load_huggingface(golden_dir / "set_a")


@pytest.fixture(scope="module")
def model(checkpoint):
    config, params = checkpoint
    return lambda tokens, **kwargs: LoopLM(config).apply({"params": params}, tokens, **kwargs)


@pytest.fixture(scope="module")
def output(model, golden):
    return jax.jit(model)(jnp.array(golden["input_ids"]))


def per_loop(golden, name):
    return np.stack([golden[f"{name}.step{loop}"] for loop in range(4)])


def loops_first(array_BLT):
    return np.moveaxis(array_BLT, -1, 0)


def test_states_gates_and_logits(golden, model, output):
    np.testing.assert_allclose(output.states_TBLD, per_loop(golden, "hidden"), **close)
    np.testing.assert_allclose(output.gate_logits_TBL, loops_first(golden["gate_logits"]), **close)
    logits_TBLV = model(output.states_TBLD, method="logits")
    np.testing.assert_allclose(logits_TBLV, per_loop(golden, "logits"), **close)


def test_exit_distribution(golden, output):
    pdf_TBL = exit_distribution(output.gate_logits_TBL)
    np.testing.assert_allclose(pdf_TBL, loops_first(golden["exit_pdf"]), **close)


@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize("published_rounding", [None, "float32"])
def test_exit_steps_and_final_logits(golden, model, output, threshold, published_rounding):
    step_BL = q_exit(output.gate_logits_TBL, threshold, published_rounding)
    np.testing.assert_array_equal(step_BL, golden[f"exit_step.thr{threshold}"])
    logits_BLV = model(select_exit(output.states_TBLD, step_BL), method="logits")
    np.testing.assert_allclose(logits_BLV, golden[f"final_logits.thr{threshold}"], **close)


def test_weighted_logits(golden, model, output):
    logits_TBLV = model(output.states_TBLD, method="logits")
    weighted_BLV = jnp.einsum(
        "TBL,TBLV->BLV", exit_distribution(output.gate_logits_TBL), logits_TBLV
    )
    np.testing.assert_allclose(weighted_BLV, golden["weighted_logits"], **close)


def test_long_input(golden, model):
    output = jax.jit(model)(jnp.array(golden["long_input_ids"]))
    gates_TBL = loops_first(golden["long.gate_logits"])
    np.testing.assert_allclose(output.gate_logits_TBL, gates_TBL, **close)
    last_TV = model(output.states_TBLD[:, 0, -1], method="logits")
    np.testing.assert_allclose(last_TV, golden["long.last_logits_per_step"], **close)


@pytest.mark.parametrize("remat", ["none", "layer", "loop_and_layer"])
def test_loss_and_every_gradient(golden_dir, golden, checkpoint, tmp_path, remat):
    config, params = checkpoint
    tokens_BL = jnp.array(golden["input_ids"])
    targets_BL = jnp.roll(tokens_BL, -1, axis=1)
    loss_mask_BL = jnp.arange(tokens_BL.shape[1]) < tokens_BL.shape[1] - 1
    loss_mask_BL = jnp.broadcast_to(loss_mask_BL, tokens_BL.shape)

    @jax.jit
    @jax.value_and_grad
    def loss_and_gradient(params):
        out = LoopLM(config, remat=remat).apply({"params": params}, tokens_BL)
        ce_TBL = cross_entropy(out.states_TBLD, params["lm_head"]["kernel"], targets_BL)
        sums = expected_loss(ce_TBL, out.gate_logits_TBL, loss_mask_BL, entropy_weight=0.1)
        return sums.loss / sums.num_tokens

    loss, gradient = loss_and_gradient(params)
    np.testing.assert_allclose(loss, golden["loss.total"][0], rtol=1e-4)
    save_huggingface(config, gradient, tmp_path)
    ours = load_file(tmp_path / "model.safetensors")
    theirs = load_file(golden_dir / "set_a" / "grads.safetensors")
    assert ours.keys() == theirs.keys()
    errors = {
        name: float(np.linalg.norm(ours[name] - theirs[name]) / np.linalg.norm(theirs[name]))
        for name in theirs
    }
    assert max(errors.values()) < 1e-4, errors


def test_losses_per_token(golden, checkpoint, output):
    _, params = checkpoint
    tokens_BL = jnp.array(golden["input_ids"])
    states_TBLD = output.states_TBLD[:, :, :-1]
    ce_TBL = cross_entropy(states_TBLD, params["lm_head"]["kernel"], tokens_BL[:, 1:])
    np.testing.assert_allclose(ce_TBL, loops_first(golden["loss.ce"]), **close)
    gate_logits_TBL = output.gate_logits_TBL[:, :, :-1]
    every_BL = jnp.ones(ce_TBL.shape[1:], bool)
    means = expected_loss(ce_TBL, gate_logits_TBL, every_BL, entropy_weight=0.1).means()
    np.testing.assert_allclose(means["expected_loss"], golden["loss.expected_ce"].mean(), **close)
    np.testing.assert_allclose(means["entropy"], golden["loss.entropy"].mean(), **close)


def test_the_golden_set_is_the_one_described(golden_dir, golden):
    meta = json.loads((golden_dir / "set_a" / "meta.json").read_text())
    assert meta["tensors"] == {name: list(array.shape) for name, array in golden.items()}
    assert tuple(meta["thresholds"]) == THRESHOLDS
