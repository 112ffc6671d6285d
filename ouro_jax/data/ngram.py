"""Unigram and bigram baselines: what counting alone gives on the tokens that the model saw.

B rows, L sequence, V vocabulary, P distinct pairs. Both models cover the full vocabulary and are
interpolated by Witten and Bell's method: the weight of the lower order is the number of distinct
continuations. A bigram's pair is (token, target), so no pair crosses documents, and only scored
targets count, in fitting and in evaluation.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from ouro_jax.data.batch import Batch
from ouro_jax.data.mixture import HeldoutBatch

# Pairs are merged into the counts in portions of about this many: 8 MB of keys at a time.
MERGE_TOKENS = 1 << 20


@dataclass(frozen=True)
class NgramScore:
    """Bits per byte of text of both models, and the tokens and bytes that were scored."""

    unigram_bits_per_byte: float
    bigram_bits_per_byte: float
    num_tokens: int
    num_bytes: int


class NgramModel:
    """A fitted pair of unigram and bigram models.

    `pair_keys_P` are the distinct pairs as token · V + target, ascending; `pair_counts_P` how
    often each was seen.
    """

    def __init__(self, pair_keys_P: np.ndarray, pair_counts_P: np.ndarray, vocab_size: int):
        self.num_tokens = int(pair_counts_P.sum())
        self._keys_P, self._counts_P, self._vocab_size = pair_keys_P, pair_counts_P, vocab_size
        contexts_P, targets_P = np.divmod(pair_keys_P, vocab_size)
        count_V = np.bincount(targets_P, pair_counts_P, vocab_size)
        distinct = np.count_nonzero(count_V)
        # With nothing seen at all both terms are 0: the uniform model remains.
        total = max(self.num_tokens + distinct, 1)
        uniform = (distinct or 1) / vocab_size
        self.unigram_V = (count_V + uniform) / total
        self._context_count_V = np.bincount(contexts_P, pair_counts_P, vocab_size)
        self._context_distinct_V = np.bincount(contexts_P, minlength=vocab_size)

    def unigram(self, targets: np.ndarray) -> np.ndarray:
        """The probability of each target."""
        return self.unigram_V[targets]

    def bigram(self, tokens: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """The probability of each target after its token."""
        keys = tokens.astype(np.int64) * self._vocab_size + targets
        places = np.minimum(np.searchsorted(self._keys_P, keys), max(len(self._keys_P) - 1, 0))
        counts = np.zeros(len(keys))
        if len(self._keys_P):
            counts = np.where(self._keys_P[places] == keys, self._counts_P[places], 0)
        distinct = self._context_distinct_V[tokens]
        seen = self._context_count_V[tokens]
        smooth = self.unigram(targets)
        return np.where(
            seen > 0, (counts + distinct * smooth) / np.maximum(seen + distinct, 1), smooth
        )


def fit_ngrams(batches: Iterable[Batch], vocab_size: int) -> NgramModel:
    """Fits both models on the scored targets of `batches`."""
    keys, counts = np.zeros(0, np.int64), np.zeros(0, np.int64)
    waiting: list[np.ndarray] = []
    for batch in batches:
        mask_BL = batch.loss_mask_BL
        pairs = batch.tokens_BL[mask_BL].astype(np.int64) * vocab_size + batch.targets_BL[mask_BL]
        waiting.append(pairs)
        if sum(map(len, waiting)) >= MERGE_TOKENS:
            keys, counts = _merge(keys, counts, waiting)
            waiting = []
    keys, counts = _merge(keys, counts, waiting)
    return NgramModel(keys, counts, vocab_size)


def _merge(
    keys: np.ndarray, counts: np.ndarray, waiting: list[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    new_keys, new_counts = np.unique(np.concatenate([keys[:0], *waiting]), return_counts=True)
    merged, places = np.unique(np.concatenate([keys, new_keys]), return_inverse=True)
    total = np.bincount(places, np.concatenate([counts, new_counts]), len(merged))
    return merged, total.astype(np.int64)


def evaluate_ngrams(model: NgramModel, heldout: Iterable[HeldoutBatch]) -> NgramScore:
    """Bits per byte of both models on the scored targets of `heldout`."""
    unigram_bits = bigram_bits = 0.0
    num_tokens = num_bytes = 0
    for batch, batch_bytes in heldout:
        mask_BL = batch.loss_mask_BL
        tokens, targets = batch.tokens_BL[mask_BL], batch.targets_BL[mask_BL]
        unigram_bits -= float(np.log2(model.unigram(targets)).sum())
        bigram_bits -= float(np.log2(model.bigram(tokens, targets)).sum())
        num_tokens += len(targets)
        num_bytes += batch_bytes
    return NgramScore(unigram_bits / num_bytes, bigram_bits / num_bytes, num_tokens, num_bytes)
