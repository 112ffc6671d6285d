"""Bits per parameter against numbers worked out by hand."""

import math

import pytest

from ouro_jax.data.tasks.capo import Capo
from ouro_jax.experiments.capacity import bits_per_parameter, max_bits_per_parameter

PAPER = Capo(people=20_000, heldout_problems=1)


def test_a_perfect_learner_of_the_paper():
    # 20,000 people: log2(1.6e8 / 2e4) = 12.966 bits of name and 47.59 of values each: 1.21e6 bits.
    assert max_bits_per_parameter(PAPER, 1) == pytest.approx(1.2111e6, rel=1e-4)
    # The name still costs ln N nats, the values nothing.
    perfect = bits_per_parameter(PAPER, math.log(20_000), 0.0, 600_000)
    assert perfect == pytest.approx(1.2111e6 / 6e5, rel=1e-4)


def test_a_learner_of_the_pools_alone_has_nothing():
    nats_of_name, nats_of_values = (
        math.log(1.6e8),
        math.log(2 * 12 * 28 * 200 * 200 * 300 * 100 * 263),
    )
    assert bits_per_parameter(PAPER, nats_of_name, nats_of_values, 1000) == pytest.approx(
        0, abs=1e-9
    )
    assert bits_per_parameter(PAPER, nats_of_name, nats_of_values + 1, 1000) < 0


def test_hand_numbers_of_small_pools():
    # 8 names of which 4 are taken, and 2 * 336 * 2 * 1 * 1 * 1 * 1 values.
    task = Capo(people=4, first_names=2, middle_names=2, last_names=2, birth_years=2, cities=1,
                universities=1, majors=1, employers=1, heldout_problems=4)  # fmt: skip
    # One bit of each name and half of the 10.392 bits of values are known: 4 * 6.196 bits.
    p1, p2 = 2 * math.log(2), math.log(1344) / 2
    assert bits_per_parameter(task, p1, p2, 10) == pytest.approx(4 * (1 + 5.1962) / 10, rel=1e-4)
    assert max_bits_per_parameter(task, 10) == pytest.approx(4 * (1 + 10.3923) / 10, rel=1e-4)
