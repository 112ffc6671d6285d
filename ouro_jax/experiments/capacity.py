"""Bits of knowledge per parameter, from the loss on names and values (paper, appendix B.1).

The paper misprints both formulas; these are those of Physics of Language Models 3.3, which the
signs and units force: N people, N0 possible names, S0 possible values, P parameters.
"""

import math

from ouro_jax.data.tasks.capo import Capo


def bits_per_parameter(task: Capo, p1_nats: float, p2_nats: float, parameters: int) -> float:
    """R = [N (log2 N0 - p1 / ln 2) + N (log2 S0 - p2 / ln 2)] / P.

    `p1_nats` and `p2_nats` are the loss per biography summed over its name, and over its values.
    A model that knows the pools and nothing else has 0, a worse one less.
    """
    left = task.name_bits + task.value_bits - (p1_nats + p2_nats) / math.log(2)
    return task.people * left / parameters


def max_bits_per_parameter(task: Capo, parameters: int) -> float:
    """R of a model that knows everyone: [N log2(N0 / N) + N log2 S0] / P.

    It still pays ln N nats for a name, since it cannot know whose biography comes next.
    """
    return bits_per_parameter(task, math.log(task.people), 0.0, parameters)
