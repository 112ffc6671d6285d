"""What the KV policies do to greedy answers: the paper's Table 14 for any prompts.

B prompts, L their tokens and those of the answers.
"""

import functools
import os
from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from ouro_jax.errors import require
from ouro_jax.experiments.study import Progress, Prompts, Record, Records, Subject, prompts_key
from ouro_jax.inference.generate import Generation, generate
from ouro_jax.model.cache import KV_POLICIES, PER_LOOP
from ouro_jax.model.loop_lm import LoopLM

# Exact match of Ouro-1.4B, percent, all four loops run for every token (paper, Table 14).
PAPER = {
    "full": {"GSM8K": 78.92, "MATH-500": 82.40},
    "first": {"GSM8K": 18.73, "MATH-500": 8.43},
    "last": {"GSM8K": 78.85, "MATH-500": 80.40},
    "mean": {"GSM8K": 78.73, "MATH-500": 78.52},
}
JUDGED_AT_ONCE = 16


def run_kv(
    subject: Subject,
    prompts: Prompts,
    path: str | os.PathLike | None,
    new_tokens: int = 32,
    exits: Sequence[str | None] = (None,),
    policies: Sequence[str] = tuple(KV_POLICIES),
    references: Sequence[Sequence[int]] | None = None,
    stop_ids: Sequence[int] = (),
    progress: Progress | None = None,
) -> list[Record]:
    """A record of every exit rule (None: all loops) and KV policy.

    `exact_match` is the share of answers that are the reference (null without references): all of
    the answer where there are stop tokens, else as many tokens as the reference has.
    `equal_answers` and `tokens_in_common` compare with the policy `full` under the same rule,
    from the start; `nats_per_token` is what the whole model (all loops, its own cache) makes of
    the answers. `memory` is that of the cache over `full`'s; `paper` has Table 14's exact match.
    Records that `path` holds are not computed again.
    """
    if references is not None:
        require(len(references) == len(prompts), "references", len(references),
                f"one for each of the {len(prompts)} prompts")  # fmt: skip
    records = Records(path, progress)

    @functools.cache
    def answers(exit: str | None, kv: str) -> Generation:
        return generate(
            subject.config, subject.params, prompts, new_tokens, exit=exit, kv=kv, stop_ids=stop_ids
        )

    def measure(exit: str | None, kv: str) -> Record:
        found, full = answers(exit, kv), answers(exit, "full")
        common = [
            _common(ours, theirs) for ours, theirs in zip(found.tokens, full.tokens, strict=True)
        ]
        depths = [depth for row in found.depths for depth in row]
        return {
            "exact_match": _exact_match(found.tokens, references, bool(stop_ids)),
            "equal_answers": np.mean(
                [a == b for a, b in zip(found.tokens, full.tokens, strict=True)]
            ),
            "tokens_in_common": np.mean(common),
            "nats_per_token": nats_per_token(subject, prompts, found.tokens),
            "mean_depth": np.mean(depths) if depths else None,
            "memory": 1.0 if kv in PER_LOOP else 1 / subject.config.num_loops,
            "paper": PAPER.get(kv),
        }

    key = {
        "kind": "kv", **subject.key, "prompts": prompts_key(prompts), "new_tokens": new_tokens,
        "references": None if references is None else prompts_key(references),
        "stop_ids": list(stop_ids),
    }  # fmt: skip
    return [
        records.once(key | {"exit": exit, "kv": kv}, functools.partial(measure, exit, kv))
        for exit in exits
        for kv in policies
    ]


def nats_per_token(subject: Subject, prompts: Prompts, answers: Prompts) -> float | None:
    """The mean loss of the answers' tokens by the whole model; None if there are none."""
    length = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    text_BL = np.zeros((len(prompts), length), np.int32)
    mask_BL = np.zeros((len(prompts), length), bool)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        text_BL[row, : len(prompt) + len(answer)] = [*prompt, *answer]
        mask_BL[row, len(prompt) : len(prompt) + len(answer)] = True
    if not mask_BL.any():
        return None
    losses = [
        _answer_losses(subject.config, subject.params, text_BL[start : start + JUDGED_AT_ONCE])
        for start in range(0, len(text_BL), JUDGED_AT_ONCE)
    ]
    return float(np.concatenate(losses)[mask_BL[:, 1:]].mean(dtype=np.float64))


@functools.partial(jax.jit, static_argnums=0)
def _answer_losses(config, params: Any, text_BL: jax.Array) -> jax.Array:
    """The loss of every token but the first, after all loops; what pads a row on the right is
    seen by no token before it."""
    model = LoopLM(config, remat="none")
    out = cast(Any, model.apply({"params": params}, text_BL))

    def row_losses(row):
        state_LD, text_L = row
        logits = cast(jax.Array, model.apply({"params": params}, state_LD[:-1], method="logits"))
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), text_L[1:, None], axis=-1)[:, 0]

    return jax.lax.map(row_losses, (out.states_TBLD[-1], text_BL))


def _common(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """How many tokens two answers share from the start."""
    pairs = zip(ours, theirs, strict=False)
    shortest = min(len(ours), len(theirs))
    return next((place for place, (a, b) in enumerate(pairs) if a != b), shortest)


def _exact_match(answers: Prompts, references: Prompts | None, ends: bool) -> float | None:
    if references is None:
        return None
    pairs = zip(answers, references, strict=True)
    return float(np.mean([list(a if ends else a[: len(r)]) == list(r) for a, r in pairs]))
