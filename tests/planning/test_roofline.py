"""The roofline against numbers written out."""

import pytest

from ouro_jax.config import MeshConfig, ModelConfig
from ouro_jax.parallel.chips import Chip
from ouro_jax.planning.hlo import Collective
from ouro_jax.planning.roofline import hbm_bytes_per_step, link_bytes, roofline
from ouro_jax.training.layout import Layout

CHIP = Chip("x", "x", 1000.0, 1, 100.0, 10.0, 1.0)


def transfer(kind, axes, size, payload=1200):
    return Collective(kind, axes, size, 2, 5, payload // 10, "")


@pytest.mark.parametrize(
    "kind, axes, size, slices, within, between",
    [
        ("all-gather", ("fsdp",), 4, 1, 900, 0),
        ("reduce-scatter", ("fsdp",), 4, 2, 900, 0),
        ("all-reduce", ("data", "fsdp"), 6, 1, 2000, 0),
        ("all-to-all", ("tensor",), 3, 1, 800, 0),
        ("collective-permute", ("context",), 4, 1, 1200, 0),
        ("collective-permute", ("slice",), 2, 2, 0, 1200),
        ("all-reduce", ("slice",), 2, 2, 0, 1200),
        # In the slice first: 2 · 5/6; then each chip's sixth over three slices: 2 · 2/3 · 1/6.
        ("all-reduce", ("slice", "data"), 18, 3, 2000, 2 * 1200 * 2 / 3 / 6),
    ],
)
def test_what_a_chip_sends_in_a_ring(kind, axes, size, slices, within, between):
    assert link_bytes(transfer(kind, axes, size), slices) == pytest.approx((within, between))


def test_the_longest_time_bounds():
    moved = [transfer("all-gather", ("fsdp",), 4), transfer("all-reduce", ("slice",), 2, 20)]
    times = roofline(CHIP, 60_000, 80_000, 500, moved, 2)
    assert (times.compute, times.hbm, times.ici, times.dcn) == (80, 5, 90, 20)
    assert (times.bound, times.bound_by) == (90, "ici")
    assert times.mfu_bound == pytest.approx(60_000 / (90 * 1000))
    # Where products bound the step, only what is computed again keeps it from its peak.
    assert roofline(CHIP, 60_000, 80_000, 500, []).mfu_bound == pytest.approx(0.75)


def test_hbm_bytes_by_hand():
    # T 2, N 3, D 8, F 24, H = G = 4 of 4, V 32; 1,120 parameters a layer, 3,889 in all.
    model = ModelConfig(32, 8, 24, 3, 4, 4, 4, num_loops=2, dtype="bfloat16")
    layout = Layout(MeshConfig(1, 1, 4, 1, 1), "each_loop", "layer", 2)
    # Layers: weights forward, again, backward and their gradient written and read: 5 passes.
    weights = 2 * 5 * (3 * 1120 + 17)
    # 10D + 4HK + 4GK + 4F elements a token, 64 tokens: forward, again, backward (twice).
    activations = 64 * 2 * 4 * (80 + 4 * 16 + 4 * 16 + 4 * 24)
    # Two chunks at least: the head thrice and its float32 sum; logits once a product.
    readout = 2 * 256 * (3 * 2 + 8) + 3 * 2 * 4 * 2 * 64 * 32
    sums = (8 + 2) * 3889 / 4
    microbatch = 2 * (weights + 3 * activations) + readout + sums
    counted = hbm_bytes_per_step(model, 32, layout, "expected", 3, 12 * 972)
    assert counted == pytest.approx(3 * microbatch + 28 * 972)
    # A frozen model is read once, and nothing is written back.
    forward = 2 * (2 * 3377 + 3 * 64 * 2 * 304) + 2 * 256 * 2 + 2 * 4 * 2 * 64 * 32
    assert hbm_bytes_per_step(model, 32, layout, "gate", 1, 12 * 972) == pytest.approx(forward)
