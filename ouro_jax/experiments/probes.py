"""Faithfulness: do the depths agree, and is an answer there before the loop that gives it?
(paper, section 7.2)

T loops, N layers, B prompts, K candidate answers, D model width.
"""

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import jax
import numpy as np

from ouro_jax.errors import ConfigError, require
from ouro_jax.experiments.study import Progress, Prompts, Record, Records, Subject, prompts_key
from ouro_jax.model.layer_states import layer_states
from ouro_jax.model.loop_lm import LoopLM

BATCH_TOKENS = 4096
TEST_SHARE = 0.4
SHUFFLES = 5  # of the answers, for a control of less noise
FEWEST = 10  # prompts of either class, or an AUC says nothing


@dataclass(frozen=True)
class Questions:
    """Prompts whose answer is one of a few tokens.

    The answer at a depth is the candidate with the highest probability after the prompt. Probes
    tell answers whose index is in `positive` from the others. With `balanced` the answer is that
    relative to the depth's other prompts: the median of each candidate's score, over the prompts,
    is taken off first, for models that prefer one answer whatever the question. `truth` holds the
    right candidate of each prompt where one is known.
    """

    name: str
    prompts: Prompts
    candidates: Sequence[int]
    positive: frozenset[int] = frozenset({0})
    truth: Sequence[int] | None = None
    balanced: bool = False

    def __post_init__(self) -> None:
        require(len(self.prompts) > 0 and all(map(len, self.prompts)), "prompts",
                len(self.prompts), "at least one, and none empty")  # fmt: skip
        choices = len(self.candidates)
        require(choices >= 2 and len(set(self.candidates)) == choices, "candidates",
                list(self.candidates), "two or more different tokens")  # fmt: skip
        require(self.positive < set(range(choices)) and bool(self.positive), "positive",
                sorted(self.positive), f"some but not all of 0 … {choices - 1}")  # fmt: skip

    @property
    def key(self) -> Record:
        """What tells records on these questions from those on others."""
        return {
            "questions": self.name, "prompts": prompts_key(self.prompts),
            "candidates": list(self.candidates), "positive": sorted(self.positive),
            "balanced": self.balanced,
        }  # fmt: skip


class Observed(NamedTuple):
    """Answers of all depths [T, B], and the last token's states after every layer [T, N, B, D].

    The states are of the trained loops, the answers go on beyond.
    """

    answers_TB: np.ndarray
    states_TNBD: np.ndarray


def run_faithfulness(
    subject: Subject,
    questions: Questions,
    path: str | os.PathLike | None,
    num_loops: int = 8,
    progress: Progress | None = None,
) -> list[Record]:
    """A record `agreement` over depths 1 … `num_loops`, and a record `probe` for every
    (step, loop, layer) with 2 <= step <= trained loops and loop <= step.

    `agreement`: `matrix[i][j]`, how many prompts have the same answer after i+1 and j+1 loops (the
    diagonal is their number); the share of positive answers, and of right ones, per depth.
    `probe`: ROC AUC of a linear probe on the last prompt token's residual state that predicts the
    answer of `step`, on prompts it has not seen; `control_auc` with the answers shuffled; both
    null where fewer than ten prompts have the rarer answer. Records that `path` holds are not
    computed again.
    """
    trained = subject.config.num_loops
    require(num_loops >= trained, "num_loops", num_loops, f"at least the {trained} trained loops")
    records = Records(path, progress)
    observed = functools.cache(functools.partial(observe, subject, questions, num_loops))
    key = {**subject.key, **questions.key}
    found = [records.once(
        {"kind": "agreement", **key, "loops": num_loops},
        lambda: {"trained_loops": trained, **agreement(observed().answers_TB, questions)},
    )]  # fmt: skip
    for step in range(2, trained + 1):
        for loop in range(1, step + 1):
            for layer in range(1, subject.config.num_layers + 1):

                def fit(step=step, loop=loop, layer=layer) -> Record:
                    labels_B = np.isin(observed().answers_TB[step - 1], list(questions.positive))
                    states_BD = observed().states_TNBD[loop - 1, layer - 1]
                    return probe(states_BD, labels_B, seed=(step * 100 + loop) * 1000 + layer)

                place = {"step": step, "loop": loop, "layer": layer}
                found.append(records.once({"kind": "probe", **key, **place}, fit))
    return found


def observe(subject: Subject, questions: Questions, num_loops: int) -> Observed:
    """Runs the model over all prompts, a few at a time."""
    config, prompts = subject.config, questions.prompts
    length = max(map(len, prompts))
    batch = max(1, min(len(prompts), BATCH_TOKENS // length))
    candidates_K = np.asarray(questions.candidates)
    scores, states = [], []
    for start in range(0, len(prompts), batch):
        mine = prompts[start : start + batch]
        tokens_BL, last_B = np.zeros((batch, length), np.int32), np.zeros(batch, np.int32)
        for row, prompt in enumerate(mine):
            tokens_BL[row, : len(prompt)], last_B[row] = prompt, len(prompt) - 1
        layers_TNBD, states_TBD = layer_states(config, subject.params, tokens_BL, last_B, num_loops)
        logp_TBV = _log_probabilities(config, subject.params, states_TBD)
        scores.append(np.asarray(logp_TBV[:, : len(mine), candidates_K]))
        states.append(np.asarray(layers_TNBD[: config.num_loops, :, : len(mine)], np.float32))
    scores_TBK = np.concatenate(scores, axis=1)
    if questions.balanced:
        scores_TBK = scores_TBK - np.median(scores_TBK, axis=1, keepdims=True)
    return Observed(scores_TBK.argmax(axis=-1), np.concatenate(states, axis=2))


@functools.partial(jax.jit, static_argnums=0)
def _log_probabilities(config, params: Any, states_TBD: jax.Array) -> jax.Array:
    logits = cast(Any, LoopLM(config).apply({"params": params}, states_TBD, method="logits"))
    return jax.nn.log_softmax(logits)


def agreement(answers_TB: np.ndarray, questions: Questions) -> Record:
    """How often two depths give the same answer: counts [T, T], and what the answers are."""
    same_TTB = answers_TB[:, None] == answers_TB[None]
    right_T = None
    if questions.truth is not None:
        right_T = (answers_TB == np.asarray(questions.truth)).mean(axis=1)
    return {
        "num_prompts": answers_TB.shape[1],
        "matrix": same_TTB.sum(axis=-1),
        "positive_per_loop": np.isin(answers_TB, list(questions.positive)).mean(axis=1),
        "accuracy_per_loop": right_T,
    }


def probe(states_BD: np.ndarray, labels_B: np.ndarray, seed: int) -> Record:
    """ROC AUC of logistic regression on standardised states, over prompts held back (40 %).

    `control_auc` is the mean over five shuffles of the labels, split and fitted in the same way.
    """
    rarer = int(min(labels_B.sum(), (~labels_B).sum()))
    record: Record = {"rarer": rarer, "auc": None, "control_auc": None}
    if rarer < FEWEST:
        return record
    rng = np.random.default_rng(seed)
    controls = [_auc(states_BD, rng.permutation(labels_B)) for _ in range(SHUFFLES)]
    return record | {"auc": _auc(states_BD, labels_B), "control_auc": np.mean(controls)}


def _auc(states_BD: np.ndarray, labels_B: np.ndarray) -> float:
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.metrics import roc_auc_score
        from sklearn.model_selection import train_test_split
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
        from threadpoolctl import threadpool_limits
    except ImportError as error:
        raise ConfigError(
            "linear probes need scikit-learn: pip install 'ouro_jax[study]'."
        ) from error
    train, test = train_test_split(
        np.arange(len(labels_B)), test_size=TEST_SHARE, stratify=labels_B, random_state=0
    )
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    # Products this small wait for each other's threads more than they compute: 6 times slower.
    with threadpool_limits(1):
        model.fit(states_BD[train], labels_B[train])
        return float(roc_auc_score(labels_B[test], model.decision_function(states_BD[test])))
