"""Names of pods: those that exist, Google's own, and the nearest to those that do not."""

import importlib.util
import math

import pytest

from ouro_jax.errors import ConfigError
from ouro_jax.parallel.chips import CHIPS
from ouro_jax.planning.topologies import KINDS, Topology, devices, grids, parse_topology


@pytest.mark.parametrize(
    ("text", "name", "chips"),
    [
        ("v5e:16x16", "v5e:16x16", 256),
        ("v5e-256", "v5e:16x16", 256),
        ("v5litepod-8", "v5e:2x4", 8),
        ("v6e-64", "v6e:8x8", 64),
        ("v5p:4x4x4", "v5p:4x4x4", 64),
        ("v5p-128", "v5p:4x4x4", 64),  # Google counts its two cores
        ("v5p-512", "v5p:4x8x8", 256),  # and not 4x4x16
        ("v5p-12288", "v5p:16x16x24", 6144),
        ("v4-8", "v4:2x2x1", 4),
        ("h100:8", "h100:8", 8),
        ("h200:4x8", "4 × h200:8", 32),
    ],
)
def test_names_mean_slices(text, name, chips):
    topology = parse_topology(text)
    assert (topology.name, topology.num_chips) == (name, chips)


def test_slices_multiply_and_a_tpu7x_chip_is_two_devices():
    assert parse_topology("v5p-128", 2) == Topology("v5p", (4, 4, 4), 2)
    assert parse_topology("v5p-128", 2).num_chips == 128
    assert parse_topology("tpu7x:2x2x1").num_devices == 8


@pytest.mark.parametrize(
    ("text", "nearest"),
    [
        ("v5e:16x17", "The nearest is v5e:16x16"),
        ("v5e:3x3", "The nearest is v5e:2x4"),
        ("v5e:16x16x1", "The nearest is v5e:16x16"),
        ("v5p:4x4x5", "The nearest is v5p:4x4x4"),
        ("v5p:32x32x32", "The nearest is v5p:16x16x24"),
        ("v5p-130", "The nearest is v5p:4x4x4"),
        ("v6e:axb", "v6e has 1x1, 2x2"),
        ("h100:7", "The nearest is h100:8"),
        ("v5q:4x4x4", "Did you mean 'v5p'?"),
        ("pod", "expected KIND:GRID"),
    ],
)
def test_what_does_not_exist_is_refused_with_the_nearest(text, nearest):
    with pytest.raises(ConfigError) as error:
        parse_topology(text)
    assert f"--topology={text}" in str(error.value) and nearest in str(error.value)
    with pytest.raises(ConfigError, match="--num_slices=0"):
        parse_topology("v5e:2x2", 0)


def test_every_kind_has_a_chip_and_grids_that_parse():
    assert set(KINDS) == set(CHIPS)
    for kind in KINDS:
        sizes = [math.prod(grid) for grid in grids(kind)]
        assert sizes == sorted(sizes)
        for grid in grids(kind):
            assert parse_topology(f"{kind}:{'x'.join(map(str, grid))}").grid == grid


def test_a_compiler_that_is_not_installed_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for text, extra in (("v5e:2x2", "tpu"), ("h100:8", "plan-gpu")):
        with pytest.raises(ConfigError, match=rf"pip install 'ouro_jax\[{extra}\]'"):
            devices(parse_topology(text))
