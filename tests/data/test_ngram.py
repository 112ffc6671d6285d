"""The baselines: proper distributions, equal to counting by hand, better the more they see."""

import math
from collections import Counter

import numpy as np
import pytest

from ouro_jax.data import ngram
from ouro_jax.data.batch import batch_from_rows
from ouro_jax.data.mixture import HeldoutBatch, heldout_batches, open_mixture
from ouro_jax.data.ngram import evaluate_ngrams, fit_ngrams
from ouro_jax.data.rows import Row

VOCAB = 7


def batch_of(seed: int, masked: bool = False):
    rng = np.random.default_rng(seed)
    tokens = np.minimum(rng.geometric(0.4, 16), 5)  # ids 0 and 6 never occur
    mask = rng.random(16) < 0.6 if masked else None
    return batch_from_rows([Row(tokens, np.array([5, 8], np.uint32), mask)])


def by_hand(batches, token: int, target: int) -> tuple[float, float]:
    """Witten–Bell unigram and bigram probability from counted pairs of places."""
    pairs = []
    for batch in batches:
        for place in zip(*np.nonzero(batch.loss_mask_BL), strict=True):
            pairs.append((int(batch.tokens_BL[place]), int(batch.targets_BL[place])))
    targets = Counter(second for _, second in pairs)
    unigram = (targets[target] + len(targets) / VOCAB) / (len(pairs) + len(targets))
    follow = Counter(second for first, second in pairs if first == token)
    if not follow:
        return unigram, unigram
    bigram = (follow[target] + len(follow) * unigram) / (follow.total() + len(follow))
    return unigram, bigram


@pytest.mark.parametrize("merge_tokens", [1, 1 << 20])
def test_probabilities_equal_counting_by_hand_and_sum_to_one(monkeypatch, merge_tokens):
    monkeypatch.setattr(ngram, "MERGE_TOKENS", merge_tokens)
    batches = [batch_of(seed, masked=seed > 1) for seed in range(4)]
    model = fit_ngrams(iter(batches), VOCAB)
    assert model.num_tokens == sum(int(batch.loss_mask_BL.sum()) for batch in batches)
    everything = np.arange(VOCAB)
    assert math.isclose(model.unigram(everything).sum(), 1)
    for token in range(VOCAB):
        bigram = model.bigram(np.full(VOCAB, token), everything)
        assert math.isclose(bigram.sum(), 1)
        for target in range(VOCAB):
            hand = by_hand(batches, token, target)
            np.testing.assert_allclose(
                [model.unigram(everything)[target], bigram[target]], hand, rtol=1e-12
            )


def test_having_seen_nothing_means_uniform():
    model = fit_ngrams([], VOCAB)
    everything = np.arange(VOCAB)
    np.testing.assert_allclose(model.unigram(everything), 1 / VOCAB)
    np.testing.assert_allclose(model.bigram(everything, everything), 1 / VOCAB)
    score = evaluate_ngrams(model, [HeldoutBatch(batch_of(0), 22)])
    assert score.num_tokens == 4 + 7 and score.num_bytes == 22
    assert math.isclose(score.unigram_bits_per_byte, math.log2(VOCAB) * 11 / 22)


def test_on_real_text_order_helps_and_so_does_more_text(embedded_root):
    mixture = open_mixture(embedded_root, {"prose": 1.0}, sequence_length=64, seed=0)
    scores = []
    for rows in (40, 400):
        model = fit_ngrams([mixture.read(0, rows)], 300)
        scores.append(evaluate_ngrams(model, heldout_batches(embedded_root, "prose", 64, 8, 64)))
    few, many = scores
    assert many.bigram_bits_per_byte < many.unigram_bits_per_byte < math.log2(300)
    assert many.bigram_bits_per_byte < few.bigram_bits_per_byte
