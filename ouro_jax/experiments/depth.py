"""Loss and accuracy on held-out text after each loop, beyond the trained depth too.

The paper's Tables 10 and 11 show benchmarks at depths 1 … 8 of models trained with four loops.
"""

import math
import os

import numpy as np

from ouro_jax.errors import require
from ouro_jax.experiments.scores import Heldout, token_scores
from ouro_jax.experiments.study import Progress, Record, Records, Subject


def run_depth(
    subject: Subject,
    heldout: Heldout,
    path: str | os.PathLike | None,
    num_loops: int = 8,
    progress: Progress | None = None,
) -> list[Record]:
    """A record of every source: nats per token, accuracy and bits per byte after loops 1 … T.

    Accuracy is the share of tokens that were the most probable one. Bits per byte are null where
    the bytes of a token are not known. `trained_loops` says where extrapolation begins. Records
    that `path` holds are not computed again.
    """
    require(num_loops >= 1, "num_loops", num_loops, "at least 1")
    records = Records(path, progress)

    def measure(source: str) -> Record:
        scores = token_scores(subject, heldout.sources[source](), num_loops)
        loss_T = scores.loss_TN.astype(np.float64)
        bits_T = loss_T.sum(axis=1) / math.log(2) / scores.num_bytes if scores.num_bytes else None
        return {
            "trained_loops": subject.config.num_loops,
            "loss_per_loop": loss_T.mean(axis=1),
            "accuracy_per_loop": scores.correct_TN.mean(axis=1),
            "bits_per_byte_per_loop": bits_T,
            "num_tokens": loss_T.shape[1],
            "num_bytes": scores.num_bytes,
        }

    return [
        records.once(
            {"kind": "depth", **subject.key, **heldout.key, "source": source, "loops": num_loops},
            lambda source=source: measure(source),
        )
        for source in heldout.sources
    ]
