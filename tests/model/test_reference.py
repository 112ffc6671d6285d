"""LoopLM and eq. 4 against the float64 reference, on shapes that the golden set does not have."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from safetensors.numpy import load_file

from ouro_jax.interop.huggingface import load_huggingface, save_huggingface
from ouro_jax.model.loop_lm import LoopLM
from ouro_jax.objectives.cross_entropy import cross_entropy
from ouro_jax.objectives.losses import expected_loss

SHAPES = {
    "grouped_query": dict(heads=6, kv_heads=2, head_dim=8, hidden=48),
    "one_kv_head": dict(heads=4, kv_heads=1),
    "wide_heads": dict(heads=4, head_dim=14),
    "narrow_heads_grouped": dict(heads=4, kv_heads=2, head_dim=4),
    "one_loop": dict(loops=1),
    "three_loops_three_layers": dict(loops=3, layers=3),
    "six_loops_one_layer": dict(loops=6, layers=1),
    "theta_and_eps": dict(theta=123.4, eps=1e-3),
}
close = dict(rtol=0, atol=1e-4)


def checkpoint(directory, seed=0, **shape):
    fields, tensors = reference.random_checkpoint(np.random.default_rng(seed), **shape)
    config, params = load_huggingface(reference.write_checkpoint(directory, fields, tensors))
    return fields, tensors, config, params


def tokens_of(fields, rows=2, length=17):
    return np.random.default_rng(9).integers(0, fields["vocab_size"], (rows, length))


def require_equal(config, params, out, expected):
    np.testing.assert_allclose(out.states_TBLD, expected.states_TBLD, **close)
    np.testing.assert_allclose(out.gate_logits_TBL, expected.gate_logits_TBL, **close)
    logits_TBLV = LoopLM(config).apply({"params": params}, out.states_TBLD, method="logits")
    np.testing.assert_allclose(logits_TBLV, expected.logits_TBLV, **close)


def test_the_reference_itself_equals_the_published_code(golden_dir):
    golden = load_file(golden_dir / "set_a" / "golden.safetensors")
    tensors = load_file(golden_dir / "set_a" / "model.safetensors")
    fields = dict(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, head_dim=16,
                  total_ut_steps=4, rope_theta=1e6, rms_norm_eps=1e-6)  # fmt: skip
    out = reference.forward(fields, tensors, golden["input_ids"])
    for loop in range(4):
        np.testing.assert_allclose(out.states_TBLD[loop], golden[f"hidden.step{loop}"], **close)
        np.testing.assert_allclose(out.logits_TBLV[loop], golden[f"logits.step{loop}"], **close)
        for layer in range(2):
            theirs = golden[f"debug.layer_out.loop{loop}.layer{layer}"]
            np.testing.assert_allclose(out.layer_outputs[loop, layer], theirs, **close)
    loss = reference.expected_loss(fields, tensors, golden["input_ids"], entropy_weight=0.1)
    np.testing.assert_allclose(loss, golden["loss.total"][0], rtol=1e-5)


@pytest.mark.parametrize("name", SHAPES)
def test_other_shapes(tmp_path, name):
    fields, tensors, config, params = checkpoint(tmp_path, **SHAPES[name])
    tokens_BL = tokens_of(fields)
    out = LoopLM(config).apply({"params": params}, tokens_BL)
    require_equal(config, params, out, reference.forward(fields, tensors, tokens_BL))


def test_packed_rows_with_padding(tmp_path):
    fields, tensors, config, params = checkpoint(tmp_path, heads=4, kv_heads=2)
    tokens_BL = tokens_of(fields, rows=2, length=12)
    segment_ids_BL = np.array([[1] * 5 + [2] * 4 + [3] * 3, [1] * 7 + [2] * 3 + [0] * 2])
    positions_BL = np.array([[*range(5), *range(4), *range(3)], [*range(7), *range(3), 0, 0]])
    out = LoopLM(config).apply({"params": params}, tokens_BL, positions_BL, segment_ids_BL)
    packed = reference.forward(fields, tensors, tokens_BL, positions_BL, segment_ids_BL)
    real_BL = segment_ids_BL > 0
    np.testing.assert_allclose(
        out.states_TBLD[:, real_BL], packed.states_TBLD[:, real_BL], **close
    )  # fmt: skip
    alone = reference.forward(fields, tensors, tokens_BL[:1, 5:9])
    np.testing.assert_allclose(out.states_TBLD[:, 0, 5:9], alone.states_TBLD[:, 0], **close)


def test_fewer_loops_are_a_prefix_and_more_go_on(tmp_path):
    fields, tensors, config, params = checkpoint(tmp_path, loops=3)
    tokens_BL = tokens_of(fields)
    longest = reference.forward(fields, tensors, tokens_BL, num_loops=8)
    for num_loops in (1, 2, 3, 5, 8):
        out = LoopLM(config).apply({"params": params}, tokens_BL, num_loops=num_loops)
        prefix = reference.Reference(*(part[:num_loops] for part in longest[:3]), {})
        require_equal(config, params, out, prefix)


@pytest.mark.parametrize("name", ["grouped_query", "wide_heads", "three_loops_three_layers"])
def test_gradient_of_the_expected_loss_along_random_directions(tmp_path, name):
    """Central differences in float64, step 1e-5: exact to about 1e-9 of the slope."""
    fields, tensors, config, params = checkpoint(tmp_path / "model", **SHAPES[name])
    tokens_BL = tokens_of(fields, length=9)
    every_BL = jnp.ones(tokens_BL[:, 1:].shape, bool)

    @jax.jit
    @jax.grad
    def gradient(params):
        out = LoopLM(config).apply({"params": params}, tokens_BL)
        head_DV = params["lm_head"]["kernel"]
        ce_TBL = cross_entropy(out.states_TBLD[:, :, :-1], head_DV, tokens_BL[:, 1:])
        sums = expected_loss(ce_TBL, out.gate_logits_TBL[:, :, :-1], every_BL, entropy_weight=0.1)
        return sums.loss / sums.num_tokens

    (tmp_path / "gradient").mkdir()
    save_huggingface(config, gradient(params), tmp_path / "gradient")
    gradients = load_file(tmp_path / "gradient" / "model.safetensors")
    rng = np.random.default_rng(5)
    for group in ("q_proj", "k_proj", "v_proj", "o_proj", "mlp", "norm", "gate.", "embed", "head"):
        chosen = [tensor for tensor in tensors if group in tensor]
        direction = {tensor: rng.normal(size=tensors[tensor].shape) for tensor in chosen}
        length = np.sqrt(sum((step**2).sum() for step in direction.values()))

        def loss_at(distance, direction=direction, length=length):
            moved = {
                tensor: value + distance * direction[tensor] / length
                if tensor in direction
                else value.astype(np.float64)
                for tensor, value in tensors.items()
            }
            return reference.expected_loss(fields, moved, tokens_BL, entropy_weight=0.1)

        expected = (loss_at(1e-5) - loss_at(-1e-5)) / 2e-5
        slope = sum((gradients[tensor] * direction[tensor]).sum() for tensor in chosen) / length
        size = np.sqrt(sum((gradients[tensor].astype(np.float64) ** 2).sum() for tensor in chosen))
        # A random direction sees about size / sqrt(entries) of the gradient.
        entries = sum(step.size for step in direction.values())
        assert abs(slope - expected) < 1e-4 * size / np.sqrt(entries) + 1e-8, (group, slope)
