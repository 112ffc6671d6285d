"""The layout that a stage gets where its config leaves it open."""

import dataclasses
import math
import runpy
from pathlib import Path

import pytest

from ouro_jax.config import LayoutConfig, MeshConfig, from_config_dict, num_parameters
from ouro_jax.errors import ConfigError
from ouro_jax.parallel.chips import CHIPS
from ouro_jax.training.curriculum import StagePlan
from ouro_jax.training.layout import Layout
from ouro_jax.training.layout_choice import (
    _activation_bytes,
    _weight_bytes,
    candidates,
    choose_layout,
    estimated_bytes,
    estimated_seconds,
)

CONFIGS = Path(__file__).parents[2] / "configs"
PODS = [("v5e", 256, 1), ("v5p", 64, 1), ("v6e", 256, 1), ("v5p", 128, 2), ("h100", 64, 8)]


@pytest.fixture(scope="module")
def config():
    return from_config_dict(runpy.run_path(str(CONFIGS / "ouro_1p4b.py"))["get_config"]())


def laid_out(config, mesh=None, **layout):
    return dataclasses.replace(config, mesh=mesh or MeshConfig(), layout=LayoutConfig(**layout))


@pytest.mark.parametrize("kind, devices, slices", PODS)
def test_every_candidate_divides_devices_model_and_batch(config, kind, devices, slices):
    for name, stage in config.stream():
        model = config.stage_model(name)
        found = candidates(config, name, devices, slices, CHIPS[kind])
        assert len(set(found)) == len(found)
        for layout in found:
            mesh = layout.mesh
            assert math.prod(dataclasses.astuple(mesh)) == devices and mesh.slice == slices
            assert model.num_kv_heads % mesh.tensor == 0 and model.hidden_size % mesh.fsdp == 0
            assert stage.sequence_length % (2 * mesh.context) == 0
            for rows in StagePlan(name, stage).batch_sizes():
                assert rows % (layout.batch_shards * layout.microbatch_rows) == 0


@pytest.mark.parametrize("kind, devices, slices", PODS)
def test_the_first_fits_by_estimate_and_none_that_fits_is_faster_by_more_than_2_percent(
    config, kind, devices, slices
):
    chip = CHIPS[kind]
    for name, stage in config.stream():
        model, plan = config.stage_model(name), StagePlan(name, stage)
        first, *others = candidates(config, name, devices, slices, chip)
        assert estimated_bytes(model, plan, first) <= chip.hbm_bytes
        fits = [other for other in others if estimated_bytes(model, plan, other) <= chip.hbm_bytes]
        best = min(estimated_seconds(model, plan, other, chip) for other in fits)
        assert estimated_seconds(model, plan, first, chip) <= 1.021 * best


def test_what_the_config_sets_is_kept(config):
    wanted = laid_out(
        config, MeshConfig(fsdp=8, tensor=2), gather="each_loop", remat="none", microbatch_rows=2
    )
    for layout in candidates(wanted, "stable_1b", 64, 1, CHIPS["v5p"]):
        assert (layout.mesh.fsdp, layout.mesh.tensor) == (8, 2)
        assert (layout.gather, layout.remat, layout.microbatch_rows) == ("each_loop", "none", 2)


def test_long_rows_are_split_over_context_where_there_are_more_chips_than_rows(config):
    # 128 rows of 64K on 256 chips, 256 rows of 4K for the gate.
    assert candidates(config, "long_context", 256, 1, CHIPS["v5e"])[0].mesh.context > 1
    assert candidates(config, "gate", 256, 1, CHIPS["v5e"])[0].mesh.context == 1


def test_devices_that_are_not_known_get_data_and_fsdp_alone(config):
    small = dataclasses.replace(config, stages={"stable_1b": config.stages["stable_1b"]})
    layout = choose_layout(small, "stable_1b")
    assert layout == Layout(MeshConfig(1, 1, 8, 1, 1), "once", "layer", 2)
    assert candidates(small, "stable_1b", 1)[0] == Layout(
        MeshConfig(1, 1, 1, 1, 1), "each_loop", "layer", 2
    )


@pytest.mark.parametrize(
    "mesh, devices, words",
    [
        (MeshConfig(fsdp=3), 8, "mesh.fsdp=3 × mesh.tensor=1 × mesh.context=1 = 6 devices, but 8"),
        (MeshConfig(tensor=32), 64, "mesh.tensor = 32 does not divide num_heads = 16"),
        (MeshConfig(context=3, data=1), 3, "mesh.context = 3 does not divide sequence_length"),
        (MeshConfig(data=3), 3, "does not divide over 3 devices"),
    ],
)
def test_what_cannot_be_laid_out_is_refused_with_the_axis(config, mesh, devices, words):
    with pytest.raises(ConfigError) as error:
        candidates(laid_out(config, mesh), "stable_1b", devices, 1, CHIPS["v5p"])
    assert words in str(error.value)


def test_bytes_on_the_links_by_hand(config):
    """1.4B on 256 chips, a row of 4,096 each; 15/16 of what a ring of 16 gathers leaves a chip."""
    model, plan = (
        config.stage_model("stable_1b"),
        StagePlan("stable_1b", config.stages["stable_1b"]),
    )
    whole, ring = num_parameters(model), 15 / 16
    once = Layout(MeshConfig(1, 16, 16, 1, 1), "once", "layer", 1)
    within, between = _weight_bytes(model, plan, once)
    assert within == pytest.approx(whole * (2 * ring + 4 * (ring + 2 * ring / 16)))
    assert between == 0
    each = dataclasses.replace(once, gather="each_loop")
    # 8 microbatches × 4 loops; forward, again, backward; bfloat16 gradients.
    assert _weight_bytes(model, plan, each)[0] == pytest.approx(
        32 * whole * 2 * (3 * ring + ring + 2 * ring / 16)
    )
    slices = dataclasses.replace(once, mesh=MeshConfig(2, 8, 16, 1, 1))
    assert _weight_bytes(model, plan, slices)[1] == pytest.approx(4 * whole / (16 * 8))
    assert _activation_bytes(model, plan, once) == 0
    context = dataclasses.replace(once, mesh=MeshConfig(1, 8, 16, 1, 2))
    # Keys and values of a whole row, 2 × 2,048 × 4,096 bfloat16: twice gathered, scattered once.
    assert _activation_bytes(model, plan, context) == pytest.approx(
        16 * 96 * 3 * 2 * 2 * 2048 * 4096 / 2
    )
    tensor = dataclasses.replace(once, mesh=MeshConfig(1, 8, 16, 2, 1))
    # Two all-reduces of the states a pass, three passes.
    assert _activation_bytes(model, plan, tensor) == pytest.approx(
        16 * 96 * 3 * 2 * 2 * 2 * 2048 * 4096 / 2
    )
