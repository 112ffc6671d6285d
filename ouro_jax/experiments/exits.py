"""What early exit costs in accuracy and saves in depth, for every rule; and whether the gate is
calibrated.

T loops, N scored tokens. The rules are the functions of `model/exit.py` that decoding calls, on
states of all loops: what a token that left early would have fed later tokens is not simulated.
"""

import functools
import os
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ouro_jax.config import ModelConfig
from ouro_jax.experiments.scores import Heldout, TokenScores, token_scores
from ouro_jax.experiments.study import Progress, Record, Records, Subject
from ouro_jax.model.exit import (
    exit_distribution,
    lookahead_exit,
    q_exit,
    settled_exit,
    static_exit,
    sure_exit,
)
from ouro_jax.model.flops import attention_flops, head_flops, projection_flops

QUANTILES = tuple(np.round(np.linspace(0, 1, 21), 2).tolist())
CONFIDENCES = (0.02, 0.05, *QUANTILES[2::2], 0.95, 0.98)
DISTANCES = 16  # thresholds of the hidden difference, between the distances that occur
BINS = 10
IMPROVES_BY, STEEPNESS = 0.005, 50.0  # γ in nats and k of the paper's eq. 5

Step = Callable[[float], jax.Array]


def run_exits(
    subjects: Sequence[Subject],
    heldout: Heldout,
    path: str | os.PathLike | None,
    progress: Progress | None = None,
) -> list[Record]:
    """The Pareto records of every rule, and the gate's calibration, for each checkpoint.

    A record `exits` of each rule holds `points`, one for each of its values: `mean_depth`, `loss`
    (nats per token) and `accuracy` over the tokens of all sources together, and `flops`, the share
    of the arithmetic of all loops. A rule reads one head, `confidence` one of every loop it runs.
    Records `calibration` and `expected` are as `calibration` and `expectation` say. Records that
    `path` holds are not computed again.
    """
    records, found = Records(path, progress), []
    for subject in subjects:
        scores = functools.cache(functools.partial(_all_scores, subject, heldout))
        key = {**subject.key, **heldout.key, "sources": list(heldout.sources)}
        flops = functools.partial(flops_share, subject.config, heldout.sequence_length)
        for rule in ("static", "q", "lookahead", "hidden", "confidence"):
            found.append(records.once(
                {"kind": "exits", **key, "rule": rule},
                lambda rule=rule, scores=scores, flops=flops: {
                    "points": exit_points(rule, scores(), flops)
                },
            ))  # fmt: skip
        for loop in ("own", "next"):
            found.append(records.once(
                {"kind": "calibration", **key, "loop": loop},
                lambda loop=loop, scores=scores: {"bins": calibration(scores(), loop)},
            ))  # fmt: skip
        found.append(records.once(
            {"kind": "expected", **key}, lambda scores=scores: expectation(scores())
        ))  # fmt: skip
    return found


def exit_points(
    rule: str, scores: TokenScores, flops: Callable[[float, float], float]
) -> list[Record]:
    """A point of the rule for every value: what is read, how deep, what share of the FLOPs."""
    loops, tokens_N = len(scores.loss_TN), np.arange(scores.loss_TN.shape[1])
    steps: Mapping[str, tuple[Sequence[float], Step]] = {
        "static": (range(1, loops + 1), lambda v: static_exit(_gates(scores), int(v))),
        "q": (QUANTILES, lambda v: q_exit(_gates(scores), v)),
        "lookahead": (QUANTILES, lambda v: lookahead_exit(_gates(scores), v)),
        "hidden": (_distances(scores), lambda v: settled_exit(jnp.asarray(scores.moved_TN), v)),
        "confidence": (CONFIDENCES, lambda v: sure_exit(jnp.asarray(scores.confidence_TN), v)),
    }
    values, exits = steps[rule]
    points = []
    for value in values:
        step_N = np.asarray(exits(value))
        depth = float(step_N.mean()) + 1
        points.append({
            "value": value,
            "mean_depth": depth,
            "loss": scores.loss_TN[step_N, tokens_N].mean(dtype=np.float64),
            "accuracy": scores.correct_TN[step_N, tokens_N].mean(),
            "flops": flops(depth, depth if rule == "confidence" else 1.0),
        })  # fmt: skip
    return points


def flops_share(config: ModelConfig, sequence_length: int, depth: float, heads: float) -> float:
    """FLOPs of a token of that depth that reads so many heads, over those of all loops and one."""
    layer = projection_flops(config) + attention_flops(config, sequence_length)

    def flops(loops, heads):
        return loops * config.num_layers * layer + heads * head_flops(config)

    return flops(depth, heads) / flops(config.num_loops, 1)


def calibration(scores: TokenScores, loop: str) -> list[Record]:
    """What the gate says of going on, 1 - λ, against how often a loop improved the loss.

    `own`: gate t = 2 … T against the improvement of loop t itself, as eq. 5 and 6 of the paper
    train it. `next`: gate t = 1 … T-1 against that of loop t + 1, which it decides about.
    Improved means by more than γ = 0.005 nats. For each gate ten bins of equally many tokens:
    `predicted` the mean of 1 - λ, `observed` the share improved, `target` the mean of what eq. 5
    makes of the improvement, which a gate learns to predict: at least 0.44, as it is σ(-kγ) where
    nothing improved. All tokens count at every loop, those that would have left too.
    """
    gained_TN = scores.loss_TN[:-1].astype(np.float64) - scores.loss_TN[1:]
    steep_TN = STEEPNESS * (np.maximum(gained_TN, 0) - IMPROVES_BY)
    target_TN = 1 / (1 + np.exp(-steep_TN))
    gates_TN = scores.gate_logits_TN[1:] if loop == "own" else scores.gate_logits_TN[:-1]
    first = 2 if loop == "own" else 1
    goes_on_TN = 1 / (1 + np.exp(gates_TN.astype(np.float64)))
    return [
        {
            "gate": gate,
            "predicted": goes_on_N[part].mean(),
            "observed": (gained_N[part] > IMPROVES_BY).mean(),
            "target": target_N[part].mean(),
            "tokens": len(part),
        }
        for gate, (goes_on_N, gained_N, target_N) in enumerate(
            zip(goes_on_TN, gained_TN, target_TN, strict=True), start=first
        )
        for part in _equal_parts(goes_on_N)
    ]


def expectation(scores: TokenScores) -> Record:
    """The loss that the exit distribution expects, Σ p_t CE_t, against the loss of the exits taken.

    `expected` and `expected_depth` are means; `realised` and `realised_depth` those of Q-exit at
    its median, q = 0.5; `best` the loss if every token left where its own is lowest. `bins` are
    ten groups of tokens by expected loss.
    """
    p_TN = np.asarray(exit_distribution(_gates(scores)), np.float64)
    expected_N = (p_TN * scores.loss_TN).sum(axis=0)
    depths_T = np.arange(1, len(p_TN) + 1)
    step_N = np.asarray(q_exit(_gates(scores), 0.5))
    realised_N = scores.loss_TN[step_N, np.arange(len(step_N))].astype(np.float64)
    return {
        "expected": expected_N.mean(),
        "expected_depth": (depths_T @ p_TN).mean(),
        "exit_distribution": p_TN.mean(axis=1),
        "realised": realised_N.mean(),
        "realised_depth": step_N.mean() + 1,
        "best": scores.loss_TN.min(axis=0).mean(dtype=np.float64),
        "bins": [
            {"expected": expected_N[part].mean(), "realised": realised_N[part].mean()}
            for part in _equal_parts(expected_N)
        ],
    }


def _all_scores(subject: Subject, heldout: Heldout) -> TokenScores:
    """The scores of all sources together, at the trained depth."""
    parts = [
        token_scores(subject, batches(), subject.config.num_loops)
        for batches in heldout.sources.values()
    ]
    arrays = zip(*(part[:-1] for part in parts), strict=True)
    joined = [np.concatenate(list(array), axis=1) for array in arrays]
    return TokenScores(*joined, num_bytes=sum(part.num_bytes for part in parts))


def _gates(scores: TokenScores) -> jax.Array:
    return jnp.asarray(scores.gate_logits_TN)


def _distances(scores: TokenScores) -> list[float]:
    """Thresholds of three digits from the smallest changes to the largest, the same at each run."""
    if not scores.moved_TN.size:
        return []
    quantiles = np.quantile(scores.moved_TN, np.linspace(0.01, 0.99, DISTANCES))
    return list(dict.fromkeys(float(f"{quantile:.3g}") for quantile in quantiles if quantile > 0))


def _equal_parts(values_N: np.ndarray) -> list[np.ndarray]:
    """Indices of equally many tokens each, from the lowest values to the highest."""
    parts = np.array_split(np.argsort(values_N, kind="stable"), BINS)
    return [part for part in parts if len(part)]
