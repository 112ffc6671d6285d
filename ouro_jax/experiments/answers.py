"""What a model gets right on the held-out problems of a task, after each number of loops.

Answers are scored where the problem holds them: a token is right if it is the most probable one
given all before it, and a problem is right if all tokens of its answer are, which is when greedy
decoding would write it. Problems with many right answers are decoded and judged by their task.

T loops, B problems, L sequence, A answer tokens of a problem, V vocabulary, D width.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from ouro_jax.config import ModelConfig
from ouro_jax.data.batch import Batch, batch_from_rows
from ouro_jax.data.packing import Document
from ouro_jax.data.rows import RowSource, padding_row
from ouro_jax.data.tasks.task import Task
from ouro_jax.inference.generate import generate
from ouro_jax.model.loop_lm import LoopLM, LoopOutput

BATCH_TOKENS = 8192


@dataclass(frozen=True)
class Score:
    """How one held-out set went after `loops` loops: means over `problems` problems.

    `exact`: the share whose whole answer is right. `token_accuracy`: the share of answer tokens,
    and `nats`: minus the log-probability of the whole answer; None where answers are decoded.
    """

    loops: int
    exact: float
    problems: int
    token_accuracy: float | None = None
    nats: float | None = None


class _Answers(NamedTuple):
    """Where the tokens that predict answers stand, what they should predict, which ones count."""

    places_BA: np.ndarray
    targets_BA: np.ndarray
    counts_BA: np.ndarray


def score_answers(
    model: ModelConfig, params: Any, rows: RowSource, loops: Sequence[int]
) -> list[Score]:
    """The scores of a held-out set, one problem a row, after each of `loops`."""
    deepest, length = max(loops), rows.manifest.sequence_length
    batch_rows = max(1, BATCH_TOKENS // length)
    longest = max(int(batch_from_rows([row]).loss_mask_BL.sum()) for row in rows)
    right_T = np.zeros(deepest)
    tokens_T, nats_T, count = np.zeros(deepest), np.zeros(deepest), 0
    for batch in _batches(rows, batch_rows):
        answers = _answers(batch, longest)
        right_TBA, nats_TBA = jax.device_get(_scored(model, deepest)(params, batch, answers))
        counts_BA = answers.counts_BA
        problems_B = counts_BA.any(1)
        right_T += (right_TBA | ~counts_BA).all(2)[:, problems_B].sum(1)
        tokens_T += (right_TBA & counts_BA).sum((1, 2))
        nats_T += np.where(counts_BA, nats_TBA, 0).sum((1, 2), dtype=np.float64)
        count += int(counts_BA.sum())
    problems = len(rows)
    return [
        Score(n, right_T[n - 1] / problems, problems, tokens_T[n - 1] / count,
              nats_T[n - 1] / problems)
        for n in loops
    ]  # fmt: skip


def _batches(rows: RowSource, batch_rows: int) -> Iterator[Batch]:
    padding = padding_row(rows.manifest.sequence_length)
    for start in range(0, len(rows), batch_rows):
        members = [rows[i] for i in range(start, min(start + batch_rows, len(rows)))]
        yield batch_from_rows(members + [padding] * (batch_rows - len(members)))


def _answers(batch: Batch, longest: int) -> _Answers:
    """The answer tokens of each row first, in order; what is left of `longest` does not count."""
    order_BL = np.argsort(~batch.loss_mask_BL, axis=1, kind="stable")
    places_BA = order_BL[:, :longest]
    targets_BA = np.take_along_axis(batch.targets_BL, places_BA, 1)
    return _Answers(places_BA, targets_BA, np.take_along_axis(batch.loss_mask_BL, places_BA, 1))


@functools.cache
def _scored(model: ModelConfig, num_loops: int):
    """(params, batch, answers) → (right_TBA, nats_TBA), compiled."""
    loop_lm = LoopLM(model)

    @jax.jit
    def run(params, batch: Batch, answers: _Answers):
        out = cast(LoopOutput, loop_lm.apply(
            {"params": params}, batch.tokens_BL, batch.positions_BL, batch.segment_ids_BL,
            num_loops=num_loops,
        ))  # fmt: skip
        states_TBAD = jnp.take_along_axis(out.states_TBLD, answers.places_BA[None, ..., None], 2)
        logits_TBAV = cast(
            jax.Array, loop_lm.apply({"params": params}, states_TBAD, method="logits")
        )
        log_probs_TBAV = jax.nn.log_softmax(logits_TBAV)
        wanted_TBA1 = jnp.broadcast_to(
            answers.targets_BA[None, ..., None], (*logits_TBAV.shape[:-1], 1)
        )
        nats_TBA = -jnp.take_along_axis(log_probs_TBAV, wanted_TBA1, 3)[..., 0]
        return logits_TBAV.argmax(-1) == answers.targets_BA, nats_TBA

    return run


def judge_answers(
    model: ModelConfig, params: Any, task: Task, name: str, loops: Sequence[int]
) -> list[Score]:
    """The scores of a set whose problems have many right answers: decoded greedily and judged."""
    problems = task.heldout(name)
    starts = [_answer_start(problem) for problem in problems]
    longest = max(len(p.tokens) - start for p, start in zip(problems, starts, strict=True))
    prompts = [p.tokens[:start].tolist() for p, start in zip(problems, starts, strict=True)]
    scores = []
    for number in loops:
        answers = generate(model, params, prompts, longest, loops=number, stop_ids=(0,)).tokens
        right = [
            bool(task.is_right(name, problem, answer))
            for problem, answer in zip(problems, answers, strict=True)
        ]
        scores.append(Score(number, float(np.mean(right)), len(problems)))
    return scores


def has_many_answers(task: Task, name: str) -> bool:
    """Whether the answers of a set are judged, not compared."""
    problem = task.heldout(name)[0]
    answer = problem.tokens[_answer_start(problem) :].tolist()
    return task.is_right(name, problem, answer) is not None


def _answer_start(problem: Document) -> int:
    assert problem.loss_mask is not None, "held-out problems mark their answers"
    return int(problem.loss_mask.argmax())
